#include "decode_block.hpp"

#include <algorithm>
#include <cmath>

#include "check.hpp"

namespace petalsd {

namespace {

// Work that a team's threads claim in turn, ordered so that each gets neighbours one after the other: what a kernel
// asks the memory for is what comes next in its own thread.
class Lanes {
 public:
  Lanes(std::int64_t count, const ThreadTeam& team)
      : count_(count), num_lanes_(std::min<std::int64_t>(team.num_threads(), count)) {}

  std::int64_t at(std::int64_t claim) const {
    const std::int64_t lane = claim % num_lanes_;
    const std::int64_t longer_lanes = std::min(lane, count_ % num_lanes_);
    return lane * (count_ / num_lanes_) + longer_lanes + claim / num_lanes_;
  }

 private:
  const std::int64_t count_;
  const std::int64_t num_lanes_;
};

std::int64_t num_chunks(std::int64_t num_out) { return (num_out + kOutsPerChunk - 1) / kOutsPerChunk; }

}  // namespace

DecodeBlock::DecodeBlock(std::int64_t index, const BlockShape& shape, const BlockPointers& weights, DType dtype,
                         Tier tier)
    : index_(index), shape_(shape), weights_(weights), dtype_(dtype), tier_(tier) {
  PETALSD_CHECK(shape.hidden_size > 0 && shape.intermediate_size > 0 && shape.num_kv_heads > 0 && shape.window >= 0,
                "a block has hidden and intermediate sizes, KV heads, and no negative window");
  PETALSD_CHECK(shape.head_dim > 0 && shape.head_dim <= kMaxHeadDim && shape.head_dim % 2 == 0, "head_dim = ",
                shape.head_dim, ": even, at most ", kMaxHeadDim);
  PETALSD_CHECK(shape.num_heads % shape.num_kv_heads == 0 && shape.num_heads / shape.num_kv_heads <= kMaxGroup,
                shape.num_heads, " heads over ", shape.num_kv_heads, " KV heads: a multiple, at most ", kMaxGroup);
}

void DecodeBlock::run(const DecodeRows& rows, const DecodeWorkspace& work, ThreadTeam& team) const {
  const std::int64_t num_rows = rows.num_rows;
  const std::int64_t group_size = shape_.attended_size() / shape_.num_kv_heads;
  norm(work, weights_.input_norm, num_rows, team);
  project({weights_.qkv, weights_.qkv_bias, work.packed(work.normed), nullptr, work.qkv, num_rows,
           shape_.hidden_size, shape_.qkv_size()},
          team);
  team.run(num_rows, [&](std::int64_t row) {
    float* qkv = work.qkv + row * shape_.qkv_size();
    place_heads(rows, row, qkv);
    work.pack(qkv, shape_.attended_size());
  });
  const AttentionTask task = attention(rows, work);
  const Lanes lanes(num_rows * shape_.num_kv_heads, team);
  team.run(num_rows * shape_.num_kv_heads, [&](std::int64_t claim) {
    const std::int64_t i = lanes.at(claim);
    tier_.kernels.attend(task, i / shape_.num_kv_heads, i % shape_.num_kv_heads);
    work.pack(work.attended + i * group_size, group_size);
  });
  project({weights_.output, weights_.output_bias, work.packed(work.attended), work.hidden, work.hidden, num_rows,
           shape_.attended_size(), shape_.hidden_size},
          team);
  norm(work, weights_.mlp_norm, num_rows, team);
  gate(work, num_rows, team);
  project({weights_.down, weights_.down_bias, work.packed(work.gated), work.hidden, work.hidden, num_rows,
           shape_.intermediate_size, shape_.hidden_size},
          team);
}

void DecodeBlock::norm(const DecodeWorkspace& work, const void* weight, std::int64_t num_rows,
                       ThreadTeam& team) const {
  const std::int64_t size = shape_.hidden_size;
  team.run(num_rows, [&](std::int64_t row) {
    float* normed = work.normed + row * size;
    tier_.kernels.rms_norm(work.hidden + row * size, weight, shape_.norm_eps, normed, size);
    work.pack(normed, size);
  });
}

void DecodeBlock::project(const LinearTask& task, ThreadTeam& team) const {
  const Lanes lanes(num_chunks(task.num_out), team);
  team.run(num_chunks(task.num_out), [&](std::int64_t claim) {
    const std::int64_t first = lanes.at(claim) * kOutsPerChunk;
    tier_.kernels.linear(task, first, std::min(first + kOutsPerChunk, task.num_out));
  });
}

// The MLP up to what its last layer reads. Who computes some gates computes what they are for.
void DecodeBlock::gate(const DecodeWorkspace& work, std::int64_t num_rows, ThreadTeam& team) const {
  const std::int64_t size = shape_.intermediate_size;
  const LinearTask task{weights_.gate_up, weights_.gate_up_bias, work.packed(work.normed), nullptr, work.gate_up,
                        num_rows, shape_.hidden_size, 2 * size};
  const Lanes lanes(num_chunks(size), team);
  team.run(num_chunks(size), [&](std::int64_t claim) {
    const std::int64_t first = lanes.at(claim) * kOutsPerChunk;
    const std::int64_t count = std::min(kOutsPerChunk, size - first);
    tier_.kernels.linear(task, first, first + count);
    tier_.kernels.linear(task, size + first, size + first + count);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const float* gates = work.gate_up + row * 2 * size + first;
      float* gated = work.gated + row * size + first;
      tier_.kernels.silu_mul(gates, gates + size, gated, count);
      work.pack(gated, count);
    }
  });
}

