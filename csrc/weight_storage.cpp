#include "weight_storage.hpp"

#include <algorithm>
#include <cstring>

#include "thread_team.hpp"

namespace petalsd {
namespace {

constexpr std::int64_t kBlockIns = 512;  // of 16 outputs they stay in the first cache
constexpr float kSmallestScale = 1.17549435e-38f;
constexpr float kRounder = 12582912.0f;  // added to a number below 2^22 and taken away, it leaves the nearest whole one
constexpr std::int64_t kValuesPerThread = 1 << 18;  // to start one takes a tenth of what it then saves

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

float widen(std::uint16_t bfloat16) { return bits<float>(static_cast<std::uint32_t>(bfloat16) << 16); }

// To the nearest, ties to even; what is not a number stays one.
std::uint16_t narrow(float value) {
  const auto word = bits<std::uint32_t>(value);
  const std::uint32_t rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  return static_cast<std::uint16_t>((word & 0x7fffffff) > 0x7f800000 ? word >> 16 | 0x40 : rounded);
}

// The exponent is moved to where float32 has it and corrected by a product, which is right for subnormal numbers too.
float from_half(std::uint16_t half) {
  const std::uint32_t size = half & 0x7fffu;
  const float scaled = bits<float>(size << 13) * 0x1p112f;
  const std::uint32_t finite = bits<std::uint32_t>(scaled);
  const std::uint32_t word = size >= 0x7c00 ? size << 13 | 0x7f800000 : finite;
  return bits<float>(word | static_cast<std::uint32_t>(half & 0x8000u) << 16);
}

// Values from `start` of a row of `num_in`, and zeros beyond its end.
class Row {
 public:
  Row(const WeightRows& rows, std::int64_t number, std::int64_t num_in)
      : element_(rows.element),
        data_(static_cast<const char*>(rows.data) +
              number * rows.stride * (rows.element == Element::kFloat32 ? 4 : 2)),
        num_in_(num_in) {}
  explicit Row() : element_(Element::kFloat32), data_(nullptr), num_in_(0) {}  // zeros

  void read(std::int64_t start, std::int64_t count, float* values) const {
    const std::int64_t known = std::clamp<std::int64_t>(num_in_ - start, 0, count);
    if (element_ == Element::kFloat32) {
      if (known > 0) std::memcpy(values, data_ + 4 * start, 4 * known);
    } else {
      const auto* words = reinterpret_cast<const std::uint16_t*>(data_) + start;
      if (element_ == Element::kBFloat16) {
        for (std::int64_t k = 0; k < known; ++k) values[k] = widen(words[k]);
      } else {
        for (std::int64_t k = 0; k < known; ++k) values[k] = from_half(words[k]);
      }
    }
    std::fill(values + known, values + count, 0.0f);
  }

 private:
  Element element_;
  const char* data_;
  std::int64_t num_in_;
};

std::int64_t padded_in(const PackedWeight& weight) {
  switch (weight.format) {
    case WeightFormat::kFloat32:
      return weight.num_in;
    case WeightFormat::kBFloat16:
      return round_up(weight.num_in, 32);
    default:
      return weight.num_groups() * kGroupIns;
  }
}

std::int64_t ins_per_word(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return 1;
    case WeightFormat::kBFloat16:
      return 2;
    case WeightFormat::kInt8:
      return 4;
    default:
      return 8;
  }
}

float int8_scale(const Row& row, std::int64_t num_in) {
  float values[kBlockIns];
  float most = 0.0f;
  for (std::int64_t start = 0; start < num_in; start += kBlockIns) {
    const std::int64_t count = std::min(kBlockIns, num_in - start);
    row.read(start, count, values);
    for (std::int64_t k = 0; k < count; ++k) most = std::max(most, values[k] < 0.0f ? -values[k] : values[k]);
  }
  return std::max(most / 127.0f, kSmallestScale);
}

// One tile of 16 outputs, some inputs at a time.
class TilePacker {
 public:
  TilePacker(const PackedWeight& weight, std::int64_t tile, const Kernels& kernels)
      : weight_(weight),
        tile_(tile),
        kernels_(kernels),
        data_(static_cast<char*>(const_cast<void*>(weight.data)) + tile * weight.tile_bytes()),
        scales_(const_cast<void*>(weight.scales)) {}

