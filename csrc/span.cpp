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
  const std::int64_t at_once = std::min(rows.num_rows, SpanWorkspace::rows_at_once(head.shape()));
  SpanWorkspace& work = workspace(at_once);
  for (std::int64_t row = 0; row < rows.num_rows; row += at_once) {
    choose_rows(rows, row, std::min(at_once, rows.num_rows - row), team.num_threads(), work);
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
  PETALSD_CHECK(rows.num_rows > 0, "num_rows = ", rows.num_rows);
  PETALSD_CHECK(rows.bounds.size() >= 2 && rows.bounds.front() == 0 && rows.bounds.back() == rows.num_rows &&
                    std::is_sorted(rows.bounds.begin(), rows.bounds.end()),
                "bounds ascend from 0 to num_rows = ", rows.num_rows);
  PETALSD_CHECK(rows.kv.page_tokens > 0 && rows.kv.page_tokens % 16 == 0, "page_tokens = ", rows.kv.page_tokens,
                ": a multiple of 16");
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

// Cuts the rows by sequence, and these so that one pass over a sequence's pages serves as many rows as it can.
void Span::choose_rows(const StepRows& rows, std::int64_t first_row, std::int64_t num_rows, int num_threads,
                       SpanWorkspace& work) const {
  const BlockShape& shape = blocks_.front()->shape();
  const std::int64_t per_piece = std::max<std::int64_t>(1, kMaxQueries / (shape.num_heads / shape.num_kv_heads));
  work.first_row = first_row;
  work.num_rows = num_rows;
  work.attention.pieces.clear();
  const std::int64_t end = first_row + num_rows;
  for (std::size_t s = 0; s + 1 < rows.bounds.size(); ++s) {
    const std::int64_t last = std::min(rows.bounds[s + 1], end);
    for (std::int64_t row = std::max(rows.bounds[s], first_row); row < last; row += per_piece) {
      work.attention.pieces.push_back({row - first_row, std::min(per_piece, last - row), rows.positions[row],
                                       rows.origins + static_cast<std::int64_t>(s) * rows.origins_stride});
    }
  }
  work.attention.choose(shape, num_threads);
}

}  // namespace petalsd
