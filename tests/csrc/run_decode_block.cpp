// Decode steps of random blocks on teams of several sizes and in every tier, for the sanitizers: buffers are exactly
// as long as the contract says, and every team must give the same bits as one thread. Then what must be refused.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "decode_span.hpp"

namespace {

using petalsd::BlockPointers;
using petalsd::BlockShape;
using petalsd::DecodeBlock;
using petalsd::DecodeRows;
using petalsd::DType;
using petalsd::Processor;

using Bytes = std::vector<std::uint8_t>;

struct Random {
  std::mt19937 engine{1};

  // Small values of either dtype: the upper half of a float32 is the bfloat16.
  Bytes values(std::int64_t count, DType dtype) {
    const std::size_t size = dtype == DType::kBFloat16 ? 2 : 4;
    Bytes bytes(static_cast<std::size_t>(count) * size);
    std::uniform_real_distribution<float> values(-0.3f, 0.3f);
    for (std::size_t i = 0; i < bytes.size(); i += size) {
      const float value = values(engine);
      std::uint8_t bits[4];
      std::memcpy(bits, &value, 4);
      std::memcpy(&bytes[i], bits + 4 - size, size);
    }
    return bytes;
  }
};

constexpr std::int64_t kNumBlocks = 2;

struct Case {
  BlockShape shape;
  DType dtype;
  std::string tier;
};

// The span's answer and what it wrote into the pages. Both blocks have the same weights.
std::vector<Bytes> decode(const Case& at_hand, int num_threads, int num_steps) {
  Random random;
  const auto& [shape, dtype, tier] = at_hand;
  const std::int64_t m = shape.hidden_size, d = shape.head_dim, i = shape.intermediate_size;
  const std::int64_t q = shape.num_heads * d, kv = shape.num_kv_heads * d;
  const std::int64_t sizes[] = {m, (q + 2 * kv) * m, q + 2 * kv, d, d, m * q, m, m, 2 * i * m, 2 * i, m * i, m};
  std::vector<Bytes> weights;
  for (const std::int64_t size : sizes) weights.push_back(random.values(size, dtype));
  const auto at = [&](std::size_t k) { return weights[k].data(); };
  const BlockPointers pointers{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
  std::vector<std::shared_ptr<const DecodeBlock>> blocks;
  for (std::int64_t index = 1; index <= kNumBlocks; ++index) {
    blocks.push_back(std::make_shared<DecodeBlock>(index, shape, pointers, dtype, petalsd::choose_tier(tier, dtype)));
  }
  petalsd::DecodeSpan span(blocks);
  petalsd::ThreadTeam team(num_threads);

  constexpr std::int64_t num_rows = 7, page_tokens = 4, num_runs = 5;
  const std::int64_t num_pages = 1 + num_rows * num_runs * kNumBlocks;
  Bytes k = random.values(num_pages * page_tokens * kv, dtype);
  Bytes v = random.values(num_pages * page_tokens * kv, dtype);
  const Bytes cos = random.values(num_rows * d, dtype), sin = random.values(num_rows * d, dtype);
  Bytes hidden = random.values(num_rows * m, dtype);
  Bytes out(hidden.size());
  std::vector<std::int32_t> origins;
  std::vector<std::int64_t> positions;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t run = 0; run < num_runs; ++run) {
      origins.push_back(static_cast<std::int32_t>((row * num_runs + run) * kNumBlocks));
    }
    positions.push_back(row * 2);
  }
  for (int step = 0; step < num_steps; ++step) {
    const DecodeRows rows{num_rows, hidden.data(), out.data(), cos.data(), sin.data(), k.data(), v.data(),
                          page_tokens, origins.data(), num_runs, positions.data()};
    // Now the whole span, now its second block alone.
    span.run(rows, 1 + step % 2, kNumBlocks - step % 2, team);
    hidden = out;
    for (std::int64_t& position : positions) position = (position + 1) % (page_tokens * num_runs);
  }
  return {out, k, v};
}

bool is_the_same_on_any_team(const Case& at_hand) {
  const auto expected = decode(at_hand, 1, 60);
  for (const int num_threads : {2, 4}) {
    if (decode(at_hand, num_threads, 60) == expected) continue;
    std::fprintf(stderr, "%s: %d threads give other bits than one\n", at_hand.tier.c_str(), num_threads);
    return false;
  }
  return true;
}

