// What a decode step of one transformer block is made of, for one tier of the processor.
#pragma once

#include <cstdint>

namespace petalsd {

enum class DType { kFloat32, kBFloat16 };

// A linear layer over R rows: out[r, n] = (residual[r, n] +) bias[n] + sum_k in[r, k] * weight[n, k].
// weight `[num_out, num_in]` and bias (or null) in the block's dtype; in `[R, num_in]` as `pack` leaves it; out and
// residual (or null; may be `out`) are float32 `[R, num_out]`.
struct LinearTask {
  const void* weight;
  const void* bias;
  const void* in;
  const float* residual;
  float* out;
  std::int64_t num_rows;
  std::int64_t num_in;
  std::int64_t num_out;
};

// Attention of R rows over their pages. q `[R, num_heads, head_dim]`, as `pack` leaves it, with rows `q_stride` apart;
// out, without gaps, is float32; k and v `[pages, page_tokens, num_kv_heads, head_dim]` in the block's dtype.
// Row r sees positions max(0, p + 1 - window) to p = positions[r]; position t lies in page
// origins[r * origins_stride + t / page_tokens] + block.
struct AttentionTask {
  const void* q;
  const void* k;
  const void* v;
  float* out;
  const std::int32_t* origins;
  const std::int64_t* positions;
  std::int64_t num_rows;
  std::int64_t q_stride;
  std::int64_t origins_stride;
  std::int64_t block;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  std::int64_t page_tokens;
  std::int64_t window;  // 0: none
  float scale;
};

// Sums are float32, and so is everything else but what `pack` rounds. A result depends on the inputs of its own row
// alone, bit for bit: every sum runs in the same order whatever the number of rows.
struct DecodeKernels {
  void (*load)(const void* in, float* out, std::int64_t count);
  void (*store)(const float* in, void* out, std::int64_t count);  // rounds to nearest, ties to even
  // From float32 to what `linear` and `attend` multiply, which is the block's dtype; null where that is float32 itself.
  void (*pack)(const float* in, void* out, std::int64_t count);
  void (*rms_norm)(const float* in, const void* weight, float eps, float* out, std::int64_t count);
  void (*rotate)(float* head, const void* cos, const void* sin, std::int64_t head_dim);  // half rotation, in place
  void (*linear)(const LinearTask& task, std::int64_t first_out, std::int64_t last_out);
  void (*attend)(const AttentionTask& task, std::int64_t row, std::int64_t kv_head);
  void (*silu_mul)(const float* gate, const float* up, float* out, std::int64_t count);
};

const DecodeKernels& baseline_kernels(DType dtype);
const DecodeKernels& avx2_kernels(DType dtype);        // needs AVX2 and FMA
const DecodeKernels& avx512_kernels(DType dtype);      // needs AVX-512 F, BW, DQ and VL
const DecodeKernels& avx512bf16_kernels(DType dtype);  // needs AVX-512 BF16 besides

// Outputs of a linear layer that one thread takes at a time: their weights stay in its cache for all rows.
constexpr std::int64_t kOutsPerChunk = 16;
constexpr std::int64_t kMaxHeadDim = 512;
constexpr std::int64_t kMaxGroup = 64;  // query heads of one KV head

}  // namespace petalsd
