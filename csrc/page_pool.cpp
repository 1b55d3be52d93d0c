#include "page_pool.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "check.hpp"

namespace petalsd {

namespace {

std::string describe(const SessionShape& shape, std::int64_t page_tokens) {
  return text(shape.batch, " row(s) of ", shape.max_tokens, " tokens in ", shape.num_blocks, " block(s), ", page_tokens,
              " tokens a page");
}

Page checked_num_pages(std::int64_t num_pages) {
  PETALSD_CHECK(2 <= num_pages && num_pages <= std::numeric_limits<Page>::max(), "num_pages = ", num_pages,
                ": a pool needs page 0 and at least one more, and numbers them in 32 bits");
  return static_cast<Page>(num_pages);
}

}  // namespace

PagePool::PagePool(std::int64_t num_pages, std::int64_t page_tokens)
    : page_tokens_(page_tokens), num_pages_(checked_num_pages(num_pages) - 1), runs_(num_pages_ + 1) {
  PETALSD_CHECK(page_tokens >= 1, "page_tokens = ", page_tokens, ": a page holds at least one token");
}

Handle PagePool::request(const SessionShape& shape) {
  const std::lock_guard lock(mutex_);
  const Handle handle = add(shape, credit_of(shape));
  waiting_.push_back(handle);
  grant_waiting();
  return handle;
}

Handle PagePool::try_open(const SessionShape& shape) {
  const std::lock_guard lock(mutex_);
  const Page credit = credit_of(shape);
  if (credit > unreserved() || !waiting_.empty()) {
    throw OutOfPages(text("the session needs ", credit, " pages (", describe(shape, page_tokens_), "), ", unreserved(),
                          " of ", num_pages_, " are not reserved and ", waiting_.size(), " session(s) wait for them"),
                     "retry later, or ask for a smaller max_length");
  }
  const Handle handle = add(shape, credit);
  open(sessions_.at(handle));
  return handle;
}

std::vector<Handle> PagePool::granted() {
  const std::lock_guard lock(mutex_);
  return std::exchange(granted_, {});
}

void PagePool::extend(Handle handle, std::int64_t length) {
  const std::lock_guard lock(mutex_);
  Session& session = find_open(handle);
  PETALSD_CHECK(session.length <= length && length <= session.shape.max_tokens, "extend to ", length,
                " tokens: the session has ", session.length, " and may reach ", session.shape.max_tokens);
  if (length == session.length) return;
  if (session.length % page_tokens_ != 0) own_last_runs(session);
  const auto num_runs = static_cast<std::size_t>(runs_for(length));
  for (Row& row : session.rows) {
    while (row.size() < num_runs) row.push_back(runs_.create(static_cast<Page>(session.shape.num_blocks)));
  }
  session.length = length;
  high_water_ = std::max(high_water_, mapped());
}

void PagePool::truncate(Handle handle, std::int64_t length) {
  const std::lock_guard lock(mutex_);
  Session& session = find_open(handle);
  PETALSD_CHECK(0 <= length && length <= session.length, "truncate to ", length, " tokens: the session has ",
                session.length);
  const auto num_runs = static_cast<std::size_t>(runs_for(length));
  for (Row& row : session.rows) {
    for (; row.size() > num_runs; row.pop_back()) runs_.release(row.back());
  }
  session.length = length;
}

void PagePool::reorder(Handle handle, const std::vector<std::int64_t>& hypo_ids) {
  const std::lock_guard lock(mutex_);
  Session& session = find_open(handle);
  const std::size_t batch = session.rows.size();
  PETALSD_CHECK_EQUAL(hypo_ids.size(), batch, "number of hypo_ids = rows of the session");
  std::vector<Row> rows;
  rows.reserve(batch);
  for (const std::int64_t old_row : hypo_ids) {
    PETALSD_CHECK(0 <= old_row && old_row < static_cast<std::int64_t>(batch), "hypo_ids has ", old_row,
                  ": the session has ", batch, " rows");
    rows.push_back(session.rows[static_cast<std::size_t>(old_row)]);
  }
  for (const Row& row : rows) {
    for (const RunId run : row) runs_.retain(run);
  }
  for (const Row& row : session.rows) {
    for (const RunId run : row) runs_.release(run);
  }
  session.rows = std::move(rows);
}

std::vector<Copy> PagePool::take_copies(std::size_t limit) {
  const std::lock_guard lock(mutex_);
  return runs_.take_copies(limit);
}

std::int64_t PagePool::fill_origins(const std::vector<Handle>& handles, const OriginTable& out) const {
  const std::lock_guard lock(mutex_);
  std::int64_t num_rows = 0;
  for (const Handle handle : handles) {
    const Session& session = find_open(handle);
    num_rows += session.shape.batch;
    PETALSD_CHECK(runs_for(session.length) <= out.columns, "the origins table has ", out.columns,
                  " columns, a session has ", runs_for(session.length), " runs a row");
  }
  PETALSD_CHECK(num_rows <= out.rows, "the origins table has ", out.rows, " rows, the sessions have ", num_rows);
  std::int32_t* row_out = out.data;
  for (const Handle handle : handles) {
    const Session& session = find_open(handle);
    const auto first_block = static_cast<std::int32_t>(session.shape.first_block);
    for (const Row& row : session.rows) {
      std::transform(row.begin(), row.end(), row_out, [&](RunId run) { return runs_.first_page(run) - first_block; });
      row_out += out.stride;
    }
  }
  return num_rows;
}

std::int64_t PagePool::length(Handle handle) const {
  const std::lock_guard lock(mutex_);
  return find_open(handle).length;
}

void PagePool::close(Handle handle) {
  const std::lock_guard lock(mutex_);
  const auto found = sessions_.find(handle);
  if (found == sessions_.end()) {
    PETALSD_CHECK(0 < handle && handle < next_handle_, "handle ", handle, " was never given out");
    return;
  }
  const Session& session = found->second;
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), handle), waiting_.end());
  granted_.erase(std::remove(granted_.begin(), granted_.end(), handle), granted_.end());
  for (const Row& row : session.rows) {
    for (const RunId run : row) runs_.release(run);
  }
  if (session.is_open) reserved_ -= session.credit;
  sessions_.erase(found);
  grant_waiting();
}

