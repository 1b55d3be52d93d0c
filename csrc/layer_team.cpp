#include "layer_team.hpp"

#include <algorithm>
#include <cstddef>

#include "check.hpp"
#include "packed_linear.hpp"
#include "span_workspace.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kRowsAtOnce = 128;
constexpr std::int64_t kFloatsAtOnce = 8 << 20;   // between the dtype of rows and the kernels
constexpr std::int64_t kNormedAtOnce = 16 << 10;  // values: less is done before a helper has come

// So many that weights are read seldom, so few that the memory stays small.
std::int64_t rows_at_once(std::int64_t floats_per_row) {
  return std::clamp<std::int64_t>(kFloatsAtOnce / floats_per_row, 32, kRowsAtOnce);
}

void check_heads(const KVPages& kv, const LayerAttention& layer) {
  PETALSD_CHECK(kv.num_kv_heads > 0 && layer.num_heads > 0 && layer.num_heads % kv.num_kv_heads == 0, layer.num_heads,
                " heads over ", kv.num_kv_heads, " KV heads: a multiple");
  PETALSD_CHECK(kv.head_dim > 0 && kv.head_dim <= kMaxHeadDim && kv.head_dim % 2 == 0, "head_dim = ", kv.head_dim,
                ": even, at most ", kMaxHeadDim);
  PETALSD_CHECK(layer.window >= 0, "window = ", layer.window);
}

}  // namespace

void LayerTeam::multiply(const PackedWeight& weight, const float* bias, const LayerRows& rows) {
  PETALSD_CHECK(rows.num_rows > 0, "num_rows = ", rows.num_rows);
  const std::int64_t stride = operand_stride(linear(weight, rows.is_wide()).operand_bytes(weight.num_in));
  const std::int64_t floats = weight.num_in + weight.num_out;
  const std::int64_t at_once = std::min(rows_at_once(floats), rows.num_rows);
  const std::lock_guard lock(mutex_);
  const ThreadTeam::Shift shift(team_);
  reserve(round_up(at_once, kTileRows) * stride + (rows.is_wide() ? 0 : at_once * floats * 4));
  for (std::int64_t row = 0; row < rows.num_rows; row += at_once) {
    const auto* in = static_cast<const char*>(rows.in) + row * weight.num_in * rows.value_bytes();
    auto* out = static_cast<char*>(rows.out) + row * weight.num_out * rows.value_bytes();
    multiply_part(weight, bias, {in, out, std::min(at_once, rows.num_rows - row), rows.dtype}, stride);
  }
}

// Operands come first in the memory to work in; what is not float32 has inputs and outputs that are behind them.
void LayerTeam::multiply_part(const PackedWeight& weight, const float* bias, const LayerRows& rows, std::int64_t stride) {
  const LinearKernels& kernels = linear(weight, rows.is_wide());
  const StateKernels& states = tier_.kernels.states[static_cast<int>(rows.dtype)];
  auto* const wide_in = reinterpret_cast<float*>(operands_.get() + round_up(rows.num_rows, kTileRows) * stride);
  team_.run(rows.num_rows, [&](std::int64_t row) {
    const std::int64_t start = row * weight.num_in;
    if (!rows.is_wide()) {
      states.load(static_cast<const char*>(rows.in) + start * rows.value_bytes(), wide_in + start, weight.num_in);
    }
    const float* const values = rows.is_wide() ? static_cast<const float*>(rows.in) : wide_in;
    kernels.prepare(values + start, operands_.get() + row * stride, weight.num_in);
  });
  float* const sums = rows.is_wide() ? static_cast<float*>(rows.out) : wide_in + rows.num_rows * weight.num_in;
  petalsd::multiply({weight, bias, operands_.get(), stride, nullptr, sums, rows.num_rows}, kernels, team_);
  if (rows.is_wide()) return;
  team_.run(rows.num_rows, [&](std::int64_t row) {
    const std::int64_t start = row * weight.num_out;
    states.store(sums + start, static_cast<char*>(rows.out) + start * rows.value_bytes(), weight.num_out);
  });
}