  void pack(const Row* rows) {
    if (weight_.format == WeightFormat::kInt8) {
      for (int out = 0; out < kTileOuts; ++out) scales()[out] = int8_scale(rows[out], weight_.num_in);
    }
    const std::int64_t per_word = ins_per_word(weight_.format);
    for (std::int64_t start = 0; start < padded_in(weight_); start += kBlockIns) {
      const std::int64_t count = std::min(kBlockIns, padded_in(weight_) - start);
      for (int out = 0; out < kTileOuts; ++out) encode(rows[out], out, start, count);
      auto* words = reinterpret_cast<std::uint32_t*>(data_) + start / per_word * kTileOuts;
      for (std::int64_t w = 0; w < count / per_word; ++w) {
        for (int out = 0; out < kTileOuts; ++out) words[w * kTileOuts + out] = words_[out][w];
      }
    }
  }

 private:
  // `[16]` of this tile, for int8.
  float* scales() { return static_cast<float*>(scales_) + tile_ * kTileOuts; }

  void encode(const Row& row, int out, std::int64_t start, std::int64_t count) {
    row.read(start, count, values_);
    switch (weight_.format) {
      case WeightFormat::kFloat32:
        std::memcpy(words_[out], values_, 4 * count);
        break;
      case WeightFormat::kBFloat16: {
        auto* halves = reinterpret_cast<std::uint16_t*>(words_[out]);
        for (std::int64_t k = 0; k < count; ++k) halves[k] = narrow(values_[k]);
        break;
      }
      case WeightFormat::kInt8: {
        auto* bytes = reinterpret_cast<std::uint8_t*>(words_[out]);
        const float scale = scales()[out];
        for (std::int64_t k = 0; k < count; ++k) {
          const float whole = (values_[k] / scale + kRounder) - kRounder;
          bytes[k] = static_cast<std::uint8_t>(static_cast<std::int32_t>(whole) + 128);
        }
        break;
      }
      default:
        encode_int4(out, start / kGroupIns, count / kGroupIns);
    }
  }

  void encode_int4(int out, std::int64_t first_group, std::int64_t num_groups) {
    std::uint16_t found[kBlockIns / kGroupIns];
    kernels_.round_int4(values_, reinterpret_cast<std::uint8_t*>(words_[out]), found, num_groups);
    auto* stored = static_cast<std::uint16_t*>(scales_);
    for (std::int64_t g = 0; g < num_groups; ++g) {
      stored[(tile_ * weight_.num_groups() + first_group + g) * kTileOuts + out] = found[g];
    }
  }

  const PackedWeight& weight_;
  const std::int64_t tile_;
  const Kernels& kernels_;
  char* const data_;  // of this tile
  void* const scales_;
  alignas(64) float values_[kBlockIns];
  alignas(64) std::uint32_t words_[kTileOuts][kBlockIns];
};

// One tile of 16 outputs, some inputs at a time.
class TileUnpacker {
 public:
  TileUnpacker(const PackedWeight& weight, std::int64_t tile) : weight_(weight), tile_(tile) {}

