// Products, norms, attention and experts by themselves, for blocks that are not computed as a whole.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "attention_plan.hpp"
#include "thread_team.hpp"
#include "tiers.hpp"

namespace petalsd {

// One block's attention for R new tokens, float32 all: q and out `[R, num_heads, D]`, k and v `[R, Hkv, D]`, rotated where
// the model does that.
struct LayerAttention {
  std::int64_t block;  // what is added to origins
  std::int64_t num_heads;
  std::int64_t window;  // 0: none
  float scale;
  ScoreRule rule;
  const float* q;
  const float* k;
  const float* v;
  float* out;
};

// What the gate and the up of an expert become: SiLU(gate) * up, or as `Kernels::clamped_swish_mul` has it.
struct ExpertGate {
  bool is_clamped = false;
  float limit = 0.0f;
  float alpha = 0.0f;
};

// What is added to the products of each of E experts, or null.
struct ExpertBiases {
  const float* gate_up = nullptr;  // [E, 2 * inner]
  const float* down = nullptr;     // [E, hidden]
};

// Gated experts of one block: gate_up `[2 * inner, hidden]`, gate above up, and down `[hidden, inner]` of each, all
// in one format. The caller's memory.
class GatedExperts {
 public:
  // PoolError unless there is one of both for each, and their sizes fit.
  GatedExperts(std::vector<PackedWeight> gate_up, std::vector<PackedWeight> down, ExpertBiases biases = {},
               ExpertGate gate = {});

  std::int64_t count() const { return static_cast<std::int64_t>(gate_up_.size()); }
  std::int64_t hidden_size() const { return gate_up_.front().num_in; }
  std::int64_t inner_size() const { return down_.front().num_in; }
  const std::vector<PackedWeight>& gate_up() const { return gate_up_; }
  const std::vector<PackedWeight>& down() const { return down_; }
  const ExpertBiases& biases() const { return biases_; }
  const ExpertGate& gate() const { return gate_; }

 private:
  std::vector<PackedWeight> gate_up_;
  std::vector<PackedWeight> down_;
  ExpertBiases biases_;
  ExpertGate gate_;
};

// What goes through a part of a layer, and what comes of it: `[R, width]` each, in one dtype.
struct LayerRows {
  const void* in;
  void* out;
  std::int64_t num_rows;
  DType dtype;

  bool is_wide() const { return dtype == DType::kFloat32; }
  std::int64_t value_bytes() const { return dtype == DType::kBFloat16 ? 2 : 4; }
};

// A root-mean-square norm over rows of `width`; weight is float32. What is added to the weight is in it.
struct RowNorm {
  const float* weight;
  std::int64_t width;
  float eps;
};

// Which experts T tokens go to, and with what share: `[T, per_token]` both.
struct Routes {
  const std::int64_t* experts;
  const float* shares;
  std::int64_t num_tokens;
  std::int64_t per_token;
};

// What many layers share: the threads, and memory to work in. May be called from any thread; a call waits for one that is
// running.
class LayerTeam {
 public:
  // `num_threads` counts the caller.
  LayerTeam(int num_threads, Tier tier) : team_(num_threads), tier_(tier) {}

  const Tier& tier() const { return tier_; }

  // out[r, n] = sum_k in[r, k] * weight[n, k] + bias[n], or 0 where bias is null, computed in float32 and rounded once.
  // Rows of float32 are not rounded beside bfloat16 weights, which is slower for many rows.
  void multiply(const PackedWeight& weight, const float* bias, const LayerRows& rows);

  // out[t] = the sum of share * expert(in[t]) over the experts of token t, in their order; in and out `[T, hidden_size]`
  // are float32. All chosen experts are computed side by side, each for its tokens together. PoolError for an expert
  // that is none.
  void run_experts(const GatedExperts& experts, const Routes& routes, const float* in, float* out, bool is_wide);

  // out[r] = weight * in[r] / sqrt(mean(in[r]^2) + eps), computed in float32 and rounded once.
  void normalize(const RowNorm& norm, const LayerRows& rows);

  // Writes keys and values to their places in the pages, and attends to all that each token sees. PoolError for pages or
  // heads that do not fit.
  void attend(const Sequences& sequences, const KVPages& kv, const LayerAttention& layer);

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };

  struct ExpertRows;
  struct ExpertProducts;

  const LinearKernels& linear(const PackedWeight& weight, bool is_wide) const;
  void reserve(std::int64_t bytes);
  void multiply_part(const PackedWeight& weight, const float* bias, const LayerRows& rows, std::int64_t stride);
  ExpertProducts products(const std::vector<PackedWeight>& weights, const float* biases, bool is_wide) const;
  void activate(const ExpertGate& how, float* gate, std::int64_t inner) const;
  void multiply_groups(const ExpertProducts& products, const ExpertRows& rows, const char* in, float* out);
  void place(const KVPages& kv, const LayerAttention& layer, std::int64_t first_row, std::int64_t query_bytes);

  std::mutex mutex_;
  ThreadTeam team_;
  const Tier tier_;
  AttentionPlan plan_;
  std::unique_ptr<char, Free> operands_;  // or queries, as the kernels read them
  std::int64_t operands_bytes_ = 0;
};

}  // namespace petalsd
