#include "span_block.hpp"

#include <cmath>
#include <utility>

#include "check.hpp"
#include "packed_linear.hpp"

namespace petalsd {

namespace {

const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

void check_matrix(const char* name, const PackedWeight& weight, std::int64_t num_out, std::int64_t num_in) {
  PETALSD_CHECK(weight.num_out == num_out && weight.num_in == num_in, name, ": [", weight.num_out, ", ", weight.num_in,
                "] instead of [", num_out, ", ", num_in, "]");
}

void check_vector(const char* name, const std::vector<float>& values, std::int64_t size, bool is_needed) {
  PETALSD_CHECK(static_cast<std::int64_t>(values.size()) == size || (values.empty() && !is_needed), name, ": ",
                values.size(), " values instead of ", size);
}

}  // namespace

SpanBlock::SpanBlock(std::int64_t index, const BlockShape& shape, const BlockMatrices& matrices, BlockVectors vectors,
                     Tier tier)
    : index_(index), shape_(shape), matrices_(matrices), vectors_(std::move(vectors)), tier_(tier) {
  PETALSD_CHECK(shape.hidden_size > 0 && shape.intermediate_size > 0 && shape.num_kv_heads > 0 && shape.window >= 0,
                "a block has hidden and intermediate sizes, KV heads, and no negative window");
  PETALSD_CHECK(shape.head_dim > 0 && shape.head_dim <= kMaxHeadDim && shape.head_dim % 2 == 0, "head_dim = ",
                shape.head_dim, ": even, at most ", kMaxHeadDim);
  PETALSD_CHECK(shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0, shape.num_heads, " heads over ",
                shape.num_kv_heads, " KV heads: a multiple");
  check_matrix("qkv", matrices.qkv, shape.qkv_size(), shape.hidden_size);
  check_matrix("output", matrices.output, shape.hidden_size, shape.attended_size());
  check_matrix("gate_up", matrices.gate_up, 2 * shape.intermediate_size, shape.hidden_size);
  check_matrix("down", matrices.down, shape.hidden_size, shape.intermediate_size);
  check_vector("input_norm", vectors_.input_norm, shape.hidden_size, true);
  check_vector("mlp_norm", vectors_.mlp_norm, shape.hidden_size, true);
  check_vector("q_norm", vectors_.q_norm, shape.head_dim, false);
  check_vector("k_norm", vectors_.k_norm, shape.head_dim, false);
  check_vector("qkv_bias", vectors_.qkv_bias, shape.qkv_size(), false);
  check_vector("output_bias", vectors_.output_bias, shape.hidden_size, false);
  check_vector("gate_up_bias", vectors_.gate_up_bias, 2 * shape.intermediate_size, false);
  check_vector("down_bias", vectors_.down_bias, shape.hidden_size, false);
}

void SpanBlock::run(const StepRows& rows, const SpanWorkspace& work, ThreadTeam& team) const {
  norm(work, vectors_.input_norm, matrices_.qkv, team);
  project(work, matrices_.qkv, vectors_.qkv_bias, nullptr, work.qkv, team);
  const std::vector<QueryRows>& pieces = work.attention.pieces;
  team.run(static_cast<std::int64_t>(pieces.size()),
           [&](std::int64_t piece) { place(rows, work, pieces[static_cast<std::size_t>(piece)]); });
  attend(rows, work, team);
  project(work, matrices_.output, vectors_.output_bias, work.hidden, work.hidden, team);
  norm(work, vectors_.mlp_norm, matrices_.gate_up, team);
  project(work, matrices_.gate_up, vectors_.gate_up_bias, nullptr, work.gate_up, team);
  gate(work, team);
  project(work, matrices_.down, vectors_.down_bias, work.hidden, work.hidden, team);
}

const LinearKernels& SpanBlock::linear(const PackedWeight& weight) const {
  return tier_.kernels.linear[static_cast<int>(weight.format)];
}

// Makes the operands of the layer that comes next.
void SpanBlock::norm(const SpanWorkspace& work, const Values& weight, const PackedWeight& next, ThreadTeam& team) const {
  const std::int64_t size = shape_.hidden_size;
  team.run(work.num_rows, [&](std::int64_t row) {
    float* normed = work.normed + row * size;
    tier_.kernels.rms_norm(work.hidden + row * size, weight.data(), shape_.norm_eps, normed, size);
    linear(next).prepare(normed, work.operand(row), size);
  });
}

void SpanBlock::project(const SpanWorkspace& work, const PackedWeight& weight, const Values& bias, const float* residual,
                        float* out, ThreadTeam& team) const {
  const LinearTask task{weight, data_or_null(bias), work.operands, work.operand_stride, residual, out, work.num_rows};
  multiply(task, linear(weight), team);
}

// Norms and rotates the query and key heads of some rows, and writes their keys and values to their pages.
void SpanBlock::place(const StepRows& rows, const SpanWorkspace& work, const QueryRows& query) const {
  const StateKernels& states = tier_.kernels.states[static_cast<int>(rows.dtype)];
  const AttentionKernels& kernels = tier_.kernels.attention[static_cast<int>(rows.kv.type)];
  const std::int64_t dim = shape_.head_dim;
  const std::int64_t angle_bytes = dim * (rows.dtype == DType::kBFloat16 ? 2 : 4);
  for (std::int64_t i = 0; i < query.num_rows; ++i) {
    const std::int64_t row = query.first_row + i;
    float* qkv = work.qkv + row * shape_.qkv_size();
    const std::int64_t angle = (work.first_row + row) * angle_bytes;
    for (std::int64_t head = 0; head < shape_.num_heads + shape_.num_kv_heads; ++head) {
      float* at = qkv + head * dim;
      const Values& norm = head < shape_.num_heads ? vectors_.q_norm : vectors_.k_norm;
      if (!norm.empty()) tier_.kernels.rms_norm(at, norm.data(), shape_.norm_eps, at, dim);
      states.rotate(at, static_cast<const char*>(rows.cos) + angle, static_cast<const char*>(rows.sin) + angle, dim);
    }
    const std::int64_t position = query.position + i;
    const std::int64_t page = query.origins[position / rows.kv.page_tokens] + index_;
    const float* key = qkv + shape_.attended_size();
    kernels.write(rows.kv, page, position % rows.kv.page_tokens, key, key + shape_.kv_size());
    kernels.prepare(qkv, work.queries + row * shape_.attended_size(), shape_.attended_size());
  }
}

AttentionTask SpanBlock::attention_task(const StepRows& rows, const SpanWorkspace& work) const {
  const AttentionKernels& kernels = tier_.kernels.attention[static_cast<int>(rows.kv.type)];
  AttentionTask task{};
  task.kv = rows.kv;
  task.q = work.queries;
  task.q_stride = shape_.attended_size() * 4 / kernels.query_element_bytes;
  task.out = work.attended;
  task.block = index_;
  task.num_heads = shape_.num_heads;
  task.window = shape_.window;
  task.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  return task;
}

void SpanBlock::attend(const StepRows& rows, const SpanWorkspace& work, ThreadTeam& team) const {
  const AttentionKernels& kernels = tier_.kernels.attention[static_cast<int>(rows.kv.type)];
  petalsd::attend(attention_task(rows, work), kernels, work.attention, team);
  const std::int64_t size = shape_.attended_size();
  team.run(work.num_rows, [&](std::int64_t row) {
    linear(matrices_.output).prepare(work.attended + row * size, work.operand(row), size);
  });
}

void SpanBlock::gate(const SpanWorkspace& work, ThreadTeam& team) const {
  const std::int64_t size = shape_.intermediate_size;
  team.run(work.num_rows, [&](std::int64_t row) {
    float* gates = work.gate_up + row * 2 * size;
    tier_.kernels.silu_mul(gates, gates + size, gates, size);
    linear(matrices_.down).prepare(gates, work.operand(row), size);
  });
}

}  // namespace petalsd