  template <typename Store>
  void unpack(const Store& store) {
    const std::int64_t per_word = ins_per_word(weight_.format);
    const auto* data = static_cast<const char*>(weight_.data) + tile_ * weight_.tile_bytes();
    for (std::int64_t start = 0; start < padded_in(weight_); start += kBlockIns) {
      const std::int64_t count = std::min(kBlockIns, padded_in(weight_) - start);
      const auto* words = reinterpret_cast<const std::uint32_t*>(data) + start / per_word * kTileOuts;
      for (std::int64_t w = 0; w < count / per_word; ++w) {
        for (int out = 0; out < kTileOuts; ++out) words_[out][w] = words[w * kTileOuts + out];
      }
      for (int out = 0; out < kTileOuts; ++out) {
        decode(out, start, count);
        store(tile_ * kTileOuts + out, start, count, values_);
      }
    }
  }

 private:
  void decode(int out, std::int64_t start, std::int64_t count) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(words_[out]);
    switch (weight_.format) {
      case WeightFormat::kFloat32:
        std::memcpy(values_, bytes, 4 * count);
        break;
      case WeightFormat::kBFloat16: {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(bytes);
        for (std::int64_t k = 0; k < count; ++k) values_[k] = widen(halves[k]);
        break;
      }
      case WeightFormat::kInt8: {
        const float scale = static_cast<const float*>(weight_.scales)[tile_ * kTileOuts + out];
        for (std::int64_t k = 0; k < count; ++k) values_[k] = static_cast<float>(bytes[k] - 128) * scale;
        break;
      }
      default:
        for (std::int64_t g = 0; g < count / kGroupIns; ++g) {
          const std::int64_t group = tile_ * weight_.num_groups() + start / kGroupIns + g;
          const float scale = widen(static_cast<const std::uint16_t*>(weight_.scales)[group * kTileOuts + out]);
          decode_group(bytes + g * kGroupIns / 2, scale, values_ + g * kGroupIns);
        }
    }
  }

  static void decode_group(const std::uint8_t* bytes, float scale, float* values) {
    for (std::int64_t half = 0; half < kGroupIns / 2; half += 4) {
      for (int b = 0; b < 4; ++b) {
        values[2 * half + b] = static_cast<float>((bytes[half + b] & 15) - 8) * scale;
        values[2 * half + 4 + b] = static_cast<float>((bytes[half + b] >> 4) - 8) * scale;
      }
    }
  }

  const PackedWeight& weight_;
  const std::int64_t tile_;
  alignas(64) float values_[kBlockIns];
  alignas(64) std::uint32_t words_[kTileOuts][kBlockIns];
};

}  // namespace

void pack_weight(const std::vector<WeightRows>& rows, const PackedWeight& weight, const Kernels& kernels) {
  auto part = rows.begin();
  std::int64_t number = 0;  // in the part
  for (std::int64_t tile = 0; tile < weight.num_tiles(); ++tile) {
    Row of_tile[kTileOuts];
    for (Row& row : of_tile) {
      while (part != rows.end() && number == part->num_rows) {
        ++part;
        number = 0;
      }
      if (part != rows.end()) row = Row(*part, number++, weight.num_in);
    }
    TilePacker(weight, tile, kernels).pack(of_tile);
  }
}

void unpack_weight(const PackedWeight& weight, DType dtype, void* out, int num_threads) {
  const std::int64_t stride = padded_in(weight);
  const std::int64_t num_values = weight.num_tiles() * kTileOuts * stride;
  ThreadTeam team(static_cast<int>(std::clamp<std::int64_t>(num_values / kValuesPerThread, 1, num_threads)));
  const ThreadTeam::Shift shift(team);
  team.run(weight.num_tiles(), [&](std::int64_t tile) {
    TileUnpacker(weight, tile).unpack([&](std::int64_t row, std::int64_t start, std::int64_t count, const float* values) {
      if (dtype == DType::kFloat32) {
        std::memcpy(static_cast<float*>(out) + row * stride + start, values, 4 * count);
      } else {
        auto* halves = static_cast<std::uint16_t*>(out) + row * stride + start;
        for (std::int64_t k = 0; k < count; ++k) halves[k] = narrow(values[k]);
      }
    });
  });
}

}  // namespace petalsd
