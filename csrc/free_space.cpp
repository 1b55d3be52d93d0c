#include "free_space.hpp"

#include <iterator>

#include "check.hpp"

namespace petalsd {

std::optional<Page> FreeSpace::take(Page pages) {
  const auto fit = by_size_.lower_bound({pages, 0});
  if (fit == by_size_.end()) return std::nullopt;
  const auto [length, first] = *fit;
  remove(first);
  if (length > pages) insert(first + pages, length - pages);
  return first;
}

std::pair<Page, Page> FreeSpace::take_some(Page pages) {
  if (const std::optional<Page> first = take(pages)) return {*first, pages};
  PETALSD_CHECK(total_ > 0, pages, " pages of nothing");
  const auto [length, first] = *by_size_.rbegin();
  remove(first);
  return {first, length};
}

void FreeSpace::give(Page first, Page pages) {
  const auto next = by_address_.lower_bound(first);
  const bool joins_next = next != by_address_.end() && next->first == first + pages;
  Page begin = first;
  Page end = first + pages;
  if (next != by_address_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == first) begin = previous->first;
  }
  if (joins_next) end += remove(next->first);
  if (begin != first) remove(begin);
  insert(begin, end - begin);
}

Page FreeSpace::remove(Page first) {
  const auto interval = by_address_.find(first);
  PETALSD_CHECK(interval != by_address_.end(), "no free interval starts at page ", first);
  const Page pages = interval->second;
  by_size_.erase({pages, first});
  by_address_.erase(interval);
  total_ -= pages;
  return pages;
}

void FreeSpace::insert(Page first, Page pages) {
  by_address_.emplace(first, pages);
  by_size_.emplace(pages, first);
  total_ += pages;
}

void FreeSpace::check_integrity() const {
  PETALSD_CHECK_EQUAL(by_address_.size(), by_size_.size(), "free intervals by address = by size");
  Page total = 0;
  Page previous_end = -1;
  for (const auto& [first, pages] : by_address_) {
    PETALSD_CHECK(first > previous_end, "free interval at page ", first, " touches the one that ends at ",
                  previous_end);
    PETALSD_CHECK(by_size_.count({pages, first}) == 1, "free interval at page ", first, " of ", pages,
                  " pages is not found by its size");
    previous_end = first + pages;
    total += pages;
  }
  PETALSD_CHECK_EQUAL(total, total_, "pages in free intervals = free pages counted");
}

}  // namespace petalsd
