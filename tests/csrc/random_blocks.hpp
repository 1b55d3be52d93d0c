// Random weights and pages for the sanitizers' programs, in buffers that are exactly as long as the contract says.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "span.hpp"

namespace {

using petalsd::BlockShape;
using petalsd::DType;
using petalsd::KVPages;
using petalsd::KVType;
using petalsd::PackedWeight;
using petalsd::WeightFormat;

// Exactly so many bytes, at a cache line: a sanitizer sees the first one too many.
class Buffer {
 public:
  explicit Buffer(std::int64_t size)
      : size_(static_cast<std::size_t>(size)), memory_(static_cast<std::uint8_t*>(::operator new(size_, kLine))) {}
  std::uint8_t* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }
  bool operator==(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_) == 0;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(std::uint8_t* memory) const { ::operator delete(memory, kLine); }
  };
  std::size_t size_;
  std::unique_ptr<std::uint8_t, Free> memory_;
};

struct Random {
  std::mt19937 engine{1};

  // Small values of either dtype: the upper half of a float32 is the bfloat16.
  Buffer values(std::int64_t count, bool is_bfloat16) {
    const std::int64_t size = is_bfloat16 ? 2 : 4;
    Buffer buffer(count * size);
    std::uniform_real_distribution<float> values(-0.3f, 0.3f);
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = values(engine);
      std::uint8_t bits[4];
      std::memcpy(bits, &value, 4);
      std::memcpy(buffer.data() + i * size, bits + 4 - size, static_cast<std::size_t>(size));
    }
    return buffer;
  }

  std::vector<float> floats(std::int64_t count) {
    std::uniform_real_distribution<float> values(-0.3f, 0.3f);
    std::vector<float> drawn(static_cast<std::size_t>(count));
    for (float& value : drawn) value = values(engine);
    return drawn;
  }

  Buffer bytes(std::int64_t count) {
    Buffer buffer(count);
    std::uniform_int_distribution<int> values(0, 255);
    for (std::int64_t i = 0; i < count; ++i) buffer.data()[i] = static_cast<std::uint8_t>(values(engine));
    return buffer;
  }
};

constexpr std::int64_t kNumBlocks = 2;
constexpr std::int64_t kPageTokens = 16;
constexpr std::int64_t kNumRuns = 5;
constexpr std::int64_t kLongHistory = 2 * petalsd::kPartTokens + 40;
const std::string kEmulated = "amx-emulated";

struct Case {
  BlockShape shape;
  WeightFormat format;
  KVType kv;
  std::string tier;
  std::int64_t history = 0;  // tokens more that the first sequence has behind it

  std::int64_t num_runs() const { return kNumRuns + (history + kPageTokens - 1) / kPageTokens; }

  DType dtype() const { return format == WeightFormat::kBFloat16 ? DType::kBFloat16 : DType::kFloat32; }
};

// A random weight in the format, with the memory that it points to.
struct OwnedWeight {
  PackedWeight weight;
  Buffer data;
  Buffer scales;

  OwnedWeight(Random& random, WeightFormat format, std::int64_t num_out, std::int64_t num_in)
      : weight{format, num_out, num_in, nullptr, nullptr}, data(make_data(random)), scales(make_scales(random)) {
    weight.data = data.data();
    weight.scales = scales.data();
  }

 private:
  Buffer make_data(Random& random) {
    const std::int64_t size = weight.num_tiles() * weight.tile_bytes();
    if (weight.format == WeightFormat::kFloat32) return random.values(size / 4, false);
    if (weight.format == WeightFormat::kBFloat16) return random.values(size / 2, true);
    return random.bytes(size);
  }
  Buffer make_scales(Random& random) {
    const std::int64_t num_out = weight.num_tiles() * petalsd::kTileOuts;
    if (weight.format == WeightFormat::kInt8) return random.values(num_out, false);
    if (weight.format == WeightFormat::kInt4) return random.values(num_out * weight.num_groups(), true);
    return Buffer(1);
  }
};

struct Pages {
  KVPages kv;
  std::vector<Buffer> slabs;

  Pages(Random& random, const Case& at_hand, std::int64_t num_pages) {
    const BlockShape& shape = at_hand.shape;
    const std::int64_t tokens = num_pages * kPageTokens * shape.num_kv_heads;
    for (int slab = 0; slab < 2; ++slab) {
      const std::int64_t count = tokens * shape.head_dim;
      slabs.push_back(at_hand.kv == KVType::kInt8 ? random.bytes(count)
                                                  : random.values(count, at_hand.kv == KVType::kBFloat16));
    }
    const std::int64_t num_scales = at_hand.kv == KVType::kInt8 ? tokens : 1;
    for (int slab = 0; slab < 2; ++slab) slabs.push_back(random.values(num_scales, false));
    kv = {at_hand.kv, slabs[0].data(), slabs[1].data(), reinterpret_cast<float*>(slabs[2].data()),
          reinterpret_cast<float*>(slabs[3].data()), kPageTokens, shape.num_kv_heads, shape.head_dim};
  }
};

}  // namespace
