// The rows between the stages of a decode step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "decode_kernels.hpp"

namespace petalsd {

struct BlockShape {
  std::int64_t hidden_size;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  std::int64_t intermediate_size;
  std::int64_t window;  // 0: none
  float norm_eps;

  std::int64_t attended_size() const { return num_heads * head_dim; }
  std::int64_t kv_size() const { return num_kv_heads * head_dim; }
  std::int64_t qkv_size() const { return attended_size() + 2 * kv_size(); }
};

// float32 rows in one allocation, and beside it, for kernels that pack, the same rows as they left `pack`.
class DecodeWorkspace {
 public:
  DecodeWorkspace(const BlockShape& shape, const DecodeKernels& kernels, std::int64_t max_rows)
      : kernels_(kernels), max_rows_(max_rows) {
    const std::int64_t gate_size = shape.intermediate_size;
    const std::int64_t row_size = 2 * shape.hidden_size + shape.qkv_size() + shape.attended_size() + 3 * gate_size;
    const auto size = static_cast<std::size_t>(max_rows * row_size);
    memory_.reset(new float[size]);
    if (kernels.pack != nullptr) packed_.reset(new std::uint16_t[size]);
    hidden = memory_.get();
    normed = hidden + max_rows * shape.hidden_size;
    qkv = normed + max_rows * shape.hidden_size;
    attended = qkv + max_rows * shape.qkv_size();
    gate_up = attended + max_rows * shape.attended_size();
    gated = gate_up + max_rows * 2 * gate_size;
  }

  std::int64_t max_rows() const { return max_rows_; }

  // What `linear` and `attend` read for these rows.
  const void* packed(const float* values) const {
    return kernels_.pack == nullptr ? static_cast<const void*>(values) : packed_.get() + (values - memory_.get());
  }

  // To be called for all values that `packed` is asked for.
  void pack(const float* values, std::int64_t count) const {
    if (kernels_.pack != nullptr) kernels_.pack(values, packed_.get() + (values - memory_.get()), count);
  }

  float* hidden;    // [R, hidden_size], the residual stream
  float* normed;    // [R, hidden_size]
  float* qkv;       // [R, qkv_size]
  float* attended;  // [R, attended_size]
  float* gate_up;   // [R, 2 * intermediate_size]
  float* gated;     // [R, intermediate_size]

 private:
  const DecodeKernels& kernels_;
  const std::int64_t max_rows_;
  std::unique_ptr<float[]> memory_;
  std::unique_ptr<std::uint16_t[]> packed_;
};

}  // namespace petalsd
