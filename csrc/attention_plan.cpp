#include "attention_plan.hpp"

#include <algorithm>
#include <cstddef>

#include "check.hpp"
#include "lanes.hpp"
#include "span_workspace.hpp"
#include "thread_team.hpp"

namespace petalsd {

namespace {

constexpr std::int64_t kMaxPartials = 2 << 20;  // floats: more rows than that occupy all threads as they are
constexpr std::int64_t kTurns = 2;  // shares of the work of a thread that may be in one piece

std::int64_t partial_floats(const QueryRows& piece, const BlockShape& shape) {
  return piece.num_rows * (shape.num_heads / shape.num_kv_heads) * (shape.head_dim + kPartialRoom);
}

}  // namespace

void Sequences::check(const KVPages& kv) const {
  PETALSD_CHECK(bounds.size() >= 2 && bounds.front() == 0 && std::is_sorted(bounds.begin(), bounds.end()),
                "bounds ascend from 0");
  PETALSD_CHECK(num_rows() > 0, "num_rows = ", num_rows());
  PETALSD_CHECK(kv.page_tokens > 0 && kv.page_tokens % 16 == 0, "page_tokens = ", kv.page_tokens,
                ": a multiple of 16");
}

void AttentionPlan::cut(const Sequences& sequences, std::int64_t first_row, std::int64_t num_rows,
                        const BlockShape& shape) {
  const std::int64_t per_piece = std::max<std::int64_t>(1, kMaxQueries / (shape.num_heads / shape.num_kv_heads));
  const std::int64_t end = first_row + num_rows;
  pieces.clear();
  for (std::size_t s = 0; s + 1 < sequences.bounds.size(); ++s) {
    const std::int64_t last = std::min(sequences.bounds[s + 1], end);
    for (std::int64_t row = std::max(sequences.bounds[s], first_row); row < last; row += per_piece) {
      pieces.push_back({row - first_row, std::min(per_piece, last - row), sequences.positions[row],
                        sequences.origins + static_cast<std::int64_t>(s) * sequences.origins_stride});
    }
  }
}

void AttentionPlan::choose(const Sequences& sequences, std::int64_t first_row, std::int64_t num_rows,
                           const BlockShape& shape, int num_threads) {
  cut(sequences, first_row, num_rows, shape);
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

namespace {

void attend_by_parts(const AttentionTask& task, const AttentionKernels& kernels, const AttentionPlan& plan,
                     ThreadTeam& team) {
  const auto num_parts = static_cast<std::int64_t>(plan.parts().size());
  const Lanes lanes(num_parts, team);
  team.run(num_parts, [&](std::int64_t claim) {
    const AttentionPlan::Part& part = plan.parts()[static_cast<std::size_t>(lanes.at(claim))];
    const QueryRows& piece = plan.pieces[static_cast<std::size_t>(part.piece)];
    kernels.attend(task, piece, part.kv_head, {part.index, part.index + 1}, plan.partials(part));
  });
  team.run(static_cast<std::int64_t>(plan.pieces.size()), [&](std::int64_t i) {
    const QueryRows& piece = plan.pieces[static_cast<std::size_t>(i)];
    for (std::int64_t head = 0; head < task.kv.num_kv_heads; ++head) {
      kernels.merge_parts(task, piece, head, plan.partials(i, head), piece.num_parts());
    }
  });
}

}  // namespace

void attend(const AttentionTask& task, const AttentionKernels& kernels, const AttentionPlan& plan, ThreadTeam& team) {
  if (!plan.parts().empty()) {
    attend_by_parts(task, kernels, plan, team);
    return;
  }
  const std::int64_t num_kv_heads = task.kv.num_kv_heads;
  const std::int64_t num_tasks = static_cast<std::int64_t>(plan.pieces.size()) * num_kv_heads;
  const Lanes lanes(num_tasks, team);
  team.run(num_tasks, [&](std::int64_t claim) {
    const std::int64_t i = lanes.at(claim);
    const QueryRows& piece = plan.pieces[static_cast<std::size_t>(i / num_kv_heads)];
    kernels.attend(task, piece, i % num_kv_heads, {0, piece.num_parts()}, nullptr);
  });
}

}  // namespace petalsd
