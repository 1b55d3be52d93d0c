// The part of PagePool that decides whose pages are in memory.
#include <algorithm>

#include "check.hpp"
#include "page_pool.hpp"

namespace petalsd {

BatchPlan PagePool::plan_batch(const std::vector<Handle>& handles, const std::vector<std::int64_t>& lengths,
                               bool may_spill) {
  const std::lock_guard lock(mutex_);
  PETALSD_CHECK_EQUAL(handles.size(), lengths.size(), "sessions of a batch = lengths");
  PETALSD_CHECK(spilling_.empty(), "a batch is planned before the spills of the one before it are finished");
  std::vector<std::int64_t> missing;
  for (std::size_t index = 0; index < handles.size(); ++index) {
    missing.push_back(count_missing(handles[index], lengths[index]));
  }
  BatchPlan plan{choose(handles, missing, may_spill), {}};
  chosen_.clear();
  ++num_batches_;
  std::int64_t taken = 0;
  for (const std::size_t index : plan.chosen) {
    chosen_.push_back(handles[index]);
    taken += missing[index];
    if (Session* session = find(handles[index])) session->last_used = num_batches_;
  }
  if (taken > runs_.free_pages()) evict(taken - runs_.free_pages(), plan.spills);
  return plan;
}

// Pages that the session must get before it runs: those that are away, and those that it will grow by.
std::int64_t PagePool::count_missing(Handle handle, std::int64_t length) {
  if (find(handle) == nullptr) return 0;
  const Session& session = find_open(handle);
  PETALSD_CHECK(session.length <= length && length <= session.shape.max_tokens, "a batch to ", length,
                " tokens: the session has ", session.length, " and may reach ", session.shape.max_tokens);
  return std::int64_t{session.spilled} + growth(session, length);
}

// With spilling all memory can be had, but what the chosen ones hold; without it, what is free.
std::vector<std::size_t> PagePool::choose(const std::vector<Handle>& handles, const std::vector<std::int64_t>& missing,
                                          bool may_spill) {
  std::vector<Need> needs;
  for (std::size_t index = 0; index < handles.size(); ++index) {
    const Session* session = find(handles[index]);
    const std::int64_t resident = session == nullptr ? 0 : session->held - session->spilled;
    needs.push_back({missing[index] + (may_spill ? resident : 0), session == nullptr || session->spilled == 0});
  }
  return choose_batch(needs, may_spill ? num_pages_ : runs_.free_pages());
}

void PagePool::finish_spills(bool are_written) {
  const std::lock_guard lock(mutex_);
  if (spilling_.empty()) return;
  for (const auto& [run, handle] : spilling_) {
    // A session that was closed meanwhile has given up run and place; no other run has got its id since.
    Session* const session = find(handle);
    if (session == nullptr) continue;
    if (!are_written) {
      slots_.drop(run);
      continue;
    }
    runs_.vacate(run);
    session->spilled += runs_.num_pages(run);
    pages_evicted_ += runs_.num_pages(run);
  }
  spilling_.clear();
  is_failing_ = !are_written;
}

std::vector<std::vector<Transfer>> PagePool::start_restores() {
  const std::lock_guard lock(mutex_);
  PETALSD_CHECK(spilling_.empty(), "pages are restored before those that make room for them are spilled");
  std::vector<std::vector<RunId>> settled;
  for (const Handle handle : chosen_) {
    settled.emplace_back();
    if (Session* session = find(handle)) settle_runs(*session, settled.back());
  }
  high_water_ = std::max(high_water_, mapped());
  // Only now: settling one may have moved those before it.
  std::vector<std::vector<Transfer>> restores(settled.size());
  for (std::size_t index = 0; index < settled.size(); ++index) {
    for (const RunId run : settled[index]) add_transfers(run, restores[index]);
  }
  return restores;
}

void PagePool::overwrite(Handle handle, std::int64_t start, std::int64_t end) {
  const std::lock_guard lock(mutex_);
  Session& session = find_open(handle);
  PETALSD_CHECK(0 <= start && start <= end && end <= session.length, "tokens ", start, " to ", end,
                " are overwritten: the session has ", session.length);
  std::vector<RunId> runs;
  for (const Row& row : session.rows) {
    runs.insert(runs.end(), row.begin() + start / page_tokens_, row.begin() + runs_for(end));
  }
  for (const RunId run : runs) {
    PETALSD_CHECK(runs_.is_resident(run) && !runs_.is_shared(run), "tokens ", start, " to ", end,
                  " are overwritten: they are shared or not in memory");
  }
  for (const RunId run : runs) slots_.drop(run);
}

// Takes at least `pages` pages from sessions that are not in the batch.
void PagePool::evict(std::int64_t pages, std::vector<Transfer>& spills) {
  std::vector<Idle> idle;
  for (const auto& [handle, session] : sessions_) {
    if (session.last_used == num_batches_ || session.held == session.spilled) continue;
    idle.push_back({handle, session.last_used});
  }
  order_victims(idle);
  for (const auto& [handle, last_used] : idle) {
    if (pages <= 0) break;
    pages -= evict_from(handle, sessions_.at(handle), pages, spills);
  }
  PETALSD_CHECK(pages <= 0, "a batch was chosen that needs ", pages, " pages more than there are");
  const auto by_slot = [](const Transfer& left, const Transfer& right) { return left.slot < right.slot; };
  std::sort(spills.begin(), spills.end(), by_slot);
}

// The beginning of each row goes first, for its runs are full and do not change any more. Those that the file holds
// as they are leave at once, the others once they are written.
std::int64_t PagePool::evict_from(Handle handle, Session& session, std::int64_t pages, std::vector<Transfer>& spills) {
  std::int64_t evicted = 0;
  for (const Row& row : session.rows) {
    for (const RunId run : row) {
      if (evicted >= pages) return evicted;
      // A run that rows share is met in each of them.
      if (!runs_.is_resident(run) || spilling_.count(run) != 0) continue;
      evicted += runs_.num_pages(run);
      if (slots_.holds(run)) {
        runs_.vacate(run);
        session.spilled += runs_.num_pages(run);
        pages_evicted_ += runs_.num_pages(run);
        continue;
      }
      slots_.store(run, runs_.num_pages(run));
      add_transfers(run, spills);
      spilling_.emplace(run, handle);
    }
  }
  return evicted;
}

void PagePool::settle_runs(Session& session, std::vector<RunId>& settled) {
  if (session.spilled == 0) return;
  for (const Row& row : session.rows) {
    for (const RunId run : row) {
      if (runs_.is_resident(run)) continue;
      runs_.settle(run);
      settled.push_back(run);
      pages_restored_ += runs_.num_pages(run);
    }
  }
  session.spilled = 0;
}

void PagePool::add_transfers(RunId run, std::vector<Transfer>& transfers) const {
  Page page = runs_.first_page(run);
  for (const Extent& extent : slots_.find(run)) {
    transfers.push_back({page, extent.slot, extent.pages});
    page += extent.pages;
  }
}

}  // namespace petalsd
