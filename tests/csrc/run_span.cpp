// Steps of random blocks on teams of several sizes, in every tier and format, for the sanitizers: buffers are exactly as
// long as the contract says, and every team must give the same bits as one thread. Then what must be refused.
//
//     run_span all|pairs     every shape in every format and tier, or each pair of the three once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "layer_team.hpp"
#include "random_blocks.hpp"
#include "span.hpp"
#include "weight_storage.hpp"

namespace {

using petalsd::BlockMatrices;
using petalsd::BlockShape;
using petalsd::BlockVectors;
using petalsd::DType;
using petalsd::KVPages;
using petalsd::KVType;
using petalsd::PackedWeight;
using petalsd::Processor;
using petalsd::SpanBlock;
using petalsd::StepRows;
using petalsd::WeightFormat;

std::vector<std::shared_ptr<const SpanBlock>> make_blocks(Random& random, const Case& at_hand,
                                                         std::vector<OwnedWeight>& weights) {
  const BlockShape& shape = at_hand.shape;
  const std::int64_t m = shape.hidden_size, i = shape.intermediate_size, d = shape.head_dim;
  const std::int64_t sizes[][2] = {{shape.qkv_size(), m}, {m, shape.attended_size()}, {2 * i, m}, {m, i}};
  for (const auto& size : sizes) weights.emplace_back(random, at_hand.format, size[0], size[1]);
  const BlockMatrices matrices{weights[0].weight, weights[1].weight, weights[2].weight, weights[3].weight};
  const BlockVectors vectors{random.floats(m),     random.floats(m), random.floats(d),     random.floats(d),
                             random.floats(shape.qkv_size()), random.floats(m), random.floats(2 * i), random.floats(m)};
  std::vector<std::shared_ptr<const SpanBlock>> blocks;
  for (std::int64_t index = 1; index <= kNumBlocks; ++index) {
    blocks.push_back(
        std::make_shared<SpanBlock>(index, shape, matrices, vectors, petalsd::choose_tier(at_hand.tier)));
  }
  return blocks;
}

// The span's answers and what it wrote into the pages. Sequences bring 1, 5, 1 and 2 tokens.
std::vector<Buffer> compute(const Case& at_hand, int num_threads, int num_steps) {
  Random random;
  const BlockShape& shape = at_hand.shape;
  const bool is_bfloat16 = at_hand.dtype() == DType::kBFloat16;
  std::vector<OwnedWeight> weights;
  petalsd::Span span(make_blocks(random, at_hand, weights));
  petalsd::ThreadTeam team(num_threads);
  const std::vector<std::int64_t> bounds = {0, 1, 6, 7, 9};
  const std::int64_t num_rows = bounds.back();
  const auto num_sequences = static_cast<std::int64_t>(bounds.size()) - 1;
  Pages pages(random, at_hand, 1 + num_sequences * at_hand.num_runs() * kNumBlocks);
  std::vector<std::int32_t> origins;
  for (std::int64_t run = 0; run < num_sequences * at_hand.num_runs(); ++run) {
    origins.push_back(static_cast<std::int32_t>(run * kNumBlocks));
  }
  const Buffer cos = random.values(num_rows * shape.head_dim, is_bfloat16);
  const Buffer sin = random.values(num_rows * shape.head_dim, is_bfloat16);
  const Buffer hidden = random.values(num_rows * shape.hidden_size, is_bfloat16);
  std::vector<Buffer> answers;
  for (int step = 0; step < num_steps; ++step) {
    std::vector<std::int64_t> positions;
    for (std::int64_t s = 0; s < num_sequences; ++s) {
      const std::int64_t history = s == 0 ? at_hand.history : 0;
      for (std::int64_t row = bounds[static_cast<std::size_t>(s)]; row < bounds[static_cast<std::size_t>(s) + 1]; ++row) {
        positions.push_back(history + (step * 11 + s * 14) % (kPageTokens * kNumRuns - 5) + row - bounds[static_cast<std::size_t>(s)]);
      }
    }
    answers.emplace_back(static_cast<std::int64_t>(hidden.size()));
    const StepRows rows{{bounds, positions.data(), origins.data(), at_hand.num_runs()},
                        at_hand.dtype(), hidden.data(), answers.back().data(), cos.data(), sin.data(), pages.kv};
    // Now the whole span, now its second block alone.
    span.run(rows, 1 + step % 2, kNumBlocks - step % 2, team);
  }
  for (Buffer& slab : pages.slabs) answers.push_back(std::move(slab));
  return answers;
}

bool is_the_same_on_any_team(const Case& at_hand) {
  // The emulated tiles are slow, and only their products are their own, which depend on no position: what does is
  // that of the widest registers.
  const int num_steps = at_hand.history == 0 && at_hand.tier != kEmulated ? 12 : 2;
  const auto expected = compute(at_hand, 1, num_steps);
  for (const int num_threads : {2, 4}) {
    if (compute(at_hand, num_threads, num_steps) == expected) continue;
    std::fprintf(stderr, "%s: %d threads give other bits than one\n", at_hand.tier.c_str(), num_threads);
    return false;
  }
  return true;
}

// A product by itself, and a norm of what it gives, with more rows than are taken at once, for two callers at the same
// time.
bool is_a_layer_the_same_on_any_team(WeightFormat format, const std::string& tier, DType dtype) {
  Random random;
  constexpr std::int64_t num_out = 370, num_in = 70, num_rows = 131;
  const OwnedWeight weight(random, format, num_out, num_in);
  const std::vector<float> bias = random.floats(num_out);
  const Buffer in = random.values(num_rows * num_in, dtype == DType::kBFloat16);
  const std::int64_t size = num_rows * num_out * (dtype == DType::kBFloat16 ? 2 : 4);
  std::vector<Buffer> products, norms;
  for (int i = 0; i < 4; ++i) {
    products.emplace_back(size);
    norms.emplace_back(size);
  }
  for (std::size_t i = 0; i < norms.size(); i += 2) {
    petalsd::LayerTeam team(i == 0 ? 1 : 3, petalsd::choose_tier(tier));
    const auto call = [&](std::size_t at) {
      team.multiply(weight.weight, bias.data(), {in.data(), products[at].data(), num_rows, dtype});
      team.normalize({bias.data(), num_out, 1e-5f}, {products[at].data(), norms[at].data(), num_rows, dtype});
    };
    std::thread other([&] { call(i); });
    call(i + 1);
    other.join();
  }
  if (std::all_of(norms.begin(), norms.end(), [&](const Buffer& out) { return out == norms[0]; })) return true;
  std::fprintf(stderr, "%s: three threads, or two callers, give other bits than one\n", tier.c_str());
  return false;
}

// Attention by itself, with more rows than it takes at once and a context in parts, by the rule with everything in it.
bool is_attention_the_same_on_any_team(KVType kv, const std::string& tier) {
  Random random;
  Case at_hand{{}, WeightFormat::kFloat32, kv, tier, kLongHistory};
  at_hand.shape.num_heads = 6;
  at_hand.shape.num_kv_heads = 2;
  at_hand.shape.head_dim = 10;
  constexpr std::int64_t num_rows = 131, block = 1;
  const std::int64_t num_runs = at_hand.num_runs() + num_rows / kPageTokens;
  std::vector<std::int32_t> origins;
  for (std::int64_t run = 0; run < num_runs; ++run) origins.push_back(static_cast<std::int32_t>(run * kNumBlocks));
  std::vector<std::int64_t> positions;
  for (std::int64_t row = 0; row < num_rows; ++row) positions.push_back(kLongHistory + row);
  const petalsd::Sequences sequences{{0, num_rows}, positions.data(), origins.data(), num_runs};
  const std::vector<float> slopes = random.floats(6), sinks = random.floats(6);
  const Buffer q = random.values(num_rows * 60, false), k = random.values(num_rows * 20, false);
  const auto values = [](const Buffer& buffer) { return reinterpret_cast<const float*>(buffer.data()); };
  for (const bool rounds_biases : {false, true}) {
    std::vector<Buffer> outs;
    for (const int num_threads : {1, 3}) {
      Random same;
      const Pages pages(same, at_hand, 1 + num_runs * kNumBlocks);
      outs.emplace_back(num_rows * 60 * 4);
      petalsd::LayerTeam team(num_threads, petalsd::choose_tier(tier));
      team.attend(sequences, pages.kv, {block, 6, 0, 0.3f, {2.0f, slopes.data(), 0.5f, rounds_biases, sinks.data()},
                                        values(q), values(k), values(k), reinterpret_cast<float*>(outs.back().data())});
    }
    if (outs[0] == outs[1]) continue;
    std::fprintf(stderr, "%s: attention of three threads gives other bits than of one\n", tier.c_str());
    return false;
  }
  return true;
}

// Experts of which some get no token and one gets most, with more tokens than go at once.
bool are_experts_the_same_on_any_team(WeightFormat format, const std::string& tier, bool is_clamped) {
  Random random;
  constexpr std::int64_t hidden = 70, inner = 37, per_token = 2, num_tokens = 600;
  std::vector<OwnedWeight> owned;
  std::vector<PackedWeight> gate_up, down;
  for (int expert = 0; expert < 4; ++expert) {
    owned.emplace_back(random, format, 2 * inner, hidden);
    gate_up.push_back(owned.back().weight);
    owned.emplace_back(random, format, hidden, inner);
    down.push_back(owned.back().weight);
  }
  const Buffer first = random.values(4 * 2 * inner, false), second = random.values(4 * hidden, false);
  petalsd::ExpertBiases biases;
  if (is_clamped) biases = {reinterpret_cast<const float*>(first.data()), reinterpret_cast<const float*>(second.data())};
  const petalsd::GatedExperts experts(gate_up, down, biases, {is_clamped, 0.2f, 1.702f});
  std::vector<std::int64_t> chosen;
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    chosen.push_back(token % 9 == 0 ? 0 : 3);
    chosen.push_back(1);
  }
  const Buffer shares = random.values(num_tokens * per_token, false), in = random.values(num_tokens * hidden, false);
  const petalsd::Routes routes{chosen.data(), reinterpret_cast<const float*>(shares.data()), num_tokens, per_token};
  std::vector<Buffer> outs;
  for (const int num_threads : {1, 3}) {
    outs.emplace_back(num_tokens * hidden * 4);
    petalsd::LayerTeam team(num_threads, petalsd::choose_tier(tier));
    team.run_experts(experts, routes, reinterpret_cast<const float*>(in.data()),
                     reinterpret_cast<float*>(outs.back().data()), false);
  }
  if (outs[0] == outs[1]) return true;
  std::fprintf(stderr, "%s: experts of three threads give other bits than of one\n", tier.c_str());
  return false;
}

