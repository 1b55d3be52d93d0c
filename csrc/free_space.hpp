// Which pages of the pool, or slots of the spill file, are free: maximal intervals, found by address and by size.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace petalsd {

using Page = std::int32_t;  // a physical page, or a number of them

// Not thread-safe; RunStore and SpillSpace own one each. Every operation costs O(log intervals).
class FreeSpace {
 public:
  // Takes `pages` consecutive pages from the smallest interval that holds them (best fit: runs of one size
  // leave no splinters), the lowest one among equals. Nothing when no interval is long enough.
  std::optional<Page> take(Page pages);

  // As `take`, but where no interval is long enough, takes the whole of the longest: its first page and its length.
  // Requires that something is free.
  std::pair<Page, Page> take_some(Page pages);

  // Gives pages back; they must not be free. Joins them with their free neighbours.
  void give(Page first, Page pages);

  // Removes the interval that starts at `first`, which must exist; returns its length.
  Page remove(Page first);

  Page total() const { return total_; }

  // first -> length, ascending; no two intervals touch.
  const std::map<Page, Page>& intervals() const { return by_address_; }

  void check_integrity() const;

 private:
  void insert(Page first, Page pages);

  std::map<Page, Page> by_address_;
  std::set<std::pair<Page, Page>> by_size_;  // (length, first)
  Page total_ = 0;
};

}  // namespace petalsd
