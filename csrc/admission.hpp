// Who gets credit when: a queue with a bounded bypass and a bound for each peer.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

namespace petalsd {

// Names one request for pages and the session that it becomes. Never used twice.
using Handle = std::int64_t;

struct AdmissionRules {
  double max_peer_share = 1.0;  // of all credit that one peer may hold, in (0, 1]
  double bypass_wait_s = 2.0;   // who has waited this long is not passed any more
  int max_bypasses = 8;         // nor who was passed so often
};

struct Applicant {
  Handle handle;
  std::int64_t credit;  // pages
  std::string peer;     // empty: nobody in particular, without a bound
};

// Pure: knows no pages and no clock. Times are seconds of one monotonic clock, passed in.
//
// Requests are served in the order they came, with two exceptions. A request whose credit is there may pass others
// that want more than there is, while each of them has waited less than `bypass_wait_s` and was passed less than
// `max_bypasses` times: so small sessions use what a large one cannot yet, and yet nobody waits for ever. And a peer
// that holds its share waits for itself and is in nobody's way; its first session is granted whatever its size, so a
// share never forbids a session that the pool can hold.
//
// Not thread-safe; PagePool owns it.
class AdmissionQueue {
 public:
  explicit AdmissionQueue(const AdmissionRules& rules);

  void push(Applicant applicant, double now_s);

  // Serves whoever's turn it is: `promise(credit)` promises so many pages, or says that it cannot. Returns who was
  // served, in order. `capacity` is all credit that there is, promised or not: what shares are of.
  std::vector<Handle> serve(std::int64_t capacity, double now_s, const std::function<bool(std::int64_t)>& promise);

  // Withdraws a request that waits; nothing when it doesn't.
  void withdraw(Handle handle);

  // The peer gives back credit that was promised to it.
  void give_back(const std::string& peer, std::int64_t credit);

  // Credit that was promised to one peer is held by another from now on, whatever that holds.
  void pass_on(const std::string& from, const std::string& to, std::int64_t credit);

  std::size_t size() const { return waiting_.size(); }
  std::int64_t held_by(const std::string& peer) const;
  double oldest_wait_s(double now_s) const { return waiting_.empty() ? 0.0 : now_s - waiting_.front().since_s; }

  bool is_capped(const Applicant& applicant, std::int64_t capacity) const;

  // `held`: credit of all open sessions by peer, as counted by their owner.
  void check_integrity(const std::unordered_map<std::string, std::int64_t>& held) const;

 private:
  struct Waiter {
    Applicant applicant;
    double since_s;
    int bypasses;
  };

  void hold(const std::string& peer, std::int64_t credit) {
    if (!peer.empty()) held_[peer] += credit;
  }
  bool lets_pass(const Waiter& waiter, double now_s) const {
    return now_s - waiter.since_s < rules_.bypass_wait_s && waiter.bypasses < rules_.max_bypasses;
  }

  const AdmissionRules rules_;
  std::list<Waiter> waiting_;
  std::unordered_map<std::string, std::int64_t> held_;  // of peers that hold any
};

}  // namespace petalsd