void LayerTeam::normalize(const RowNorm& norm, const LayerRows& rows) {
  PETALSD_CHECK(rows.num_rows > 0 && norm.width > 0, rows.num_rows, " rows of ", norm.width);
  const StateKernels& states = tier_.kernels.states[static_cast<int>(rows.dtype)];
  const std::int64_t row_bytes = norm.width * rows.value_bytes();
  const std::int64_t per_chunk = std::max<std::int64_t>(1, kNormedAtOnce / norm.width);
  const auto normalize_chunk = [&](std::int64_t chunk) {
    std::vector<float> row(static_cast<std::size_t>(norm.width));
    for (std::int64_t r = chunk * per_chunk; r < std::min(rows.num_rows, (chunk + 1) * per_chunk); ++r) {
      states.load(static_cast<const char*>(rows.in) + r * row_bytes, row.data(), norm.width);
      tier_.kernels.rms_norm(row.data(), norm.weight, norm.eps, row.data(), norm.width);
      states.store(row.data(), static_cast<char*>(rows.out) + r * row_bytes, norm.width);
    }
  };
  const std::int64_t num_chunks = (rows.num_rows + per_chunk - 1) / per_chunk;
  if (num_chunks == 1) return normalize_chunk(0);
  const std::lock_guard lock(mutex_);
  const ThreadTeam::Shift shift(team_);
  team_.run(num_chunks, normalize_chunk);
}

void LayerTeam::attend(const Sequences& sequences, const KVPages& kv, const LayerAttention& layer) {
  sequences.check(kv);
  check_heads(kv, layer);
  const AttentionKernels& kernels = tier_.kernels.attention[static_cast<int>(kv.type)];
  BlockShape shape{};
  shape.num_heads = layer.num_heads;
  shape.num_kv_heads = kv.num_kv_heads;
  shape.head_dim = kv.head_dim;
  const std::int64_t num_rows = sequences.num_rows();
  const std::lock_guard lock(mutex_);
  const ThreadTeam::Shift shift(team_);
  reserve(std::min(kRowsAtOnce, num_rows) * shape.attended_size() * kernels.query_element_bytes);
  for (std::int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
    plan_.choose(sequences, row, std::min(kRowsAtOnce, num_rows - row), shape, team_.num_threads());
    place(kv, layer, row, shape.attended_size() * kernels.query_element_bytes);
    AttentionTask task{};
    task.kv = kv;
    task.q = operands_.get();
    task.q_stride = shape.attended_size();
    task.out = layer.out + row * shape.attended_size();
    task.block = layer.block;
    task.num_heads = layer.num_heads;
    task.window = layer.window;
    task.scale = layer.scale;
    task.rule = layer.rule;
    petalsd::attend(task, kernels, plan_, team_);
  }
}

// All rows' keys and values before anything is attended to: rows of a sequence see those before them.
void LayerTeam::place(const KVPages& kv, const LayerAttention& layer, std::int64_t first_row, std::int64_t query_bytes) {
  const AttentionKernels& kernels = tier_.kernels.attention[static_cast<int>(kv.type)];
  const std::int64_t kv_size = kv.num_kv_heads * kv.head_dim;
  const std::int64_t q_size = layer.num_heads * kv.head_dim;
  team_.run(static_cast<std::int64_t>(plan_.pieces.size()), [&](std::int64_t at) {
    const QueryRows& piece = plan_.pieces[static_cast<std::size_t>(at)];
    for (std::int64_t i = 0; i < piece.num_rows; ++i) {
      const std::int64_t row = piece.first_row + i;
      const std::int64_t position = piece.position + i;
      const std::int64_t page = piece.origins[position / kv.page_tokens] + layer.block;
      const std::int64_t from = first_row + row;
      kernels.write(kv, page, position % kv.page_tokens, layer.k + from * kv_size, layer.v + from * kv_size);
      kernels.prepare(layer.q + from * q_size, operands_.get() + row * query_bytes, q_size);
    }
  });
}

const LinearKernels& LayerTeam::linear(const PackedWeight& weight, bool is_wide) const {
  const bool keeps_inputs = is_wide && weight.format == WeightFormat::kBFloat16;
  return keeps_inputs ? tier_.kernels.wide_bfloat16 : tier_.kernels.linear[static_cast<int>(weight.format)];
}

void LayerTeam::reserve(std::int64_t bytes) {
  if (bytes <= operands_bytes_) return;
  operands_.reset();  // before the new ones
  operands_bytes_ = 0;
  operands_.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), kAlignment)));
  operands_bytes_ = bytes;
}

}  // namespace petalsd
