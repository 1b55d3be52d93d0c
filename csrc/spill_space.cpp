#include "spill_space.hpp"

#include "check.hpp"

namespace petalsd {

void SpillSpace::grow_to(Page slots) {
  PETALSD_CHECK(slots >= size_, "the spill file cannot shrink from ", size_, " to ", slots, " slots");
  if (slots > size_) free_.give(size_, slots - size_);
  size_ = slots;
}

void SpillSpace::clear() {
  PETALSD_CHECK_EQUAL(used(), 0, "used slots of a spill file that is given up = none");
  free_ = FreeSpace();
  size_ = 0;
}

const SpillSpace::Extents& SpillSpace::store(RunId run, Page pages) {
  PETALSD_CHECK(pages <= free_.total(), "a place for ", pages, " pages in ", free_.total(), " free slots");
  PETALSD_CHECK(!holds(run), "run ", run, " has a place in the spill file");
  Extents& extents = places_[run];
  for (Page left = pages; left > 0; left -= extents.back().pages) {
    const auto [slot, taken] = free_.take_some(left);
    extents.push_back({slot, taken});
  }
  return extents;
}

void SpillSpace::drop(RunId run) {
  const auto found = places_.find(run);
  if (found == places_.end()) return;
  for (const Extent& extent : found->second) free_.give(extent.slot, extent.pages);
  places_.erase(found);
}

void SpillSpace::check_integrity() const {
  free_.check_integrity();
  std::vector<bool> is_seen(static_cast<std::size_t>(size_), false);
  const auto claim = [&](Page first, Page pages) {
    PETALSD_CHECK(0 <= first && first + pages <= size_, "slots ", first, " to ", first + pages - 1,
                  " lie outside 0 to ", size_ - 1);
    for (Page slot = first; slot < first + pages; ++slot) {
      PETALSD_CHECK(!is_seen[slot], "slot ", slot, " has two owners");
      is_seen[slot] = true;
    }
  };
  for (const auto& [first, pages] : free_.intervals()) claim(first, pages);
  Page stored = 0;
  for (const auto& [run, extents] : places_) {
    for (const Extent& extent : extents) {
      claim(extent.slot, extent.pages);
      stored += extent.pages;
    }
  }
  PETALSD_CHECK_EQUAL(stored, used(), "slots of runs = used slots");
}

}  // namespace petalsd
