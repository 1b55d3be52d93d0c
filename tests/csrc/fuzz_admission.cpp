// Random requests on the admission queue, each answer held against its rules; built under sanitizers by sanitize.sh.
//
//     fuzz_admission CALLS SEED
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "admission.hpp"
#include "check.hpp"

namespace petalsd {
namespace {

constexpr std::int64_t kCapacity = 100;
const AdmissionRules kRules{0.6, 5.0, 4};

struct Waiter {
  Applicant applicant;
  double since_s;
  int bypasses = 0;
};

// Knows what the rules say, in the plainest words.
class Rules {
 public:
  Rules(unsigned seed) : random_(seed), queue_(kRules) {}

  void call() {
    now_s_ += random_() % 4 == 0 ? 1.0 : 0.01;
    switch (random_() % 4) {
      case 0:
      case 1:
        ask();
        break;
      case 2:
        if (!open_.empty()) close();
        break;
      default:
        if (!waiting_.empty() && random_() % 5 == 0) give_up();
    }
    serve();
    queue_.check_integrity(held_);
    PETALSD_CHECK_EQUAL(queue_.size(), waiting_.size(), "waiters = waiters of the model");
    const double oldest_s = waiting_.empty() ? 0.0 : now_s_ - waiting_.front().since_s;
    PETALSD_CHECK_EQUAL(queue_.oldest_wait_s(now_s_), oldest_s, "age of the oldest = age in the model");
  }

  void print() const {
    std::printf("%d served, %d of them past others, %d held up by a bound\n", num_served_, num_bypasses_, num_held_up_);
    PETALSD_CHECK(num_bypasses_ > 50 && num_held_up_ > 50, "the fuzz was too easy");
  }

 private:
  void ask() {
    if (waiting_.size() > 12) return;
    static const std::vector<std::string> peers{"", "one", "two", "three"};
    const std::int64_t credit = random_() % 3 == 0 ? 40 + random_() % 61 : 1 + random_() % 20;
    const Applicant applicant{next_++, credit, peers[random_() % peers.size()]};
    queue_.push(applicant, now_s_);
    waiting_.push_back({applicant, now_s_});
  }

  void close() {
    auto closed = open_.begin();
    std::advance(closed, random_() % open_.size());
    const Applicant& applicant = closed->second;
    reserved_ -= applicant.credit;
    queue_.give_back(applicant.peer, applicant.credit);
    if (!applicant.peer.empty() && (held_[applicant.peer] -= applicant.credit) == 0) held_.erase(applicant.peer);
    open_.erase(closed);
  }

  void give_up() {
    const auto at = waiting_.begin() + static_cast<std::ptrdiff_t>(random_() % waiting_.size());
    queue_.withdraw(at->applicant.handle);
    waiting_.erase(at);
  }

  void serve() {
    const auto promise = [this](std::int64_t credit) {
      if (reserved_ + credit > kCapacity) return false;
      reserved_ += credit;
      return true;
    };
    for (const Handle handle : queue_.serve(kCapacity, now_s_, promise)) check_served(handle);
    for (std::size_t index = 0; index < waiting_.size(); ++index) check_waits_rightly(index);
  }

  void check_served(Handle handle) {
    const auto is_it = [handle](const Waiter& waiter) { return waiter.applicant.handle == handle; };
    const auto at = std::find_if(waiting_.begin(), waiting_.end(), is_it);
    PETALSD_CHECK(at != waiting_.end(), "somebody was served who does not wait");
    PETALSD_CHECK(!is_capped(at->applicant), "a peer got more than its share");
    ++num_served_;
    for (auto before = waiting_.begin(); before != at; ++before) {
      if (is_capped(before->applicant)) continue;
      PETALSD_CHECK(lets_pass(*before), "somebody was passed after ", now_s_ - before->since_s, " s and ",
                    before->bypasses, " times");
      ++before->bypasses;
      ++num_bypasses_;
    }
    if (!at->applicant.peer.empty()) held_[at->applicant.peer] += at->applicant.credit;
    open_[handle] = at->applicant;
    waiting_.erase(at);
  }

  // Its peer holds its share, or there is not enough for it, or somebody before it may not be passed.
  void check_waits_rightly(std::size_t index) {
    const Applicant& applicant = waiting_[index].applicant;
    if (is_capped(applicant) || reserved_ + applicant.credit > kCapacity) return;
    const auto holds_up = [this](const Waiter& waiter) { return !is_capped(waiter.applicant) && !lets_pass(waiter); };
    PETALSD_CHECK(std::any_of(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(index), holds_up),
                  "somebody waits for ", applicant.credit, " with ", kCapacity - reserved_, " free and nobody before");
    ++num_held_up_;
  }

  bool is_capped(const Applicant& applicant) const {
    const auto held = held_.find(applicant.peer);
    return held != held_.end() && held->second + applicant.credit > kRules.max_peer_share * kCapacity;
  }

  bool lets_pass(const Waiter& waiter) const {
    return now_s_ - waiter.since_s < kRules.bypass_wait_s && waiter.bypasses < kRules.max_bypasses;
  }

  std::mt19937 random_;
  AdmissionQueue queue_;
  std::vector<Waiter> waiting_;
  std::map<Handle, Applicant> open_;
  std::unordered_map<std::string, std::int64_t> held_;
  std::int64_t reserved_ = 0;
  Handle next_ = 1;
  double now_s_ = 0.0;
  int num_served_ = 0;
  int num_bypasses_ = 0;
  int num_held_up_ = 0;
};

}  // namespace
}  // namespace petalsd

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: fuzz_admission CALLS SEED\n");
    return 2;
  }
  try {
    petalsd::Rules rules(static_cast<unsigned>(std::atoi(argv[2])));
    for (std::int64_t left = std::atoll(argv[1]); left > 0; --left) rules.call();
    rules.print();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