// A weight in three parts, of each dtype, into memory that is exactly as long as it must be, and out of it.
bool packs_as_the_baseline_does(WeightFormat format, const std::string& tier) {
  Random random;
  constexpr std::int64_t num_in = 790, counts[] = {507, 300, 300}, num_out = 1107;
  const Buffer wide = random.values(counts[0] * num_in, false), narrow = random.values(counts[1] * num_in, true),
               half = random.values(counts[2] * num_in, true);  // they are numbers of float16 as well
  const std::vector<petalsd::WeightRows> rows = {{wide.data(), petalsd::Element::kFloat32, num_in, counts[0]},
                                                 {narrow.data(), petalsd::Element::kBFloat16, num_in, counts[1]},
                                                 {half.data(), petalsd::Element::kFloat16, num_in, counts[2]}};
  const std::int64_t row = format == WeightFormat::kFloat32 ? num_in : format == WeightFormat::kBFloat16 ? 800 : 832;
  std::vector<Buffer> outs;
  for (const std::string& name : {std::string("baseline"), tier}) {
    const OwnedWeight packed(random, format, num_out, num_in);
    petalsd::pack_weight(rows, packed.weight, petalsd::choose_tier(name).kernels);
    for (const int num_threads : {1, 3}) {
      outs.emplace_back(packed.weight.num_tiles() * petalsd::kTileOuts * row * 4);
      petalsd::unpack_weight(packed.weight, DType::kFloat32, outs.back().data(), num_threads);
    }
    const Buffer in_bfloat16(packed.weight.num_tiles() * petalsd::kTileOuts * row * 2);
    petalsd::unpack_weight(packed.weight, DType::kBFloat16, in_bfloat16.data(), 3);
  }
  if (std::all_of(outs.begin(), outs.end(), [&](const Buffer& out) { return out == outs[0]; })) return true;
  std::fprintf(stderr, "%s: packs weights otherwise than the baseline, or unpacks otherwise on three threads\n", tier.c_str());
  return false;
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
  const Processor none{false, false, false, false, false}, old{true, false, false, false, false},
      first{true, true, false, false, false}, recent{true, true, true, false, false}, newer{true, true, true, true, false};
  const auto name = [](const Processor& processor) { return std::string(choose_tier("auto", processor).name); };
  if (name(none) != "baseline" || name(old) != "avx2" || name(first) != "avx512" || name(recent) != "avx512vnni") {
    std::fputs("another tier was chosen than the best one that the processor has\n", stderr);
    return false;
  }
  const auto forced = [](const char* tier, const Processor& processor) { return [=] { choose_tier(tier, processor); }; };
  return is_refused("avx2", "tier = avx2: this processor has no AVX2", forced("avx2", none)) &&
         is_refused("avx512", "tier = avx512: this processor has no AVX-512", forced("avx512", old)) &&
         is_refused("avx512vnni", "has no AVX-512 with VNNI", forced("avx512vnni", first)) &&
         is_refused("avx512bf16", "has no AVX-512 with BF16", forced("avx512bf16", recent)) &&
         is_refused("amx", "tier = amx: this processor has no AMX", forced("amx", newer)) &&
         is_refused("sse9", "tier = sse9: one of auto", forced("sse9", recent));
}

