#include "run_store.hpp"

#include <limits>
#include <optional>

#include "check.hpp"

namespace petalsd {

RunStore::RunStore(Page num_pages) : num_pages_(num_pages), run_at_(num_pages), copies_(num_pages) {
  free_.give(1, num_pages - 1);
}

RunId RunStore::create(Page pages) {
  RunId run;
  if (free_ids_.empty()) {
    run = static_cast<RunId>(runs_.size());
    runs_.push_back({kNowhere, 0, 0});
  } else {
    run = free_ids_.back();
    free_ids_.pop_back();
  }
  runs_[run] = {kNowhere, pages, 1};
  settle(run);
  return run;
}

void RunStore::settle(RunId run) {
  const Page pages = runs_[run].pages;
  PETALSD_CHECK(1 <= pages && pages <= free_.total(), "a run of ", pages, " pages from ", free_.total(), " free ones");
  std::optional<Page> first = free_.take(pages);
  if (!first) {
    slide_down(cheapest_window(pages));
    first = free_.take(pages);
  }
  runs_[run].first = first.value();
  run_at_[*first] = run;
}

void RunStore::vacate(RunId run) {
  free_.give(runs_[run].first, runs_[run].pages);
  runs_[run].first = kNowhere;
}

RunId RunStore::duplicate(RunId source) {
  const RunId target = create(runs_[source].pages);
  // Only now: making room may have moved the source.
  copies_.add(runs_[source].first, runs_[target].first, runs_[target].pages);
  return target;
}

void RunStore::retain(RunId run) {
  if (++runs_[run].references == 2) shared_pages_ += runs_[run].pages;
}

bool RunStore::release(RunId run) {
  Run& released = runs_[run];
  PETALSD_CHECK(released.references > 0, "run ", run, " is released once too often");
  --released.references;
  if (released.references == 1) shared_pages_ -= released.pages;
  if (released.references > 0) return false;
  if (is_resident(run)) vacate(run);
  free_ids_.push_back(run);
  return true;
}

// The stretch of addresses, from the start of a free interval to the end of another, that holds `pages` free
// pages and the fewest used ones: sliding its runs together is the least copying that makes room in one place.
RunStore::Window RunStore::cheapest_window(Page pages) const {
  const auto& intervals = free_.intervals();
  auto low = intervals.begin();
  Window best{0, 0};
  Page best_cost = std::numeric_limits<Page>::max();
  Page free = 0;
  for (const auto& [first, length] : intervals) {
    free += length;
    while (free - low->second >= pages) {
      free -= low->second;
      ++low;
    }
    const Page cost = first + length - low->first - free;
    if (free >= pages && cost < best_cost) {
      best = {low->first, first + length};
      best_cost = cost;
    }
  }
  return best;
}

// Before:  begin| free  A A A  free  B B  free |end        After:  begin| A A A  B B      free       |end
void RunStore::slide_down(Window window) {
  Page target = window.begin;
  Page page = window.begin;
  while (page < window.end) {
    if (free_.intervals().count(page) != 0) {
      page += free_.remove(page);
    } else {
      const Page pages = move_down(page, target);
      page += pages;
      target += pages;
    }
  }
  free_.give(target, window.end - target);
}

// Moves the run at `from` to the lower address `to`; returns its length.
Page RunStore::move_down(Page from, Page to) {
  const RunId run = run_at_[from];
  copies_.add(from, to, runs_[run].pages);
  runs_[run].first = to;
  run_at_[to] = run;
  moved_pages_ += runs_[run].pages;
  return runs_[run].pages;
}

void RunStore::check_integrity(const std::vector<std::int32_t>& references) const {
  free_.check_integrity();
  PETALSD_CHECK_EQUAL(references.size(), runs_.size(), "run ids in the tables = run ids made");
  std::vector<bool> is_seen(num_pages_, false);
  Page used = 0;
  Page shared = 0;
  const auto claim = [&](Page first, Page pages) {
    PETALSD_CHECK(1 <= first && first + pages <= num_pages_, "pages ", first, " to ", first + pages - 1,
                  " lie outside 1 to ", num_pages_ - 1);
    for (Page page = first; page < first + pages; ++page) {
      PETALSD_CHECK(!is_seen[page], "page ", page, " has two owners");
      is_seen[page] = true;
    }
  };
  for (const auto& [first, pages] : free_.intervals()) claim(first, pages);
  std::size_t num_unused_ids = 0;
  for (std::size_t id = 0; id < runs_.size(); ++id) {
    const Run& run = runs_[id];
    PETALSD_CHECK_EQUAL(references[id], run.references, "references to run ", id, " in the tables = counted");
    if (run.references == 0) {
      ++num_unused_ids;
      continue;
    }
    if (run.references > 1) shared += run.pages;
    if (!is_resident(static_cast<RunId>(id))) continue;
    claim(run.first, run.pages);
    PETALSD_CHECK_EQUAL(run_at_[run.first], static_cast<RunId>(id), "run found at page ", run.first, " = run there");
    used += run.pages;
  }
  PETALSD_CHECK_EQUAL(num_unused_ids, free_ids_.size(), "runs without references = free run ids");
  PETALSD_CHECK_EQUAL(used + free_.total(), num_pages_ - 1, "used + free pages = pages of the pool");
  PETALSD_CHECK_EQUAL(shared, shared_pages_, "pages in shared runs = shared pages counted");
}

}  // namespace petalsd
