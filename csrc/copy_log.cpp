#include "copy_log.hpp"

#include "check.hpp"

namespace petalsd {

void CopyLog::add(Page source, Page target, Page pages) {
  for (Page page = 0; page < pages; ++page) pending_.push_back({source + page, target + page});
  total_ += pages;
}

std::vector<Copy> CopyLog::take_group(std::size_t limit) {
  PETALSD_CHECK(limit > 0, "the limit of a group of copies must be positive");
  std::vector<Copy> group;
  while (taken_ < pending_.size() && group.size() < limit) {
    const Copy copy = pending_[taken_];
    if (is_target_[copy.source] || is_target_[copy.target]) break;
    is_target_[copy.target] = true;
    group.push_back(copy);
    ++taken_;
  }
  for (const Copy& copy : group) is_target_[copy.target] = false;
  if (taken_ == pending_.size()) {
    pending_.clear();
    taken_ = 0;
  }
  return group;
}

}  // namespace petalsd
