#include "span.hpp"

#include <algorithm>
#include <tuple>
#include <utility>

#include "check.hpp"

namespace petalsd {

namespace {

auto sizes(const BlockShape& shape) {
  return std::make_tuple(shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim,
                         shape.intermediate_size);
}

std::int64_t largest_operand(const std::vector<std::shared_ptr<const SpanBlock>>& blocks) {
  std::int64_t largest = 0;
  for (const auto& block : blocks) {
    const BlockMatrices& matrices = block->matrices();
    for (const PackedWeight* weight : {&matrices.qkv, &matrices.output, &matrices.gate_up, &matrices.down}) {
      const LinearKernels& kernels = block->tier().kernels.linear[static_cast<int>(weight->format)];
      largest = std::max(largest, kernels.operand_bytes(weight->num_in));
    }
  }
  return largest;
}

}  // namespace

Span::Span(std::vector<std::shared_ptr<const SpanBlock>> blocks) : blocks_(std::move(blocks)) {
  PETALSD_CHECK(!blocks_.empty(), "a span has at least one block");
  const SpanBlock& head = *blocks_.front();
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const SpanBlock& block = *blocks_[i];
    PETALSD_CHECK_EQUAL(block.index(), head.index() + static_cast<std::int64_t>(i), "blocks of a span in order");
    PETALSD_CHECK(sizes(block.shape()) == sizes(head.shape()) && &block.tier().kernels == &head.tier().kernels,
                  "block ", block.index(), ": not of the same sizes and tier as block ", head.index());
  }
}

void Span::run(const StepRows& rows, std::int64_t first, std::int64_t count, ThreadTeam& team) {
  check(rows, first, count);
  const ThreadTeam::Shift shift(team);
  const SpanBlock& head = *blocks_.front();
  const StateKernels& states = head.tier().kernels.states[static_cast<int>(rows.dtype)];
  const std::int64_t width = head.shape().hidden_size;
  const std::int64_t row_bytes = width * (rows.dtype == DType::kBFloat16 ? 2 : 4);
  const std::int64_t at_once = std::min(rows.num_rows(), SpanWorkspace::rows_at_once(head.shape()));
  SpanWorkspace& work = workspace(at_once);
  for (std::int64_t row = 0; row < rows.num_rows(); row += at_once) {
    work.first_row = row;
    work.num_rows = std::min(at_once, rows.num_rows() - row);
    work.attention.choose(rows, row, work.num_rows, head.shape(), team.num_threads());
    states.load(static_cast<const char*>(rows.hidden) + row * row_bytes, work.hidden, work.num_rows * width);
    for (std::int64_t i = first - head.index(); i < first - head.index() + count; ++i) {
      blocks_[static_cast<std::size_t>(i)]->run(rows, work, team);
    }
    states.store(work.hidden, static_cast<char*>(rows.out) + row * row_bytes, work.num_rows * width);
  }
}

void Span::check(const StepRows& rows, std::int64_t first, std::int64_t count) const {
  const SpanBlock& head = *blocks_.front();
  const auto num_blocks = static_cast<std::int64_t>(blocks_.size());
  const std::int64_t skipped = first - head.index();
  PETALSD_CHECK(0 <= skipped && 0 < count && count <= num_blocks - skipped, "blocks ", first, " to ", first + count,
                " of a span from ", head.index(), " to ", head.index() + num_blocks);
  rows.check(rows.kv);
  PETALSD_CHECK(rows.kv.num_kv_heads == head.shape().num_kv_heads && rows.kv.head_dim == head.shape().head_dim,
                "pages of ", rows.kv.num_kv_heads, " heads of ", rows.kv.head_dim, " for blocks of ",
                head.shape().num_kv_heads, " of ", head.shape().head_dim);
}

SpanWorkspace& Span::workspace(std::int64_t num_rows) {
  if (workspace_ == nullptr || workspace_->max_rows() < num_rows) {
    workspace_.reset();  // before the new one: they are large
    workspace_ = std::make_unique<SpanWorkspace>(blocks_.front()->shape(), largest_operand(blocks_), num_rows);
  }
  return *workspace_;
}

}  // namespace petalsd
