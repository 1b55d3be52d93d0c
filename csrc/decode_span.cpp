#include "decode_span.hpp"

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

}  // namespace

DecodeSpan::DecodeSpan(std::vector<std::shared_ptr<const DecodeBlock>> blocks) : blocks_(std::move(blocks)) {
  PETALSD_CHECK(!blocks_.empty(), "a span has at least one block");
  const DecodeBlock& head = *blocks_.front();
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const DecodeBlock& block = *blocks_[i];
    PETALSD_CHECK_EQUAL(block.index(), head.index() + static_cast<std::int64_t>(i), "blocks of a span in order");
    PETALSD_CHECK(sizes(block.shape()) == sizes(head.shape()) && block.dtype() == head.dtype() &&
                      &block.tier().kernels == &head.tier().kernels,
                  "block ", block.index(), ": not of the same sizes, dtype and tier as block ", head.index());
  }
}

void DecodeSpan::run(const DecodeRows& rows, std::int64_t first, std::int64_t count, ThreadTeam& team) {
  const DecodeBlock& head = *blocks_.front();
  const auto num_blocks = static_cast<std::int64_t>(blocks_.size());
  const std::int64_t skipped = first - head.index();
  PETALSD_CHECK(0 <= skipped && 0 < count && count <= num_blocks - skipped, "blocks ", first, " to ", first + count,
                " of a span from ", head.index(), " to ", head.index() + num_blocks);
  PETALSD_CHECK(rows.num_rows > 0, "num_rows = ", rows.num_rows);
  const DecodeKernels& kernels = head.tier().kernels;
  const std::int64_t num_states = rows.num_rows * head.shape().hidden_size;
  const DecodeWorkspace& work = workspace(rows.num_rows);
  kernels.load(rows.hidden, work.hidden, num_states);
  for (std::int64_t i = skipped; i < skipped + count; ++i) {
    blocks_[static_cast<std::size_t>(i)]->run(rows, work, team);
  }
  kernels.store(work.hidden, rows.out, num_states);
}

const DecodeWorkspace& DecodeSpan::workspace(std::int64_t num_rows) {
  if (workspace_ == nullptr || workspace_->max_rows() < num_rows) {
    const DecodeBlock& head = *blocks_.front();
    workspace_ = std::make_unique<DecodeWorkspace>(head.shape(), head.tier().kernels, num_rows);
  }
  return *workspace_;
}

}  // namespace petalsd
