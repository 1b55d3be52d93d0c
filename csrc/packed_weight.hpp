// The weight matrix of a linear layer in the order in which the kernels read it; petalsd/ops/packed_weight.py writes it.
#pragma once

#include <cstdint>

namespace petalsd {

enum class WeightFormat { kFloat32, kBFloat16, kInt8, kInt4 };

constexpr int kNumWeightFormats = 4;
constexpr std::int64_t kTileOuts = 16;      // outputs that lie side by side
constexpr std::int64_t kGroupIns = 64;      // inputs that share a scale: of activations, and of int4 weights
constexpr std::int64_t kUnitBytes = 64;     // one step of a kernel: 16 outputs of one, two or four inputs
constexpr std::int64_t kInt4GroupBytes = kTileOuts * kGroupIns / 2;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Outputs come in tiles of 16, each of them in one piece; the last one is filled up with zeros, and so are the inputs.
// A tile of num_in inputs k, outputs j:
//
//   float32   [num_in][16]: weight[j, k]
//   bfloat16  [num_in / 2][16][2]: weight[j, 2 * pair + i]                                       num_in to 32
//   int8      [num_in / 4][16][4]: weight[j, 4 * quad + i] / scale[j] + 128, unsigned            num_in to 64
//             scales float32 [16]
//   int4      [num_in / 64][8][16][4]: of inputs 64 * group + 8 * i + b in the lower and          num_in to 64
//             64 * group + 8 * i + 4 + b in the upper half of a byte, weight[j, k] / scale[j, group] + 8
//             scales bfloat16 [num_in / 64][16]
struct PackedWeight {
  WeightFormat format;
  std::int64_t num_out;
  std::int64_t num_in;
  const void* data;    // the caller's, at a cache line
  const void* scales;  // likewise; null for floating-point weights

  std::int64_t num_tiles() const { return (num_out + kTileOuts - 1) / kTileOuts; }
  std::int64_t num_groups() const { return (num_in + kGroupIns - 1) / kGroupIns; }

  std::int64_t tile_bytes() const {
    switch (format) {
      case WeightFormat::kFloat32:
        return num_in * kUnitBytes;
      case WeightFormat::kBFloat16:
        return round_up(num_in, 32) / 2 * kUnitBytes;
      case WeightFormat::kInt8:
        return num_groups() * kGroupIns / 4 * kUnitBytes;
      default:
        return num_groups() * kInt4GroupBytes;
    }
  }
};

}  // namespace petalsd
