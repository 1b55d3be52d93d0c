#include <algorithm>
#include <cstddef>
#include <utility>

#include "check.hpp"
#include "lanes.hpp"
#include "layer_team.hpp"
#include "packed_linear.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kMaxFloats = 8 << 20;  // between the products: more tokens go in turns

std::int64_t aligned(std::int64_t bytes) { return round_up(bytes, 64); }

}  // namespace

GatedExperts::GatedExperts(std::vector<PackedWeight> gate_up, std::vector<PackedWeight> down, ExpertBiases biases,
                           ExpertGate gate)
    : gate_up_(std::move(gate_up)), down_(std::move(down)), biases_(biases), gate_(gate) {
  PETALSD_CHECK(!gate_up_.empty() && gate_up_.size() == down_.size(), gate_up_.size(), " gates for ", down_.size(),
                " experts");
  const std::int64_t hidden = hidden_size();
  const std::int64_t inner = inner_size();
  for (std::size_t e = 0; e < down_.size(); ++e) {
    const bool fits = gate_up_[e].num_out == 2 * inner && gate_up_[e].num_in == hidden && down_[e].num_out == hidden &&
                      down_[e].num_in == inner && gate_up_[e].format == gate_up_[0].format &&
                      down_[e].format == down_[0].format;
    PETALSD_CHECK(fits, "expert ", e, ": [", gate_up_[e].num_out, ", ", gate_up_[e].num_in, "] and [",
                  down_[e].num_out, ", ", down_[e].num_in, "], not as the others");
  }
}

// The pairs of token and expert of some tokens, by expert: those of an expert lie together.
struct LayerTeam::ExpertRows {
  struct Group {
    std::int64_t expert;
    std::int64_t start;
    std::int64_t count;
  };

  std::vector<Group> groups;
  std::vector<std::int64_t> tokens;  // of each place
  std::vector<std::int64_t> places;  // of each pair, in the order of the routes

  ExpertRows(const Routes& routes, std::int64_t first_token, std::int64_t num_tokens, std::int64_t num_experts) {
    const std::int64_t* chosen = routes.experts + first_token * routes.per_token;
    const std::int64_t num_pairs = num_tokens * routes.per_token;
    std::vector<std::int64_t> next(static_cast<std::size_t>(num_experts) + 1);
    for (std::int64_t i = 0; i < num_pairs; ++i) {
      PETALSD_CHECK(0 <= chosen[i] && chosen[i] < num_experts, "expert ", chosen[i], " of ", num_experts);
      ++next[static_cast<std::size_t>(chosen[i]) + 1];
    }
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const auto at = static_cast<std::size_t>(e);
      if (next[at + 1] > 0) groups.push_back({e, next[at], next[at + 1]});
      next[at + 1] += next[at];
    }
    tokens.resize(static_cast<std::size_t>(num_pairs));
    for (std::int64_t i = 0; i < num_pairs; ++i) {
      places.push_back(next[static_cast<std::size_t>(chosen[i])]++);
      tokens[static_cast<std::size_t>(places.back())] = first_token + i / routes.per_token;
    }
  }
};

// One projection of all experts.
struct LayerTeam::ExpertProducts {
  const std::vector<PackedWeight>& weights;
  const float* biases;  // [E, num_out], or null
  const LinearKernels& kernels;
  std::int64_t stride;  // of operands

  const float* bias(std::int64_t expert) const {
    return biases == nullptr ? nullptr : biases + expert * weights.front().num_out;
  }
};

// One product for each group, all at once: shared out by tiles.
void LayerTeam::multiply_groups(const ExpertProducts& products, const ExpertRows& rows, const char* in, float* out) {
  const PackedWeight& any = products.weights.front();
  const std::int64_t per_group = (any.num_tiles() + kTilesPerChunk - 1) / kTilesPerChunk;
  const std::int64_t num_chunks = per_group * static_cast<std::int64_t>(rows.groups.size());
  const Lanes lanes(num_chunks, team_);
  team_.run(num_chunks, [&](std::int64_t claim) {
    const std::int64_t chunk = lanes.at(claim);
    const ExpertRows::Group& group = rows.groups[static_cast<std::size_t>(chunk / per_group)];
    const LinearTask task{products.weights[static_cast<std::size_t>(group.expert)],
                          products.bias(group.expert),
                          in + group.start * products.stride,
                          products.stride,
                          nullptr,
                          out + group.start * any.num_out,
                          group.count};
    const std::int64_t first = chunk % per_group * kTilesPerChunk;
    products.kernels.multiply(task, first, std::min(first + kTilesPerChunk, any.num_tiles()));
  });
}

