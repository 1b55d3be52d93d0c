// Consecutive blocks for a decode step in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decode_block.hpp"

namespace petalsd {

// The states stay float32 from the first block of a call to its last; only then are they rounded to the dtype.
//
// `run` is called by one thread at a time.
class DecodeSpan {
 public:
  // At least one block; their indices follow one another, and they have the same sizes, dtype and tier. PoolError
  // otherwise.
  explicit DecodeSpan(std::vector<std::shared_ptr<const DecodeBlock>> blocks);

  // Takes the rows through blocks first to first + count - 1, by their indices; PoolError unless the span has them.
  void run(const DecodeRows& rows, std::int64_t first, std::int64_t count, ThreadTeam& team);

 private:
  const DecodeWorkspace& workspace(std::int64_t num_rows);

  const std::vector<std::shared_ptr<const DecodeBlock>> blocks_;
  std::unique_ptr<DecodeWorkspace> workspace_;  // of the largest batch so far: fresh memory costs page faults
};

}  // namespace petalsd