template <typename Call>
bool is_refused(const char* what, const char* part_of_message, const Call& call) {
  try {
    call();
  } catch (const petalsd::PoolError& error) {
    if (std::strstr(error.what(), part_of_message) != nullptr) return true;
    std::fprintf(stderr, "%s: refused with another message: %s\n", what, error.what());
    return false;
  }
  std::fprintf(stderr, "%s: not refused\n", what);
  return false;
}

// Processors that lack something, whatever this one has.
bool tiers_are_guarded() {
  using petalsd::choose_tier;
  const Processor none{false, false, false}, old{true, false, false}, recent{true, true, false};
  const auto name = [](const Processor& processor) {
    return std::string(choose_tier("auto", DType::kBFloat16, processor).name);
  };
  if (name(none) != "baseline" || name(old) != "avx2" || name(recent) != "avx512") {
    std::fputs("another tier was chosen than the best one that the processor has\n", stderr);
    return false;
  }
  const auto forced = [](const char* tier, const Processor& processor) {
    return [=] { choose_tier(tier, DType::kFloat32, processor); };
  };
  return is_refused("avx2", "tier = avx2: this processor has no AVX2", forced("avx2", none)) &&
         is_refused("avx512", "tier = avx512: this processor has no AVX-512", forced("avx512", old)) &&
         is_refused("avx512bf16", "has no AVX-512 with BF16", forced("avx512bf16", recent)) &&
         is_refused("sse9", "tier = sse9: auto, baseline", forced("sse9", recent));
}

bool spans_are_guarded(const BlockShape& shape) {
  const auto block = [](std::int64_t index, const BlockShape& of) {
    return std::make_shared<const DecodeBlock>(index, of, BlockPointers{}, DType::kFloat32,
                                               petalsd::choose_tier("baseline", DType::kFloat32));
  };
  BlockShape wider = shape;
  wider.intermediate_size += 1;
  petalsd::DecodeSpan span({block(3, shape), block(4, shape)});
  petalsd::ThreadTeam team(1);
  const auto run = [&](std::int64_t first, std::int64_t count, std::int64_t num_rows) {
    return [&span, &team, first, count, num_rows] {
      DecodeRows rows{};
      rows.num_rows = num_rows;
      span.run(rows, first, count, team);
    };
  };
  return is_refused("no blocks", "at least one", [] { petalsd::DecodeSpan{{}}; }) &&
         is_refused("a gap", "in order", [&] { petalsd::DecodeSpan{{block(3, shape), block(5, shape)}}; }) &&
         is_refused("other sizes", "same sizes", [&] { petalsd::DecodeSpan{{block(3, shape), block(4, wider)}}; }) &&
         is_refused("before", "blocks 2 to 3 of a span from 3 to 5", run(2, 1, 1)) &&
         is_refused("beyond", "blocks 4 to 6 of a span from 3 to 5", run(4, 2, 1)) &&
         is_refused("none", "blocks 3 to 3", run(3, 0, 1)) && is_refused("no rows", "num_rows = 0", run(3, 1, 0));
}

}  // namespace

int main() {
  const BlockShape shapes[] = {{40, 6, 2, 10, 37, 0, 1e-5f}, {64, 4, 4, 16, 100, 3, 1e-5f}, {24, 8, 1, 6, 20, 0, 1e-5f},
                               {96, 4, 2, 72, 64, 0, 1e-5f}};
  if (!tiers_are_guarded() || !spans_are_guarded(shapes[0])) return EXIT_FAILURE;
  const std::vector<std::string> tiers = {"baseline", "avx2", "avx512", "avx512bf16"};
  const std::string fastest = petalsd::choose_tier("auto", DType::kBFloat16).name;
  for (const std::string& tier : tiers) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const BlockShape& shape : shapes) {
        if (!is_the_same_on_any_team({shape, dtype, tier})) return EXIT_FAILURE;
      }
    }
    std::printf("decode steps are the same on any team: %s\n", tier.c_str());
    if (tier == fastest) break;  // the tiers are in ascending order
  }
  return EXIT_SUCCESS;
}