LayerTeam::ExpertProducts LayerTeam::products(const std::vector<PackedWeight>& weights, const float* biases,
                                              bool is_wide) const {
  const LinearKernels& kernels = linear(weights.front(), is_wide);
  return {weights, biases, kernels, operand_stride(kernels.operand_bytes(weights.front().num_in))};
}

// Of a gate and the up behind it, over the gate.
void LayerTeam::activate(const ExpertGate& how, float* gate, std::int64_t inner) const {
  if (how.is_clamped) {
    tier_.kernels.clamped_swish_mul(gate, gate + inner, how.limit, how.alpha, gate, inner);
  } else {
    tier_.kernels.silu_mul(gate, gate + inner, gate, inner);
  }
}

void LayerTeam::run_experts(const GatedExperts& experts, const Routes& routes, const float* in, float* out,
                            bool is_wide) {
  PETALSD_CHECK(routes.num_tokens > 0 && routes.per_token > 0, routes.num_tokens, " tokens of ", routes.per_token,
                " experts each");
  const std::int64_t hidden = experts.hidden_size();
  const std::int64_t inner = experts.inner_size();
  const ExpertProducts first = products(experts.gate_up(), experts.biases().gate_up, is_wide);
  const ExpertProducts second = products(experts.down(), experts.biases().down, is_wide);
  const std::int64_t pair_floats = routes.per_token * (2 * inner + hidden);
  const std::int64_t at_once = std::clamp<std::int64_t>(kMaxFloats / pair_floats, 32, 512);
  const std::int64_t most = std::min(at_once, routes.num_tokens) * routes.per_token;
  // Kernels may read operands of a whole tile of rows.
  const std::int64_t operand_bytes = aligned((most + kTileRows) * std::max(first.stride, second.stride));
  const std::int64_t gate_bytes = aligned(most * 2 * inner * 4);
  const std::lock_guard lock(mutex_);
  const ThreadTeam::Shift shift(team_);
  reserve(operand_bytes + gate_bytes + most * hidden * 4);
  char* const operands = operands_.get();
  auto* const gates = reinterpret_cast<float*>(operands + operand_bytes);
  auto* const states = reinterpret_cast<float*>(operands + operand_bytes + gate_bytes);
  for (std::int64_t token = 0; token < routes.num_tokens; token += at_once) {
    const std::int64_t count = std::min(at_once, routes.num_tokens - token);
    const std::int64_t num_pairs = count * routes.per_token;
    const ExpertRows rows(routes, token, count, experts.count());
    team_.run(num_pairs, [&](std::int64_t place) {
      const float* state = in + rows.tokens[static_cast<std::size_t>(place)] * hidden;
      first.kernels.prepare(state, operands + place * first.stride, hidden);
    });
    multiply_groups(first, rows, operands, gates);
    team_.run(num_pairs, [&](std::int64_t place) {
      float* gate = gates + place * 2 * inner;
      activate(experts.gate(), gate, inner);
      second.kernels.prepare(gate, operands + place * second.stride, inner);
    });
    multiply_groups(second, rows, operands, states);
    team_.run(count, [&](std::int64_t i) {
      float* sum = out + (token + i) * hidden;
      std::fill_n(sum, hidden, 0.0f);
      for (std::int64_t j = i * routes.per_token; j < (i + 1) * routes.per_token; ++j) {
        const float share = routes.shares[token * routes.per_token + j];
        const float* state = states + rows.places[static_cast<std::size_t>(j)] * hidden;
        for (std::int64_t d = 0; d < hidden; ++d) sum[d] += share * state[d];
      }
    });
  }
}

}  // namespace petalsd
