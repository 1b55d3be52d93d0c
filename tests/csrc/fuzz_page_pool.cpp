// Random calls on the page pool against a naive model; built under sanitizers by sanitize.sh.
//
//     fuzz_page_pool alone CALLS SEED [DISK_PAGES]      one thread; the same seed makes the same calls
//     fuzz_page_pool together CALLS SEED [DISK_PAGES]   one thread runs batches, another opens and closes sessions
//
// Exits 0 when every row read its own tokens and the books balanced all the way.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "fake_engine.hpp"

namespace petalsd {
namespace {

// The other side: asks for sessions, hands granted ones to the engine, closes some of all kinds.
class Clients {
 public:
  explicit Clients(PagePool& pool) : pool_(pool) {}

  void call(Random& random) {
    if (waiting_.size() < 3 && random.one_in(3)) request(random);
    collect();
    if (!open_.empty() && random.one_in(30)) close(random.choice(open_));
    if (!waiting_.empty() && random.one_in(40)) close(waiting_.begin()->first);
    if (random.one_in(50)) pool_.check_integrity();
    const PoolStats stats = pool_.stats();
    PETALSD_CHECK_EQUAL(stats.pages_free + stats.pages_mapped, stats.pages_total, "free + mapped pages = all pages");
  }

  void close_all() {
    while (!open_.empty()) close(open_.back());
    while (!waiting_.empty()) close(waiting_.begin()->first);
  }

  // Sessions opened and closed since the last call.
  std::pair<std::map<Handle, SessionShape>, std::vector<Handle>> take_news() {
    const std::lock_guard lock(mutex_);
    return {std::exchange(opened_, {}), std::exchange(closed_, {})};
  }

 private:
  void request(Random& random) {
    const SessionShape shape = random.shape();
    try {
      waiting_[pool_.request(shape, random.choice(std::vector<std::string>{"", "one", "two"}))] = shape;
    } catch (const OutOfPages&) {
    }
  }

  void collect() {
    const std::vector<Handle> handles = pool_.granted();
    const std::lock_guard lock(mutex_);
    for (const Handle handle : handles) {
      opened_[handle] = waiting_.at(handle);
      waiting_.erase(handle);
      open_.push_back(handle);
    }
  }

  void close(Handle handle) {
    pool_.close(handle);
    pool_.close(handle);  // the second close of a handle does nothing
    waiting_.erase(handle);
    open_.erase(std::remove(open_.begin(), open_.end(), handle), open_.end());
    const std::lock_guard lock(mutex_);
    closed_.push_back(handle);
    opened_.erase(handle);
  }

  PagePool& pool_;
  std::map<Handle, SessionShape> waiting_;
  std::vector<Handle> open_;
  std::mutex mutex_;  // for what follows, the news for the engine
  std::map<Handle, SessionShape> opened_;
  std::vector<Handle> closed_;
};

void hear(FakeEngine& engine, Clients& clients) {
  const auto [opened, closed] = clients.take_news();
  for (const auto& [handle, shape] : opened) engine.admit(handle, shape);
  for (const Handle handle : closed) engine.forget(handle);
}

void run_alone(PagePool& pool, FakeDisk* disk, std::int64_t calls, unsigned seed) {
  Random random(seed);
  FakeEngine engine(pool, disk);
  Clients clients(pool);
  for (std::int64_t i = 0; i < calls; ++i) {
    if (random.one_in(3)) clients.call(random);
    hear(engine, clients);
    engine.call(random);
    if (random.one_in(20)) pool.check_integrity();
    if (random.one_in(50)) engine.check_contents();
  }
  clients.close_all();
  const PoolStats stats = pool.stats();
  PETALSD_CHECK(stats.pages_moved > 0 && stats.copies > stats.pages_moved, "the fuzz was too easy: ", stats.copies,
                " copies, ", stats.pages_moved, " moves");
  PETALSD_CHECK(disk == nullptr || stats.pages_restored > calls / 10, "the fuzz was too easy: ", stats.pages_restored,
                " pages came back from the disk");
}

void run_together(PagePool& pool, FakeDisk* disk, std::int64_t calls, unsigned seed) {
  FakeEngine engine(pool, disk);
  Clients clients(pool);
  std::atomic<bool> is_done{false};
  std::exception_ptr failures[2];
  std::thread client_thread([&] {
    Random random(seed + 1);
    try {
      while (!is_done) clients.call(random);
    } catch (...) {
      failures[0] = std::current_exception();
      is_done = true;
    }
  });
  try {
    Random random(seed);
    for (std::int64_t i = 0; i < calls && !is_done;) {
      hear(engine, clients);
      if (engine.call(random)) {
        ++i;
      } else {
        std::this_thread::yield();  // the other thread has opened none yet
      }
    }
  } catch (...) {
    failures[1] = std::current_exception();
  }
  is_done = true;
  client_thread.join();
  for (const auto& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
  clients.close_all();
}

void check_empty(const PagePool& pool) {
  pool.check_integrity();
  const PoolStats stats = pool.stats();
  PETALSD_CHECK_EQUAL(stats.pages_mapped + stats.pages_spilled + stats.pages_reserved, 0,
                      "pages held after all sessions closed = none");
  std::printf("%lld page copies, %lld of them moves, %lld pages restored, at most %d of %d pages mapped\n",
              static_cast<long long>(stats.copies), static_cast<long long>(stats.pages_moved),
              static_cast<long long>(stats.pages_restored), stats.high_water, stats.pages_total);
}

}  // namespace
}  // namespace petalsd

int main(int argc, char** argv) {
  const std::string mode = argc == 4 || argc == 5 ? argv[1] : "";
  if (mode != "alone" && mode != "together") {
    std::fprintf(stderr, "usage: fuzz_page_pool alone|together CALLS SEED [DISK_PAGES]\n");
    return 2;
  }
  const std::int64_t calls = std::atoll(argv[2]);
  const auto seed = static_cast<unsigned>(std::atoi(argv[3]));
  try {
    const auto disk = argc == 5 ? std::make_shared<petalsd::FakeDisk>(std::atoll(argv[4])) : nullptr;
    const petalsd::AdmissionRules rules{0.7, 0.001, 3};
    petalsd::PagePool pool(petalsd::kNumPages, petalsd::kPageTokens, rules, disk);
    (mode == "alone" ? petalsd::run_alone : petalsd::run_together)(pool, disk.get(), calls, seed);
    petalsd::check_empty(pool);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
