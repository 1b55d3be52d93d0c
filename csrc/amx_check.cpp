#include "amx_check.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kNumIn = 2 * kGroupIns;
constexpr std::int64_t kNumOut = 2 * kTileOuts;
constexpr std::int64_t kNumRows = 5;

struct alignas(64) Line {
  std::uint8_t bytes[64];
};

// The same values everywhere, of either sign, from -1 to 1.
float value_at(std::int64_t i) { return static_cast<float>((i * 2654435761u) % 2001u) / 1000.0f - 1.0f; }

// The upper half of a float32.
std::uint16_t bfloat16_of(float value) {
  std::uint16_t halves[2];
  std::memcpy(halves, &value, sizeof halves);
  return halves[1];
}

// Weights of the format; integers take any bits.
std::vector<Line> weights_of(WeightFormat format, std::int64_t num_bytes) {
  std::vector<Line> lines(static_cast<std::size_t>(num_bytes / 64));
  auto* bytes = reinterpret_cast<std::uint8_t*>(lines.data());
  for (std::int64_t i = 0; i < num_bytes; i += 2) {
    const std::uint16_t word = format == WeightFormat::kBFloat16 ? bfloat16_of(value_at(i))
                                                                 : static_cast<std::uint16_t>(i * 40503u >> 3);
    std::memcpy(bytes + i, &word, sizeof word);
  }
  return lines;
}

std::vector<float> product(const Kernels& kernels, const PackedWeight& weight) {
  const LinearKernels& linear = kernels.linear[static_cast<int>(weight.format)];
  const std::int64_t stride = linear.operand_bytes(kNumIn);
  std::vector<Line> operands(static_cast<std::size_t>(kTileRows * stride / 64));
  auto* operand = reinterpret_cast<char*>(operands.data());
  std::vector<float> row(kNumIn);
  for (std::int64_t r = 0; r < kNumRows; ++r) {
    for (std::int64_t k = 0; k < kNumIn; ++k) row[static_cast<std::size_t>(k)] = value_at(r * kNumIn + k + 7);
    linear.prepare(row.data(), operand + r * stride, kNumIn);
  }
  std::vector<float> out(kNumRows * kNumOut);
  linear.multiply({weight, nullptr, operand, stride, nullptr, out.data(), kNumRows}, 0, kNumOut / kTileOuts);
  return out;
}

bool is_right(WeightFormat format) {
  PackedWeight weight{format, kNumOut, kNumIn, nullptr, nullptr};
  const std::vector<Line> data = weights_of(format, weight.num_tiles() * weight.tile_bytes());
  const std::vector<float> wide_scales(kNumOut, 0.01f);
  const std::vector<std::uint16_t> narrow_scales(kNumOut * kNumIn / kGroupIns, bfloat16_of(0.0625f));
  weight.data = data.data();
  weight.scales = format == WeightFormat::kInt8 ? static_cast<const void*>(wide_scales.data()) : narrow_scales.data();
  const std::vector<float> actual = product(kAmxKernels, weight);
  const std::vector<float> expected = product(kEmulatedAmxKernels, weight);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!(std::fabs(actual[i] - expected[i]) <= 1e-3f * (1.0f + std::fabs(expected[i])))) return false;
  }
  return true;
}

}  // namespace

bool amx_computes_rightly() {
  return is_right(WeightFormat::kBFloat16) && is_right(WeightFormat::kInt8) && is_right(WeightFormat::kInt4);
}

}  // namespace petalsd
