// The part of PagePool that shows its books and checks them.
#include <algorithm>
#include <set>
#include <string>
#include <unordered_map>

#include "check.hpp"
#include "clock.hpp"
#include "page_pool.hpp"

namespace petalsd {

PoolStats PagePool::stats() const {
  const std::lock_guard lock(mutex_);
  PoolStats stats{};
  stats.pages_promisable = promisable();
  stats.pages_reserved = reserved_;
  stats.pages_total = num_pages_;
  stats.pages_free = runs_.free_pages();
  stats.pages_mapped = mapped();
  for (const auto& [handle, session] : sessions_) {
    stats.pages_spilled += session.spilled;
    stats.tail_tokens += tail_tokens(session);
  }
  stats.pages_shared = runs_.shared_pages();
  stats.high_water = high_water_;
  stats.waiters = static_cast<std::int64_t>(queue_.size());
  stats.sessions = static_cast<std::int64_t>(sessions_.size()) - stats.waiters;
  stats.oldest_wait_s = queue_.oldest_wait_s(monotonic_s());
  stats.copies = runs_.logged_copies();
  stats.pages_moved = runs_.moved_pages();
  stats.pages_evicted = pages_evicted_;
  stats.pages_restored = pages_restored_;
  return stats;
}

void PagePool::check_integrity() const {
  const std::lock_guard lock(mutex_);
  Page spilled = 0;
  for (const auto& [handle, session] : sessions_) {
    check_session(handle, session);
    spilled += session.spilled;
  }
  runs_.check_integrity(count_references());
  slots_.check_integrity();
  check_credit();
  PETALSD_CHECK(std::int64_t{mapped()} + spilled <= reserved_, mapped(), " pages are mapped and ", spilled,
                " spilled, ", reserved_, " reserved");
}

// Room in the last runs of the rows, in all blocks.
std::int64_t PagePool::tail_tokens(const Session& session) const {
  if (!is_last_run_open(session)) return 0;
  const auto num_runs = static_cast<std::int64_t>(distinct_last_runs(session));
  return (page_tokens_ - session.length % page_tokens_) * num_runs * session.shape.num_blocks;
}

void PagePool::check_credit() const {
  std::int64_t reserved = 0;
  std::size_t num_waiting = 0;
  std::unordered_map<std::string, std::int64_t> held;
  for (const auto& [handle, session] : sessions_) {
    if (!session.is_open) ++num_waiting;
    if (!session.is_open) continue;
    reserved += session.credit;
    if (!session.peer.empty()) held[session.peer] += session.credit;
  }
  queue_.check_integrity(held);
  PETALSD_CHECK_EQUAL(num_waiting, queue_.size(), "sessions that are not open = length of the queue");
  PETALSD_CHECK_EQUAL(reserved, reserved_, "credit of open sessions = pages reserved");
  PETALSD_CHECK(reserved_ <= std::max(num_pages_, slots_.size()), reserved_, " pages are reserved, ", num_pages_,
                " are in memory and ", slots_.size(), " in the spill file");
}

void PagePool::check_session(Handle handle, const Session& session) const {
  const auto batch = session.is_open ? static_cast<std::size_t>(session.shape.batch) : 0;
  PETALSD_CHECK_EQUAL(session.rows.size(), batch, "rows of session ", handle, " = rows it may have");
  PETALSD_CHECK(session.length <= session.shape.max_tokens, "session ", handle, " has ", session.length,
                " tokens of at most ", session.shape.max_tokens);
  const auto num_runs = static_cast<std::size_t>(runs_for(session.length));
  std::set<RunId> runs;
  for (const Row& row : session.rows) {
    PETALSD_CHECK_EQUAL(row.size(), num_runs, "runs in a row of session ", handle, " = runs for its length");
    runs.insert(row.begin(), row.end());
  }
  Page spilled = 0;
  for (const RunId run : runs) {
    PETALSD_CHECK_EQUAL(static_cast<std::int64_t>(runs_.num_pages(run)), session.shape.num_blocks, "pages of run ",
                        run, " = blocks of session ", handle);
    PETALSD_CHECK(runs_.is_resident(run) || slots_.holds(run), "run ", run, " of session ", handle, " is nowhere");
    if (!runs_.is_resident(run)) spilled += runs_.num_pages(run);
  }
  const auto held = static_cast<std::int64_t>(runs.size()) * session.shape.num_blocks;
  PETALSD_CHECK_EQUAL(held, session.held, "pages of the runs of session ", handle, " = pages it holds");
  PETALSD_CHECK_EQUAL(spilled, session.spilled, "pages of its runs that are not in memory = pages spilled");
}

std::vector<std::int32_t> PagePool::count_references() const {
  std::vector<std::int32_t> references(runs_.num_ids(), 0);
  for (const auto& [handle, session] : sessions_) {
    for (const Row& row : session.rows) {
      for (const RunId run : row) ++references[static_cast<std::size_t>(run)];
    }
  }
  return references;
}

}  // namespace petalsd
