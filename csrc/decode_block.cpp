#include "decode_block.hpp"

#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "check.hpp"

namespace petalsd {

namespace {

// Outputs of a linear layer that one thread takes at a time: their weights stay in its cache for all rows.
constexpr std::int64_t kOutsPerChunk = 16;

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
#else
  return false;
#endif
}

}  // namespace

const DecodeKernels& choose_kernels(const char* tier, DType dtype) {
  const std::string name = tier;
  PETALSD_CHECK(name == "auto" || name == "baseline" || name == "avx2", "tier = ", name, ": auto, baseline or avx2");
  PETALSD_CHECK(name != "avx2" || has_avx2(), "tier = avx2: this processor has no AVX2 with FMA");
  return name != "baseline" && has_avx2() ? avx2_kernels(dtype) : baseline_kernels(dtype);
}

// float32 rows between the stages, in one allocation.
struct DecodeBlock::Workspace {
  Workspace(const BlockShape& shape, std::int64_t num_rows) {
    const std::int64_t qkv_size = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
    const std::int64_t attended_size = shape.num_heads * shape.head_dim;
    const std::int64_t row_size = 2 * shape.hidden_size + qkv_size + attended_size + 3 * shape.intermediate_size;
    memory.reset(new float[static_cast<std::size_t>(num_rows * row_size)]);
    hidden = memory.get();
    normed = hidden + num_rows * shape.hidden_size;
    qkv = normed + num_rows * shape.hidden_size;
    attended = qkv + num_rows * qkv_size;
    gate_up = attended + num_rows * attended_size;
    gated = gate_up + num_rows * 2 * shape.intermediate_size;
  }

  std::unique_ptr<float[]> memory;
  float* hidden;    // [R, hidden_size], the residual stream
  float* normed;    // [R, hidden_size]
  float* qkv;       // [R, (num_heads + 2 * num_kv_heads) * head_dim]
  float* attended;  // [R, num_heads * head_dim]
  float* gate_up;   // [R, 2 * intermediate_size]
  float* gated;     // [R, intermediate_size]
};

DecodeBlock::DecodeBlock(std::int64_t index, const BlockShape& shape, const BlockPointers& weights, DType dtype,
                         const DecodeKernels& kernels)
    : index_(index),
      shape_(shape),
      weights_(weights),
      element_bytes_(dtype == DType::kBFloat16 ? 2 : 4),
      kernels_(kernels) {
  PETALSD_CHECK(shape.hidden_size > 0 && shape.intermediate_size > 0 && shape.num_kv_heads > 0 && shape.window >= 0,
                "a block has hidden and intermediate sizes, KV heads, and no negative window");
  PETALSD_CHECK(shape.head_dim > 0 && shape.head_dim <= kMaxHeadDim && shape.head_dim % 2 == 0, "head_dim = ",
                shape.head_dim, ": even, at most ", kMaxHeadDim);
  PETALSD_CHECK(shape.num_heads % shape.num_kv_heads == 0 && shape.num_heads / shape.num_kv_heads <= kMaxGroup,
                shape.num_heads, " heads over ", shape.num_kv_heads, " KV heads: a multiple, at most ", kMaxGroup);
}

void DecodeBlock::run(const DecodeRows& rows, ThreadTeam& team) const {
  const std::int64_t num_rows = rows.num_rows;
  const std::int64_t hidden_size = shape_.hidden_size;
  const std::int64_t attended_size = shape_.num_heads * shape_.head_dim;
  const std::int64_t qkv_size = attended_size + 2 * shape_.num_kv_heads * shape_.head_dim;
  const std::int64_t gate_size = shape_.intermediate_size;
  const Workspace work(shape_, num_rows);
  const auto norm = [&](const void* weight) {
    team.run(num_rows, [&](std::int64_t r) {
      kernels_.rms_norm(work.hidden + r * hidden_size, weight, shape_.norm_eps, work.normed + r * hidden_size,
                        hidden_size);
    });
  };
  kernels_.load(rows.hidden, work.hidden, num_rows * hidden_size);
  norm(weights_.input_norm);
  project({weights_.qkv, weights_.qkv_bias, work.normed, nullptr, work.qkv, num_rows, hidden_size, qkv_size}, team);
  team.run(num_rows, [&](std::int64_t r) { place_heads(rows, r, work.qkv + r * qkv_size); });
  const AttentionTask task = attention(rows, work);
  team.run(num_rows * shape_.num_kv_heads, [&](std::int64_t i) {
    kernels_.attend(task, i / shape_.num_kv_heads, i % shape_.num_kv_heads);
  });
  project({weights_.output, weights_.output_bias, work.attended, work.hidden, work.hidden, num_rows, attended_size,
           hidden_size},
          team);
  norm(weights_.mlp_norm);
  project({weights_.gate_up, weights_.gate_up_bias, work.normed, nullptr, work.gate_up, num_rows, hidden_size,
           2 * gate_size},
          team);
  team.run(num_rows, [&](std::int64_t r) {
    const float* gate = work.gate_up + r * 2 * gate_size;
    kernels_.silu_mul(gate, gate + gate_size, work.gated + r * gate_size, gate_size);
  });
  project({weights_.down, weights_.down_bias, work.gated, work.hidden, work.hidden, num_rows, gate_size, hidden_size},
          team);
  kernels_.store(work.hidden, rows.out, num_rows * hidden_size);
}

void DecodeBlock::project(const LinearTask& task, ThreadTeam& team) const {
  team.run((task.num_out + kOutsPerChunk - 1) / kOutsPerChunk, [&](std::int64_t chunk) {
    const std::int64_t first = chunk * kOutsPerChunk;
    const std::int64_t last = first + kOutsPerChunk;
    kernels_.linear(task, first, last < task.num_out ? last : task.num_out);
  });
}

// Norms and rotates the query and key heads of one row and writes its keys and values to their page.
void DecodeBlock::place_heads(const DecodeRows& rows, std::int64_t row, float* qkv) const {
  const std::int64_t dim = shape_.head_dim;
  const std::int64_t angle = row * dim * element_bytes_;
  const void* cos = static_cast<const char*>(rows.cos) + angle;
  const void* sin = static_cast<const char*>(rows.sin) + angle;
  for (std::int64_t head = 0; head < shape_.num_heads + shape_.num_kv_heads; ++head) {
    float* at = qkv + head * dim;
    const void* norm = head < shape_.num_heads ? weights_.q_norm : weights_.k_norm;
    if (norm != nullptr) kernels_.rms_norm(at, norm, shape_.norm_eps, at, dim);
    kernels_.rotate(at, cos, sin, dim);
  }
  const std::int64_t position = rows.positions[row];
  const std::int64_t origin = rows.origins[row * rows.origins_stride + position / rows.page_tokens];
  const std::int64_t slot = (origin + index_) * rows.page_tokens + position % rows.page_tokens;
  const std::int64_t kv_size = shape_.num_kv_heads * dim;
  const std::int64_t at = slot * kv_size * element_bytes_;
  const float* key = qkv + shape_.num_heads * dim;
  kernels_.store(key, static_cast<char*>(rows.k) + at, kv_size);
  kernels_.store(key + kv_size, static_cast<char*>(rows.v) + at, kv_size);
}

AttentionTask DecodeBlock::attention(const DecodeRows& rows, const Workspace& work) const {
  AttentionTask task{};
  task.q = work.qkv;
  task.k = rows.k;
  task.v = rows.v;
  task.out = work.attended;
  task.origins = rows.origins;
  task.positions = rows.positions;
  task.q_stride = (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim;
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
