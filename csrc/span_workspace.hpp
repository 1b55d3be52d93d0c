// The rows between the stages of a step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "attention_plan.hpp"
#include "kernels.hpp"

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

// Room for max_rows rows of a step, in one allocation.
class SpanWorkspace {
 public:
  // `operand_bytes`: of the largest operand that a linear layer of the span reads.
  SpanWorkspace(const BlockShape& shape, std::int64_t operand_bytes, std::int64_t max_rows)
      : operand_stride(petalsd::operand_stride(operand_bytes)), max_rows_(max_rows) {
    const std::int64_t sizes[] = {shape.qkv_size(), shape.attended_size(), shape.attended_size()};
    const std::int64_t row = float_bytes(shape.hidden_size) + shared_bytes(shape);
    const std::int64_t total = round_up(max_rows, kTileRows) * operand_stride + max_rows * row;
    memory_.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(total), kAlignment)));
    char* at = memory_.get();
    hidden = reinterpret_cast<float*>(at);
    char* shared = at + max_rows * float_bytes(shape.hidden_size);
    normed = gate_up = reinterpret_cast<float*>(shared);
    float** const parts[] = {&qkv, &queries, &attended};
    at = shared;
    for (std::size_t i = 0; i < std::size(sizes); ++i) {
      *parts[i] = reinterpret_cast<float*>(at);
      at += max_rows * float_bytes(sizes[i]);
    }
    operands = shared + max_rows * shared_bytes(shape);
  }

  // Rows that go through a span at once: so many that weights are read seldom, so few that the memory stays small.
  static std::int64_t rows_at_once(const BlockShape& shape) {
    constexpr std::int64_t kMaxFloats = 8 << 20;
    const std::int64_t floats = 3 * shape.hidden_size + 2 * shape.qkv_size() + 3 * shape.intermediate_size;
    return std::clamp<std::int64_t>(kMaxFloats / floats, 32, 128);
  }

  std::int64_t max_rows() const { return max_rows_; }

  void* operand(std::int64_t row) const { return operands + row * operand_stride; }

  // What is computed now: rows from `first_row` of the step on.
  std::int64_t first_row = 0;
  std::int64_t num_rows = 0;
  AttentionPlan attention;  // of the same

  float* hidden;    // [R, hidden_size], the residual stream
  char* operands;   // [R, operand_stride]
  // In one place, for they are never needed together: what is normed, what attention works on, and the MLP.
  float* normed;    // [R, hidden_size]
  float* qkv;       // [R, qkv_size]
  float* queries;   // [R, attended_size], as attention reads them
  float* attended;  // [R, attended_size]
  float* gate_up;   // [R, 2 * intermediate_size]
  const std::int64_t operand_stride;  // in bytes

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };

  // Of a row, for the stages that take turns.
  static std::int64_t shared_bytes(const BlockShape& shape) {
    const std::int64_t attended = float_bytes(shape.qkv_size()) + 2 * float_bytes(shape.attended_size());
    return std::max({float_bytes(shape.hidden_size), attended, float_bytes(2 * shape.intermediate_size)});
  }

  static std::int64_t float_bytes(std::int64_t count) { return round_up(4 * count, 64); }

  const std::int64_t max_rows_;
  std::unique_ptr<char, Free> memory_;
};

}  // namespace petalsd
