// What a step of one transformer block is made of, for one tier of the processor.
#pragma once

#include <cstdint>

#include "packed_weight.hpp"

namespace petalsd {

enum class DType { kFloat32, kBFloat16 };
enum class KVType { kFloat32, kBFloat16, kInt8 };

constexpr int kNumDTypes = 2;
constexpr int kNumKVTypes = 3;

// A linear layer over R rows: out[r, n] = (residual[r, n] +) bias[n] + sum_k in[r, k] * weight[n, k].
// `in` are R operands (see LinearKernels), `in_stride` bytes apart, with room for a multiple of kTileRows; bias (or null) `[num_out]`, residual (or null; may be
// `out`) and out `[R, num_out]` are float32.
struct LinearTask {
  PackedWeight weight;
  const float* bias;
  const void* in;
  std::int64_t in_stride;
  const float* residual;
  float* out;
  std::int64_t num_rows;
};

// The linear layer over weights of one format. Before it multiplies, an input row becomes an *operand*: float32 or
// bfloat16 values, or integers of 8 bits, in 8 or 16, with a scale for each group of 64 inputs.
struct LinearKernels {
  std::int64_t (*operand_bytes)(std::int64_t num_in);  // a multiple of the cache line
  void (*prepare)(const float* in, void* operand, std::int64_t num_in);
  // Outputs of tiles first_tile to last_tile - 1, for all rows.
  void (*multiply)(const LinearTask& task, std::int64_t first_tile, std::int64_t last_tile);
};

// How far apart operands lie: an odd number of cache lines. Those of many models are a power of two long, and so close
// together rows would meet in a few sets of the first cache, which hold fewer than are multiplied at once.
constexpr std::int64_t operand_stride(std::int64_t operand_bytes) { return operand_bytes | kUnitBytes; }

// Keys and values of all pages, in an order made for these kernels. K is kept rotated.
//
//   k  `[N, Hkv, P / 16, D / pair, 16, pair]`
//   v  `[N, Hkv, P / pair, D, pair]`; pair: 2 for bfloat16, else 1
//   k_scales, v_scales  float32 `[N, Hkv, P]`, of int8 only
//
// The pages of a sequence: position t lies in page origins[t / P] + block at t % P; P is a multiple of 16.
struct KVPages {
  KVType type;
  void* k;
  void* v;
  float* k_scales;
  float* v_scales;
  std::int64_t page_tokens;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
};

// A sequence is attended to in parts of so many positions, the first one from position 0 on: each by itself, and what they
// give is merged in their order. That is the same whoever computes them, and so one long sequence can occupy many threads.
constexpr std::int64_t kPartTokens = 1024;
constexpr std::int64_t kPartialRoom = 16;  // floats of a partial besides its sums, to the next cache line

struct PartRange {
  std::int64_t first;
  std::int64_t end;
};

// Consecutive new tokens of one sequence.
struct QueryRows {
  std::int64_t first_row;  // in the batch
  std::int64_t num_rows;
  std::int64_t position;        // of the first one
  const std::int32_t* origins;  // of the sequence
  const QueryRows* next = nullptr;  // whose pages are likely to be read after these

  std::int64_t end() const { return position + num_rows; }  // of the positions that some of them see
  std::int64_t num_parts() const { return (end() - 1) / kPartTokens + 1; }
};

// What becomes of a score between the product and the softmax, in this order. slopes and sinks are `[num_heads]`, or null.
struct ScoreRule {
  float softcap = 0.0f;           // above 0: softcap * tanh(score / softcap)
  const float* slopes = nullptr;  // of biases by distance, ALiBi: factor * slope * position is added
  float bias_factor = 1.0f;
  bool rounds_biases = false;    // positions, and products with them, are rounded to bfloat16
  const float* sinks = nullptr;  // scores of keys that every query sees as well, and that have no values

