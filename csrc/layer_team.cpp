#include "layer_team.hpp"

#include <algorithm>
#include <cstddef>

#include "check.hpp"
#include "packed_linear.hpp"
#include "span_workspace.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kRowsAtOnce = 128;

void check_heads(const KVPages& kv, const LayerAttention& layer) {
  PETALSD_CHECK(kv.num_kv_heads > 0 && layer.num_heads > 0 && layer.num_heads % kv.num_kv_heads == 0, layer.num_heads,
                " heads over ", kv.num_kv_heads, " KV heads: a multiple");
  PETALSD_CHECK(kv.head_dim > 0 && kv.head_dim <= kMaxHeadDim && kv.head_dim % 2 == 0, "head_dim = ", kv.head_dim,
                ": even, at most ", kMaxHeadDim);
  PETALSD_CHECK(layer.window >= 0, "window = ", layer.window);
}

}  // namespace

void LayerTeam::multiply(const PackedWeight& weight, const float* in, float* out, std::int64_t num_rows, bool is_wide) {
  PETALSD_CHECK(num_rows > 0, "num_rows = ", num_rows);
  const LinearKernels& kernels = linear(weight, is_wide);
  const std::int64_t stride = operand_stride(kernels.operand_bytes(weight.num_in));
  const std::lock_guard lock(mutex_);
  const ThreadTeam::Shift shift(team_);
  reserve(round_up(std::min(kRowsAtOnce, num_rows), kTileRows) * stride);
  for (std::int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, num_rows - row);
    team_.run(count, [&](std::int64_t i) {
      kernels.prepare(in + (row + i) * weight.num_in, operands_.get() + i * stride, weight.num_in);
    });
    petalsd::multiply({weight, nullptr, operands_.get(), stride, nullptr, out + row * weight.num_out, count}, kernels,
                      team_);
  }
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
