// One transformer block for a step over pages: no tensors, no allocations.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_weight.hpp"
#include "span_workspace.hpp"
#include "thread_team.hpp"
#include "tiers.hpp"

namespace petalsd {

// The caller's memory, alive as long as the block. qkv is `[(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]`,
// output `[hidden_size, num_heads * head_dim]`, gate_up `[2 * intermediate_size, hidden_size]`, down `[hidden_size,
// intermediate_size]`.
struct BlockMatrices {
  PackedWeight qkv;
  PackedWeight output;
  PackedWeight gate_up;
  PackedWeight down;
};

// Copies of the block's own. Empty where there is none.
struct BlockVectors {
  std::vector<float> input_norm;
  std::vector<float> mlp_norm;
  std::vector<float> q_norm;
  std::vector<float> k_norm;
  std::vector<float> qkv_bias;
  std::vector<float> output_bias;
  std::vector<float> gate_up_bias;
  std::vector<float> down_bias;
};

// What a step brings and where it belongs. hidden and out `[R, hidden_size]`, cos and sin `[R, head_dim]`, all of `dtype`.
struct StepRows : Sequences {
  DType dtype;
  const void* hidden;
  void* out;
  const void* cos;
  const void* sin;
  KVPages kv;
};

// Computes what the block's torch path computes, with float32 between the operations, where torch rounds to smaller
// dtypes. Pre-norm attention with rotary positions, then a SiLU-gated MLP.
class SpanBlock {
 public:
  // `index` of the block is what is added to origins. Throws PoolError for a shape that it cannot compute.
  SpanBlock(std::int64_t index, const BlockShape& shape, const BlockMatrices& matrices, BlockVectors vectors, Tier tier);

  std::int64_t index() const { return index_; }
  const BlockShape& shape() const { return shape_; }
  const BlockMatrices& matrices() const { return matrices_; }
  const Tier& tier() const { return tier_; }

  // Takes work.hidden, the states of work.num_rows rows from work.first_row on, through the block. Their keys and values
  // are written before anything is attended to.
  void run(const StepRows& rows, const SpanWorkspace& work, ThreadTeam& team) const;

 private:
  using Values = std::vector<float>;

  void norm(const SpanWorkspace& work, const Values& weight, const PackedWeight& next, ThreadTeam& team) const;
  void project(const SpanWorkspace& work, const PackedWeight& weight, const Values& bias, const float* residual,
               float* out, ThreadTeam& team) const;
  void place(const StepRows& rows, const SpanWorkspace& work, const QueryRows& query) const;
  AttentionTask attention_task(const StepRows& rows, const SpanWorkspace& work) const;
  void attend(const StepRows& rows, const SpanWorkspace& work, ThreadTeam& team) const;
  void gate(const SpanWorkspace& work, ThreadTeam& team) const;
  const LinearKernels& linear(const PackedWeight& weight) const;

  const std::int64_t index_;
  const BlockShape shape_;
  const BlockMatrices matrices_;
  const BlockVectors vectors_;
  const Tier tier_;
};

}  // namespace petalsd
