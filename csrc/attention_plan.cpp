#include "attention_plan.hpp"

#include <algorithm>
#include <cstddef>

#include "span_workspace.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kMaxPartials = 2 << 20;  // floats: more rows than that occupy all threads as they are
constexpr std::int64_t kTurns = 2;  // shares of the work of a thread that may be in one piece

std::int64_t partial_floats(const QueryRows& piece, const BlockShape& shape) {
  return piece.num_rows * (shape.num_heads / shape.num_kv_heads) * (shape.head_dim + kPartialRoom);
}

}  // namespace

void AttentionPlan::choose(const BlockShape& shape, int num_threads) {
  parts_.clear();
  first_parts_.clear();
  num_kv_heads_ = shape.num_kv_heads;
  for (std::size_t piece = 0; piece + 1 < pieces.size(); ++piece) pieces[piece].next = &pieces[piece + 1];
  if (!is_worth_splitting(shape, num_threads)) return;
  std::int64_t at = 0;
  for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
    for (std::int64_t head = 0; head < num_kv_heads_; ++head) {
      first_parts_.push_back(static_cast<std::int64_t>(parts_.size()));
      for (std::int64_t index = 0; index < pieces[piece].num_parts(); ++index) {
        parts_.push_back({static_cast<std::int32_t>(piece), static_cast<std::int32_t>(head), index, at});
        at += partial_floats(pieces[piece], shape);
      }
    }
  }
  if (at <= partials_size_) return;
  partials_.reset(static_cast<float*>(::operator new(static_cast<std::size_t>(at) * sizeof(float), kAlignment)));
  partials_size_ = at;
}

// Where the longest piece would keep a thread busy while the others have nothing left.
bool AttentionPlan::is_worth_splitting(const BlockShape& shape, int num_threads) const {
  std::int64_t longest = 0;
  std::int64_t total = 0;
  std::int64_t floats = 0;
  for (const QueryRows& piece : pieces) {
    longest = std::max(longest, piece.num_parts());
    total += piece.num_parts() * shape.num_kv_heads;
    floats += piece.num_parts() * shape.num_kv_heads * partial_floats(piece, shape);
  }
  return num_threads > 1 && longest > 1 && longest * num_threads * kTurns > total && floats <= kMaxPartials;
}

float* AttentionPlan::partials(std::int64_t piece, std::int64_t kv_head) const {
  const std::int64_t first = first_parts_[static_cast<std::size_t>(piece * num_kv_heads_ + kv_head)];
  return partials(parts_[static_cast<std::size_t>(first)]);
}

}  // namespace petalsd