PoolStats PagePool::stats() const {
  const std::lock_guard lock(mutex_);
  PoolStats stats{};
  stats.pages_total = num_pages_;
  stats.pages_free = runs_.free_pages();
  stats.pages_mapped = mapped();
  stats.pages_reserved = reserved_;
  stats.pages_shared = runs_.shared_pages();
  stats.high_water = high_water_;
  stats.waiters = static_cast<std::int64_t>(waiting_.size());
  stats.sessions = static_cast<std::int64_t>(sessions_.size()) - stats.waiters;
  stats.copies = runs_.logged_copies();
  stats.pages_moved = runs_.moved_pages();
  return stats;
}

void PagePool::check_integrity() const {
  const std::lock_guard lock(mutex_);
  std::int64_t reserved = 0;
  std::size_t num_waiting = 0;
  for (const auto& [handle, session] : sessions_) {
    check_session(handle, session);
    if (session.is_open) reserved += session.credit;
    if (!session.is_open) ++num_waiting;
  }
  runs_.check_integrity(count_references());
  PETALSD_CHECK_EQUAL(reserved, reserved_, "credit of open sessions = pages reserved");
  PETALSD_CHECK(reserved_ <= num_pages_, reserved_, " pages are reserved of ", num_pages_);
  PETALSD_CHECK(mapped() <= reserved_, mapped(), " pages are mapped, ", reserved_, " reserved");
  PETALSD_CHECK_EQUAL(num_waiting, waiting_.size(), "sessions that are not open = length of the queue");
  if (waiting_.empty()) return;
  const Page head_credit = sessions_.at(waiting_.front()).credit;
  PETALSD_CHECK(head_credit > unreserved(), "the first in the queue needs ", head_credit, " pages and waits though ",
                unreserved(), " are not reserved");
}

