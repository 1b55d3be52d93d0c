// One transformer block for a decode step, where every row has one new token: no tensors, no allocations.
#pragma once

#include <cstdint>

#include "decode_tiers.hpp"
#include "decode_workspace.hpp"
#include "thread_team.hpp"

namespace petalsd {

// The caller's memory, of the block's dtype, row-major, alive as long as the block; null where there is none.
// qkv `[(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]`, gate_up `[2 * intermediate_size, hidden_size]`.
struct BlockPointers {
  const void* input_norm;
  const void* qkv;
  const void* qkv_bias;
  const void* q_norm;
  const void* k_norm;
  const void* output;
  const void* output_bias;
  const void* mlp_norm;
  const void* gate_up;
  const void* gate_up_bias;
  const void* down;
  const void* down_bias;
};

// R rows with one new token each. hidden and out `[R, hidden_size]`, cos and sin `[R, head_dim]`, k and v
// `[pages, page_tokens, num_kv_heads, head_dim]` in the block's dtype; row r writes its keys and values at
// positions[r] and sees what lies before, in the pages that AttentionTask describes.
struct DecodeRows {
  std::int64_t num_rows;
  const void* hidden;
  void* out;
  const void* cos;
  const void* sin;
  void* k;
  void* v;
  std::int64_t page_tokens;
  const std::int32_t* origins;
  std::int64_t origins_stride;
  const std::int64_t* positions;
};

// Computes what the block's torch path computes, with float32 between the operations, where torch rounds to smaller
// dtypes. Pre-norm attention with rotary positions, then a SiLU-gated MLP.
class DecodeBlock {
 public:
  // `index` of the block is what is added to origins. Throws PoolError for a shape that it cannot compute.
  DecodeBlock(std::int64_t index, const BlockShape& shape, const BlockPointers& weights, DType dtype, Tier tier);

  std::int64_t index() const { return index_; }
  const BlockShape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  const Tier& tier() const { return tier_; }

  // Takes work.hidden through the block. `work` has room for the rows, and this block's shape and kernels.
  void run(const DecodeRows& rows, const DecodeWorkspace& work, ThreadTeam& team) const;

 private:
  void norm(const DecodeWorkspace& work, const void* weight, std::int64_t num_rows, ThreadTeam& team) const;
  void project(const LinearTask& task, ThreadTeam& team) const;
  void gate(const DecodeWorkspace& work, std::int64_t num_rows, ThreadTeam& team) const;
  void place_heads(const DecodeRows& rows, std::int64_t row, float* qkv) const;
  AttentionTask attention(const DecodeRows& rows, const DecodeWorkspace& work) const;

  const std::int64_t index_;
  const BlockShape shape_;
  const BlockPointers weights_;
  const DType dtype_;
  const Tier tier_;
};

}  // namespace petalsd