  bool changes_scores() const { return softcap > 0.0f || slopes != nullptr; }
};

// Attention of the query heads of one KV head, for some rows. q, as `AttentionKernels::prepare` leaves it, and out,
// float32, are `[R, num_heads, D]`; rows of q are q_stride *elements* apart. A row at position p sees the positions
// max(0, p + 1 - window) to p.
struct AttentionTask {
  KVPages kv;
  const void* q;
  std::int64_t q_stride;
  float* out;
  std::int64_t block;
  std::int64_t num_heads;
  std::int64_t window;  // 0: none
  float scale;
  ScoreRule rule;

  std::int64_t first_seen(std::int64_t position) const {
    return window > 0 && position >= window ? position + 1 - window : 0;
  }
};

// Attention over pages of one type.
struct AttentionKernels {
  std::int64_t query_element_bytes;
  void (*prepare)(const float* in, void* query, std::int64_t count);
  // Writes the keys and values of one token, `[Hkv, D]` each, to their place in a page.
  void (*write)(const KVPages& kv, std::int64_t page, std::int64_t offset, const float* k, const float* v);
  // To these parts of the rows' positions; all of them, and the answers go to task.out; or else what they gave goes to
  // `partials`, `[Q, D + kPartialRoom]` for the Q queries of the rows that share the KV head.
  void (*attend)(const AttentionTask& task, const QueryRows& rows, std::int64_t kv_head, PartRange parts,
                 float* partials);
  // The answers from the partials of one part after the other, from the first on; writes into the first one's.
  void (*merge_parts)(const AttentionTask& task, const QueryRows& rows, std::int64_t kv_head, float* partials,
                      std::int64_t num_parts);
};

// By what is at the border of a span: states and rotary angles.
struct StateKernels {
  void (*load)(const void* in, float* out, std::int64_t count);
  void (*store)(const float* in, void* out, std::int64_t count);  // rounds to nearest, ties to even
  void (*rotate)(float* head, const void* cos, const void* sin, std::int64_t head_dim);  // half rotation, in place
};

// Sums are float32, and so is everything else but operands, queries, and what stands in pages. A result depends on the
// inputs of its own row alone, bit for bit: every sum runs in the same order whatever the number of rows.
struct Kernels {
  LinearKernels linear[kNumWeightFormats];
  LinearKernels wide_bfloat16;  // operands are float32 in every tier
  AttentionKernels attention[kNumKVTypes];
  StateKernels states[kNumDTypes];
  void (*rms_norm)(const float* in, const float* weight, float eps, float* out, std::int64_t count);
  void (*silu_mul)(const float* gate, const float* up, float* out, std::int64_t count);
  // (up + 1) * gate * sigmoid(alpha * gate), of gates up to the limit and ups that are within it on both sides.
  void (*clamped_swish_mul)(const float* gate, const float* up, float limit, float alpha, float* out,
                            std::int64_t count);
  // Finite weights `[G, 64]` to the bytes `[G, 32]` of int4, byte after byte, and scales, bfloat16 `[G]`.
  void (*round_int4)(const float* in, std::uint8_t* bytes, void* scales, std::int64_t num_groups);
};

constexpr std::int64_t kTileRows = 16;  // that kernels may read at once, also where there are fewer
constexpr std::int64_t kMaxHeadDim = 512;
constexpr std::int64_t kMaxQueries = 24;  // that one pass over a sequence's pages serves

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;        // needs AVX2 and FMA
extern const Kernels kAvx512Kernels;      // needs AVX-512 F, BW, DQ and VL
extern const Kernels kAvx512VnniKernels;  // needs AVX-512 VNNI besides
extern const Kernels kAvx512Bf16Kernels;  // needs AVX-512 BF16 besides
extern const Kernels kAmxKernels;         // needs AMX with BF16 and INT8 besides
extern const Kernels kEmulatedAmxKernels;  // the same with tiles in memory: for tests, needs AVX-512 BF16

}  // namespace petalsd
