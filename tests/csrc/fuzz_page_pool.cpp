// Random calls on the page pool against a naive model; built under sanitizers by sanitize.sh.
//
//     fuzz_page_pool alone CALLS SEED      one thread; the same seed makes the same calls
//     fuzz_page_pool together CALLS SEED   one thread runs batches, another opens and closes sessions
//
// Exits 0 when every row read its own tokens and the books balanced all the way.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "page_pool.hpp"

namespace petalsd {
namespace {

constexpr std::int64_t kNumPages = 300;
constexpr std::int64_t kPageTokens = 3;
constexpr std::int64_t kMaxTokens = 18;
constexpr std::int64_t kMaxRuns = kMaxTokens / kPageTokens;
constexpr std::int64_t kMaxBatch = 3;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  SessionShape shape() { return {between(0, 9), between(1, 12), between(1, kMaxBatch), between(1, kMaxTokens)}; }
  template <typename T>
  T choice(const std::vector<T>& items) {
    return items[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(items.size()) - 1))];
  }

 private:
  std::mt19937 engine_;
};

// A session as the naive model has it: the tokens of each row.
struct Model {
  SessionShape shape;
  std::vector<std::vector<std::int64_t>> rows;
  std::int64_t length() const { return static_cast<std::int64_t>(rows.front().size()); }
};

// The engine thread's side: runs batches on a fake slab. Every token of every block has its own number.
class FakeEngine {
 public:
  explicit FakeEngine(PagePool& pool) : pool_(pool), slab_(kNumPages * kPageTokens, -1), origins_(kMaxBatch * kMaxRuns) {}

  void admit(Handle handle, const SessionShape& shape) {
    sessions_[handle] = {shape, std::vector<std::vector<std::int64_t>>(static_cast<std::size_t>(shape.batch))};
  }

  void forget(Handle handle) { sessions_.erase(handle); }

  // One random call. A session that the other thread has closed is forgotten.
  void call(Random& random) {
    if (sessions_.empty()) return;
    std::vector<Handle> handles;
    for (const auto& [handle, model] : sessions_) handles.push_back(handle);
    const Handle handle = random.choice(handles);
    try {
      call_on(handle, sessions_.at(handle), random);
    } catch (const ClosedHandle&) {
      forget(handle);
    }
  }

  // Every session that is still open reads what it wrote.
  void check_contents() {
    apply_copies(kNumPages);
    for (auto at = sessions_.begin(); at != sessions_.end();) {
      const bool is_open = find_runs(at->first);
      if (is_open) check_rows(at->second);
      at = is_open ? std::next(at) : sessions_.erase(at);
    }
  }

 private:
  void call_on(Handle handle, Model& model, Random& random) {
    const std::int64_t room = std::min<std::int64_t>(4, model.shape.max_tokens - model.length());
    switch (random.between(0, 29)) {
      case 0: {
        const std::int64_t length = random.between(0, model.length());
        pool_.truncate(handle, length);
        for (auto& row : model.rows) row.resize(static_cast<std::size_t>(length));
        break;
      }
      case 1:
        reorder(handle, model, random);
        break;
      case 2:  // batches that failed before they began: their copies stay pending
        for (std::int64_t times = random.between(1, 4); times > 0; --times) {
          pool_.extend(handle, model.length() + random.between(0, room));
          pool_.truncate(handle, model.length());
          reorder(handle, model, random);
        }
        break;
      default:
        step(handle, model, random.between(0, room), random);
    }
  }

  void reorder(Handle handle, Model& model, Random& random) {
    std::vector<std::int64_t> hypo_ids;
    std::vector<std::vector<std::int64_t>> rows;
    for (std::int64_t row = 0; row < model.shape.batch; ++row) {
      hypo_ids.push_back(random.between(0, model.shape.batch - 1));
      rows.push_back(model.rows[static_cast<std::size_t>(hypo_ids.back())]);
    }
    pool_.reorder(handle, hypo_ids);
    model.rows = std::move(rows);
  }

  void step(Handle handle, Model& model, std::int64_t count, Random& random) {
    pool_.extend(handle, model.length() + count);
    apply_copies(static_cast<std::size_t>(random.between(1, 40)));
    if (!find_runs(handle)) throw ClosedHandle("closed between extend and fill_origins");
    // From here to the next extend the pages are ours, even if the session is closed meanwhile.
    check_rows(model);
    for (std::size_t row = 0; row < model.rows.size(); ++row) {
      for (std::int64_t i = 0; i < count; ++i) write(model, row, next_token_++);
    }
    check_rows(model);
  }

