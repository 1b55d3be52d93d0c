// Consecutive blocks for a step in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "span_block.hpp"

namespace petalsd {

// The states stay float32 from the first block of a call to its last; only then are they rounded to the dtype.
//
// `run` is called by one thread at a time.
class Span {
 public:
  // At least one block; their indices follow one another, and they have the same sizes and tier. PoolError otherwise.
  explicit Span(std::vector<std::shared_ptr<const SpanBlock>> blocks);

  // Takes the rows through blocks first to first + count - 1, by their indices; PoolError unless the span has them and
  // the rows fit it. Many rows go in groups, each through all blocks: within a sequence, later ones see earlier ones.
  void run(const StepRows& rows, std::int64_t first, std::int64_t count, ThreadTeam& team);

 private:
  void check(const StepRows& rows, std::int64_t first, std::int64_t count) const;
  SpanWorkspace& workspace(std::int64_t num_rows);

  const std::vector<std::shared_ptr<const SpanBlock>> blocks_;
  std::unique_ptr<SpanWorkspace> workspace_;  // of the largest step so far: fresh memory costs page faults
};

}  // namespace petalsd
