// Page copies that the pool has decided and the device has not made yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "free_space.hpp"

namespace petalsd {

struct Copy {
  Page source;
  Page target;
};

// The log is in the order of the decisions, and made in that order it is right whatever happened in between: a
// page may be a target and then a source (copy on write, then a move of the copy), or be freed and taken again
// while it is still a source, because whoever overwrites it does so later in the log or in a later batch.
//
// Not thread-safe; RunStore owns it.
class CopyLog {
 public:
  explicit CopyLog(Page num_pages) : is_target_(static_cast<std::size_t>(num_pages), false) {}

  // Logs the copy of `pages` pages in ascending order, so that a run may move down onto itself.
  void add(Page source, Page target, Page pages);

  // Removes and returns the longest beginning of the log, of at most `limit` copies, in which no page is read
  // or written after it was written. Reading all its sources and then writing all its targets is the same as
  // making its copies one by one. Empty when nothing is pending; `limit` must be positive.
  std::vector<Copy> take_group(std::size_t limit);

  std::int64_t total() const { return total_; }  // copies ever logged

 private:
  std::vector<Copy> pending_;
  std::size_t taken_ = 0;        // how much of pending_ has been taken
  std::vector<bool> is_target_;  // scratch of take_group, all false outside it
  std::int64_t total_ = 0;
};

}  // namespace petalsd
