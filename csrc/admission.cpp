#include "admission.hpp"

#include <algorithm>
#include <utility>

#include "check.hpp"

namespace petalsd {

AdmissionQueue::AdmissionQueue(const AdmissionRules& rules) : rules_(rules) {
  PETALSD_CHECK(0.0 < rules.max_peer_share && rules.max_peer_share <= 1.0, "max_peer_share = ", rules.max_peer_share,
                ": a share is above 0 and at most 1");
}

void AdmissionQueue::push(Applicant applicant, double now_s) { waiting_.push_back({std::move(applicant), now_s, 0}); }

std::vector<Handle> AdmissionQueue::serve(std::int64_t capacity, double now_s,
                                          const std::function<bool(std::int64_t)>& promise) {
  std::vector<Handle> served;
  std::vector<Waiter*> passed;  // wait for more than there is, before the one that is looked at
  const auto is_in_line = [&](const Waiter* waiter) { return !is_capped(waiter->applicant, capacity); };
  const auto holds_up = [&](const Waiter* waiter) { return is_in_line(waiter) && !lets_pass(*waiter, now_s); };
  for (auto at = waiting_.begin(); at != waiting_.end();) {
    if (std::any_of(passed.begin(), passed.end(), holds_up)) break;
    const Applicant& applicant = at->applicant;
    if (is_capped(applicant, capacity)) {
      ++at;
    } else if (!promise(applicant.credit)) {
      passed.push_back(&*at);
      ++at;
    } else {
      for (Waiter* waiter : passed) waiter->bypasses += is_in_line(waiter) ? 1 : 0;
      hold(applicant.peer, applicant.credit);
      served.push_back(applicant.handle);
      at = waiting_.erase(at);
    }
  }
  return served;
}

void AdmissionQueue::withdraw(Handle handle) {
  waiting_.remove_if([handle](const Waiter& waiter) { return waiter.applicant.handle == handle; });
}

void AdmissionQueue::give_back(const std::string& peer, std::int64_t credit) {
  const auto found = held_.find(peer);
  if (found == held_.end()) return;
  found->second -= credit;
  if (found->second == 0) held_.erase(found);
}

void AdmissionQueue::pass_on(const std::string& from, const std::string& to, std::int64_t credit) {
  give_back(from, credit);
  hold(to, credit);
}

std::int64_t AdmissionQueue::held_by(const std::string& peer) const {
  const auto found = held_.find(peer);
  return found == held_.end() ? 0 : found->second;
}

bool AdmissionQueue::is_capped(const Applicant& applicant, std::int64_t capacity) const {
  const std::int64_t held = held_by(applicant.peer);
  const double share = rules_.max_peer_share * static_cast<double>(capacity);
  return held > 0 && static_cast<double>(held + applicant.credit) > share;
}

void AdmissionQueue::check_integrity(const std::unordered_map<std::string, std::int64_t>& held) const {
  PETALSD_CHECK_EQUAL(held.size(), held_.size(), "peers with open sessions = peers that hold credit");
  for (const auto& [peer, credit] : held) {
    PETALSD_CHECK_EQUAL(credit, held_by(peer), "credit of a peer's open sessions = credit that it holds");
  }
  double previous_s = waiting_.empty() ? 0.0 : waiting_.front().since_s;
  for (const Waiter& waiter : waiting_) {
    PETALSD_CHECK(previous_s <= waiter.since_s, "a request that came later waits before an earlier one");
    PETALSD_CHECK(waiter.bypasses <= rules_.max_bypasses, "a request was passed ", waiter.bypasses, " times");
    previous_s = waiter.since_s;
  }
}

}  // namespace petalsd