const PagePool::Session& PagePool::find_open(Handle handle) const {
  const auto found = sessions_.find(handle);
  if (found == sessions_.end()) {
    PETALSD_CHECK(0 < handle && handle < next_handle_, "handle ", handle, " was never given out");
    throw ClosedHandle("the session has given its pages back");
  }
  PETALSD_CHECK(found->second.is_open, "handle ", handle, " still waits for its pages");
  return found->second;
}

PagePool::Session& PagePool::find_open(Handle handle) {
  return const_cast<Session&>(std::as_const(*this).find_open(handle));
}

// Pages promised to such a session; OutOfPages when the pool could never hold it.
Page PagePool::credit_of(const SessionShape& shape) const {
  PETALSD_CHECK(shape.first_block >= 0 && shape.num_blocks >= 1 && shape.batch >= 1 && shape.max_tokens >= 1,
                "first_block = ", shape.first_block, ", num_blocks = ", shape.num_blocks, ", batch = ", shape.batch,
                ", max_tokens = ", shape.max_tokens, ": a session has blocks, rows and tokens");
  PETALSD_CHECK(shape.first_block <= std::numeric_limits<std::int32_t>::max(), "first_block = ", shape.first_block,
                " is no block number");
  std::int64_t credit = 1;
  for (const std::int64_t factor : {shape.num_blocks, shape.batch, (shape.max_tokens - 1) / page_tokens_ + 1}) {
    // Each factor is compared first, so that the product of two 32-bit numbers fits.
    credit = factor <= num_pages_ ? credit * factor : std::int64_t{num_pages_} + 1;
    if (credit > num_pages_) {
      throw OutOfPages(text("the session (", describe(shape, page_tokens_), ") needs more than all ", num_pages_,
                            " pages of the pool"),
                       "ask for a smaller max_length, batch or span");
    }
  }
  return static_cast<Page>(credit);
}

Handle PagePool::add(const SessionShape& shape, Page credit) {
  const Handle handle = next_handle_++;
  Session& session = sessions_[handle];
  session.shape = shape;
  session.credit = credit;
  return handle;
}

void PagePool::open(Session& session) {
  reserved_ += session.credit;
  session.is_open = true;
  session.rows.resize(static_cast<std::size_t>(session.shape.batch));
}

void PagePool::grant_waiting() {
  while (!waiting_.empty()) {
    Session& head = sessions_.at(waiting_.front());
    if (head.credit > unreserved()) return;
    open(head);
    granted_.push_back(waiting_.front());
    waiting_.pop_front();
  }
}

// Copy on write: the rows are about to write into their last runs. The last one to share a run keeps it.
void PagePool::own_last_runs(Session& session) {
  for (Row& row : session.rows) {
    if (!runs_.is_shared(row.back())) continue;
    const RunId copy = runs_.duplicate(row.back());
    runs_.release(row.back());
    row.back() = copy;
  }
}

void PagePool::check_session(Handle handle, const Session& session) const {
  const auto batch = session.is_open ? static_cast<std::size_t>(session.shape.batch) : 0;
  PETALSD_CHECK_EQUAL(session.rows.size(), batch, "rows of session ", handle, " = rows it may have");
  PETALSD_CHECK(session.length <= session.shape.max_tokens, "session ", handle, " has ", session.length,
                " tokens of at most ", session.shape.max_tokens);
  const auto num_runs = static_cast<std::size_t>(runs_for(session.length));
  for (const Row& row : session.rows) {
    PETALSD_CHECK_EQUAL(row.size(), num_runs, "runs in a row of session ", handle, " = runs for its length");
    for (const RunId run : row) {
      PETALSD_CHECK_EQUAL(static_cast<std::int64_t>(runs_.num_pages(run)), session.shape.num_blocks, "pages of run ",
                          run, " = blocks of session ", handle);
    }
  }
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