// Norms and rotates the query and key heads of one row and writes its keys and values to their page.
void DecodeBlock::place_heads(const DecodeRows& rows, std::int64_t row, float* qkv) const {
  const DecodeKernels& kernels = tier_.kernels;
  const std::int64_t dim = shape_.head_dim;
  const std::int64_t element_bytes = dtype_ == DType::kBFloat16 ? 2 : 4;
  const std::int64_t angle = row * dim * element_bytes;
  const void* cos = static_cast<const char*>(rows.cos) + angle;
  const void* sin = static_cast<const char*>(rows.sin) + angle;
  for (std::int64_t head = 0; head < shape_.num_heads + shape_.num_kv_heads; ++head) {
    float* at = qkv + head * dim;
    const void* norm = head < shape_.num_heads ? weights_.q_norm : weights_.k_norm;
    if (norm != nullptr) kernels.rms_norm(at, norm, shape_.norm_eps, at, dim);
    kernels.rotate(at, cos, sin, dim);
  }
  const std::int64_t position = rows.positions[row];
  const std::int64_t origin = rows.origins[row * rows.origins_stride + position / rows.page_tokens];
  const std::int64_t slot = (origin + index_) * rows.page_tokens + position % rows.page_tokens;
  const std::int64_t at = slot * shape_.kv_size() * element_bytes;
  const float* key = qkv + shape_.attended_size();
  kernels.store(key, static_cast<char*>(rows.k) + at, shape_.kv_size());
  kernels.store(key + shape_.kv_size(), static_cast<char*>(rows.v) + at, shape_.kv_size());
}

AttentionTask DecodeBlock::attention(const DecodeRows& rows, const DecodeWorkspace& work) const {
  AttentionTask task{};
  task.q = work.packed(work.qkv);
  task.k = rows.k;
  task.v = rows.v;
  task.out = work.attended;
  task.origins = rows.origins;
  task.positions = rows.positions;
  task.num_rows = rows.num_rows;
  task.q_stride = shape_.qkv_size();
  task.origins_stride = rows.origins_stride;
  task.block = index_;
  task.num_heads = shape_.num_heads;
  task.num_kv_heads = shape_.num_kv_heads;
  task.head_dim = shape_.head_dim;
  task.page_tokens = rows.page_tokens;
  task.window = shape_.window;
  task.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  return task;
}

}  // namespace petalsd
