// Which slots of the spill file hold which runs.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "free_space.hpp"
#include "run_store.hpp"

namespace petalsd {

// Consecutive slots of the file; a slot holds one page.
struct Extent {
  Page slot;
  Page pages;
};

// A run's place may be in several pieces, so the slots never need to be moved together: as long as enough are free,
// `store` finds room. Knows nothing of memory and nothing of the file itself.
//
// Not thread-safe; PagePool owns it.
class SpillSpace {
 public:
  using Extents = std::vector<Extent>;

  // There are `slots` from now on, not fewer than before.
  void grow_to(Page slots);

  // There are none from now on; requires that none is used.
  void clear();

  // A place for `pages` pages of the run, in the order of its pages. Requires that it has none and that they are free.
  const Extents& store(RunId run, Page pages);

  // Forgets the run's place; nothing when it has none.
  void drop(RunId run);

  bool holds(RunId run) const { return places_.count(run) != 0; }
  const Extents& find(RunId run) const { return places_.at(run); }
  Page size() const { return size_; }
  Page used() const { return size_ - free_.total(); }

  void check_integrity() const;

 private:
  FreeSpace free_;
  std::unordered_map<RunId, Extents> places_;
  Page size_ = 0;
};

}  // namespace petalsd