  void apply_copies(std::size_t limit) {
    for (auto group = pool_.take_copies(limit); !group.empty(); group = pool_.take_copies(limit)) {
      std::vector<std::int64_t> gathered;
      std::set<Page> targets;
      for (const Copy& copy : group) {
        PETALSD_CHECK(targets.count(copy.source) == 0, "page ", copy.source, " is read after it was written");
        PETALSD_CHECK(targets.insert(copy.target).second, "page ", copy.target, " is written twice");
        for (std::int64_t i = 0; i < kPageTokens; ++i) gathered.push_back(slab_.at(slot(copy.source, i)));
      }
      std::size_t from = 0;
      for (const Copy& copy : group) {
        for (std::int64_t i = 0; i < kPageTokens; ++i) slab_.at(slot(copy.target, i)) = gathered[from++];
      }
    }
  }

  bool find_runs(Handle handle) {
    std::fill(origins_.begin(), origins_.end(), -kNumPages);
    try {
      pool_.fill_origins({handle}, {origins_.data(), kMaxBatch, kMaxRuns, kMaxRuns});
      return true;
    } catch (const ClosedHandle&) {
      return false;
    }
  }

  template <typename Visit>
  void for_each_block(const Model& model, std::size_t row, std::size_t position, Visit visit) {
    const auto token = static_cast<std::int64_t>(position);
    const std::int32_t origin = origins_.at(row * kMaxRuns + static_cast<std::size_t>(token / kPageTokens));
    for (std::int64_t k = 0; k < model.shape.num_blocks; ++k) {
      const std::int64_t block = model.shape.first_block + k;
      visit(slab_.at(slot(static_cast<Page>(origin + block), token % kPageTokens)), block);
    }
  }

  void write(Model& model, std::size_t row, std::int64_t token) {
    const std::size_t position = model.rows[row].size();
    for_each_block(model, row, position, [&](std::int64_t& stored, std::int64_t block) { stored = token * 100 + block; });
    model.rows[row].push_back(token);
  }

  void check_rows(const Model& model) {
    for (std::size_t row = 0; row < model.rows.size(); ++row) {
      for (std::size_t position = 0; position < model.rows[row].size(); ++position) {
        for_each_block(model, row, position, [&](std::int64_t stored, std::int64_t block) {
          PETALSD_CHECK_EQUAL(stored, model.rows[row][position] * 100 + block, "content of row ", row, " at ", position);
        });
      }
    }
  }

  static std::size_t slot(Page page, std::int64_t offset) {
    return static_cast<std::size_t>(page * kPageTokens + offset);
  }

  PagePool& pool_;
  std::vector<std::int64_t> slab_;
  std::vector<std::int32_t> origins_;
  std::map<Handle, Model> sessions_;
  std::int64_t next_token_ = 1;
};

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
      waiting_[pool_.request(shape)] = shape;
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

void run_alone(PagePool& pool, std::int64_t calls, unsigned seed) {
  Random random(seed);
  FakeEngine engine(pool);
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
}

void run_together(PagePool& pool, std::int64_t calls, unsigned seed) {
  FakeEngine engine(pool);
  Clients clients(pool);
  std::atomic<bool> is_done{false};
  std::exception_ptr failures[2];
  std::thread client_thread([&] {
    Random random(seed + 1);
    try {
      while (!is_done) clients.call(random);
    } catch (...) {
      failures[0] = std::current_exception();
    }
  });
  try {
    Random random(seed);
    for (std::int64_t i = 0; i < calls; ++i) {
      hear(engine, clients);
      engine.call(random);
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
  PETALSD_CHECK_EQUAL(stats.pages_mapped + stats.pages_reserved, 0, "pages held after all sessions closed = none");
  std::printf("%lld page copies, %lld of them moves, at most %d of %d pages mapped\n",
              static_cast<long long>(stats.copies), static_cast<long long>(stats.pages_moved), stats.high_water,
              stats.pages_total);
}

}  // namespace
}  // namespace petalsd

int main(int argc, char** argv) {
  const std::string mode = argc == 4 ? argv[1] : "";
  if (mode != "alone" && mode != "together") {
    std::fprintf(stderr, "usage: fuzz_page_pool alone|together CALLS SEED\n");
    return 2;
  }
  const std::int64_t calls = std::atoll(argv[2]);
  const auto seed = static_cast<unsigned>(std::atoi(argv[3]));
  try {
    petalsd::PagePool pool(petalsd::kNumPages, petalsd::kPageTokens);
    (mode == "alone" ? petalsd::run_alone : petalsd::run_together)(pool, calls, seed);
    petalsd::check_empty(pool);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