bool spans_are_guarded(const Case& at_hand) {
  Random random;
  std::vector<OwnedWeight> weights;
  const auto blocks = make_blocks(random, at_hand, weights);
  petalsd::Span span(blocks);
  petalsd::ThreadTeam team(1);
  const auto run = [&](std::int64_t first, std::int64_t count, std::int64_t num_rows, std::int64_t page_tokens) {
    return [&span, &team, &at_hand, first, count, num_rows, page_tokens] {
      StepRows rows{};
      rows.bounds = {0, num_rows};
      rows.kv = {at_hand.kv, nullptr, nullptr, nullptr, nullptr, page_tokens, 1, 2};
      span.run(rows, first, count, team);
    };
  };
  BlockMatrices swapped = blocks[0]->matrices();
  std::swap(swapped.output, swapped.down);
  return is_refused("no blocks", "at least one", [] { petalsd::Span{{}}; }) &&
         is_refused("a gap", "in order", [&] { petalsd::Span{{blocks[1], blocks[0]}}; }) &&
         is_refused("a matrix", "output: [", [&] {
           SpanBlock(1, at_hand.shape, swapped, BlockVectors{}, petalsd::choose_tier("baseline"));
         }) &&
         is_refused("a vector", "input_norm: 0 values", [&] {
           SpanBlock(1, at_hand.shape, blocks[0]->matrices(), BlockVectors{}, petalsd::choose_tier("baseline"));
         }) &&
         is_refused("before", "blocks 0 to 1 of a span from 1 to 3", run(0, 1, 1, 16)) &&
         is_refused("beyond", "blocks 2 to 4 of a span from 1 to 3", run(2, 2, 1, 16)) &&
         is_refused("none", "blocks 1 to 1", run(1, 0, 1, 16)) && is_refused("no rows", "num_rows = 0", run(1, 1, 0, 16)) &&
         is_refused("bounds", "bounds ascend", run(1, 1, -1, 16)) &&
         is_refused("pages", "page_tokens = 8", run(1, 1, 1, 8)) &&
         is_refused("heads", "pages of 1 heads of 2", run(1, 1, 1, 16));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 2 ? argv[1] : "";
  if (mode != "all" && mode != "pairs") {
    std::fprintf(stderr, "usage: run_span all|pairs\n");
    return 2;
  }
  constexpr std::size_t kNumShapes = 4;
  const BlockShape shapes[kNumShapes] = {{40, 6, 2, 10, 37, 0, 1e-5f}, {64, 4, 4, 16, 100, 3, 1e-5f},
                                         {24, 8, 1, 6, 20, 0, 1e-5f}, {96, 28, 1, 72, 64, 0, 1e-5f}};
  const Case formats[] = {{{}, WeightFormat::kFloat32, KVType::kFloat32, ""},
                          {{}, WeightFormat::kBFloat16, KVType::kBFloat16, ""},
                          {{}, WeightFormat::kInt8, KVType::kInt8, ""},
                          {{}, WeightFormat::kInt4, KVType::kFloat32, ""}};
  if (!tiers_are_guarded() || !spans_are_guarded({shapes[0], WeightFormat::kFloat32, KVType::kFloat32, "baseline"})) {
    return EXIT_FAILURE;
  }
  std::vector<std::string> tiers = {"baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};
  const std::string fastest = petalsd::choose_tier("auto").name;
  if (fastest == "avx512bf16" || fastest == "amx") tiers.insert(tiers.begin(), kEmulated);
  std::size_t turn = 0;  // with each format and each tier another shape begins
  for (const std::string& tier : tiers) {
    for (const Case& format : formats) {
      if (!packs_as_the_baseline_does(format.format, tier)) return EXIT_FAILURE;
      for (std::size_t i = 0; i < (mode == "all" ? kNumShapes : 1); ++i) {
        if (!is_the_same_on_any_team({shapes[(turn + i) % kNumShapes], format.format, format.kv, tier})) return EXIT_FAILURE;
      }
      ++turn;
      // In parts, where there are many threads.
      if (!is_the_same_on_any_team({shapes[2], format.format, format.kv, tier, kLongHistory})) return EXIT_FAILURE;
      if (tier != kEmulated && !is_attention_the_same_on_any_team(format.kv, tier)) return EXIT_FAILURE;
      for (const bool is_clamped : {false, true}) {
        if (tier == kEmulated) continue;
        if (!are_experts_the_same_on_any_team(format.format, tier, is_clamped)) return EXIT_FAILURE;
      }
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        if (!is_a_layer_the_same_on_any_team(format.format, tier, dtype)) return EXIT_FAILURE;
      }
    }
    ++turn;
    std::printf("steps are the same on any team: %s\n", tier.c_str());
    if (tier == fastest) break;  // they are in ascending order
  }
  return EXIT_SUCCESS;
}
