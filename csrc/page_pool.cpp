#include "page_pool.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "check.hpp"
#include "clock.hpp"

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

PagePool::PagePool(std::int64_t num_pages, std::int64_t page_tokens, const AdmissionRules& rules,
                   std::shared_ptr<CreditBacking> backing)
    : page_tokens_(page_tokens),
      num_pages_(checked_num_pages(num_pages) - 1),
      backing_(std::move(backing)),
      runs_(num_pages_ + 1),
      queue_(rules) {
  PETALSD_CHECK(page_tokens >= 1, "page_tokens = ", page_tokens, ": a page holds at least one token");
}

Handle PagePool::request(const SessionShape& shape, const std::string& peer) {
  const std::lock_guard lock(mutex_);
  const Handle handle = add(shape, peer);
  serve_waiting();
  return handle;
}

Handle PagePool::try_open(const SessionShape& shape, const std::string& peer) {
  const std::lock_guard lock(mutex_);
  const Handle handle = add(shape, peer);
  serve_waiting();
  if (!sessions_.at(handle).is_open) {
    queue_.withdraw(handle);
    sessions_.erase(handle);
    refuse(shape, peer);
  }
  granted_.erase(std::remove(granted_.begin(), granted_.end(), handle), granted_.end());
  return handle;
}

void PagePool::charge(Handle handle, const std::string& peer) {
  const std::lock_guard lock(mutex_);
  Session& session = find_open(handle);
  if (session.peer == peer) return;
  check_share(session.shape, session.credit, peer);
  queue_.pass_on(session.peer, peer, session.credit);
  session.peer = peer;
  serve_waiting();
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
  const Page pages = growth(session, length);
  PETALSD_CHECK(session.spilled == 0 && pages <= runs_.free_pages(), "extend takes ", pages, " pages of ",
                runs_.free_pages(), " free ones, ", session.spilled,
                " of the session are not in memory: plan_batch first");
  if (is_last_run_open(session)) own_last_runs(session);
  const auto num_runs = static_cast<std::size_t>(runs_for(length));
  for (Row& row : session.rows) {
    while (row.size() < num_runs) row.push_back(runs_.create(static_cast<Page>(session.shape.num_blocks)));
  }
  session.held += pages;
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
    for (; row.size() > num_runs; row.pop_back()) release(session, row.back());
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
    for (const RunId run : row) release(session, run);
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
    PETALSD_CHECK_EQUAL(session.spilled, 0, "pages that are not in memory, of a session in the batch = none");
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
  Session& session = found->second;
  queue_.withdraw(handle);
  granted_.erase(std::remove(granted_.begin(), granted_.end(), handle), granted_.end());
  for (const Row& row : session.rows) {
    for (const RunId run : row) release(session, run);
  }
  if (session.is_open) give_back(session);
  sessions_.erase(found);
  serve_waiting();
}

// Open or waiting; nothing once it was closed.
PagePool::Session* PagePool::find(Handle handle) {
  const auto found = sessions_.find(handle);
  return found == sessions_.end() ? nullptr : &found->second;
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

// Pages promised to such a session; OutOfPages when the memory could never hold it.
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
                            " pages in memory"),
                       "ask for a smaller max_length, batch or span");
    }
  }
  return static_cast<Page>(credit);
}

// All credit that there is, promised or not.
std::int64_t PagePool::promisable() const {
  const std::int64_t backed = backing_ && !is_failing_ ? backing_->limit() : 0;
  return std::max<std::int64_t>(num_pages_, backed);
}

// Promises the credit, or says that it cannot. What is promised beyond the memory has its room in the file then.
bool PagePool::promise(std::int64_t credit) {
  const std::int64_t total = reserved_ + credit;
  if (total > num_pages_) {
    if (!backing_ || is_failing_ || total > std::numeric_limits<Page>::max()) return false;
    if (total > slots_.size()) {
      const std::int64_t slots = std::min<std::int64_t>(backing_->grow_to(total), std::numeric_limits<Page>::max());
      slots_.grow_to(std::max(slots_.size(), static_cast<Page>(slots)));
    }
    if (total > slots_.size()) return false;
  }
  reserved_ = total;
  return true;
}

Handle PagePool::add(const SessionShape& shape, const std::string& peer) {
  const Page credit = credit_of(shape);
  const Handle handle = next_handle_++;
  Session& session = sessions_[handle];
  session.shape = shape;
  session.credit = credit;
  session.peer = peer;
  queue_.push({handle, credit, peer}, monotonic_s());
  return handle;
}

void PagePool::serve_waiting() {
  const auto promise_credit = [this](std::int64_t credit) { return promise(credit); };
  for (const Handle handle : queue_.serve(promisable(), monotonic_s(), promise_credit)) {
    Session& session = sessions_.at(handle);
    session.is_open = true;
    session.rows.resize(static_cast<std::size_t>(session.shape.batch));
    session.last_used = num_batches_;
    granted_.push_back(handle);
  }
}

void PagePool::refuse(const SessionShape& shape, const std::string& peer) {
  const Page credit = credit_of(shape);
  check_share(shape, credit, peer);
  const std::int64_t left = std::max<std::int64_t>(0, promisable() - reserved_);
  throw OutOfPages(text("the session needs ", credit, " pages (", describe(shape, page_tokens_), "), ", left, " of ",
                        promisable(), " are not reserved and ", queue_.size(), " session(s) wait for them"),
                   "retry later, or ask for a smaller max_length");
}

// OutOfPages when the peer may not hold so much beside what it holds.
void PagePool::check_share(const SessionShape& shape, Page credit, const std::string& peer) const {
  if (!queue_.is_capped({0, credit, peer}, promisable())) return;
  throw OutOfPages(text("the session needs ", credit, " pages (", describe(shape, page_tokens_),
                        "), this peer holds ", queue_.held_by(peer), " of ", promisable(),
                        " and may not hold as much as that together"),
                   "close a session first, or use another server");
}

// The credit of an open session; and the disk, once little is promised and nothing is stored there. One that could not
// be written gets another chance then: as long as the memory holds all that is promised, nobody would find out.
void PagePool::give_back(const Session& session) {
  reserved_ -= session.credit;
  queue_.give_back(session.peer, session.credit);
  if (reserved_ > num_pages_ / 2) return;
  is_failing_ = false;
  if (slots_.size() > 0 && slots_.used() == 0 && spilling_.empty()) {
    slots_.clear();
    backing_->clear();
  }
}

// One reference of the session's less; the last one frees what the run has, wherever that is.
void PagePool::release(Session& session, RunId run) {
  const Page pages = runs_.num_pages(run);
  const bool was_resident = runs_.is_resident(run);
  if (!runs_.release(run)) return;
  slots_.drop(run);
  session.held -= pages;
  if (!was_resident) session.spilled -= pages;
}

// Copy on write: the rows are about to write into their last runs. The last one to share a run keeps it. What the file
// holds of these runs is out of date from now on.
void PagePool::own_last_runs(Session& session) {
  for (Row& row : session.rows) {
    if (runs_.is_shared(row.back())) {
      const RunId copy = runs_.duplicate(row.back());
      runs_.release(row.back());
      row.back() = copy;
    }
    slots_.drop(row.back());
  }
}

// Rows share a run only where they share all before it, at the same place.
std::size_t PagePool::distinct_last_runs(const Session& session) const {
  std::size_t count = 0;
  for (auto row = session.rows.begin(); row != session.rows.end(); ++row) {
    const auto has_same = [row](const Row& other) { return other.back() == row->back(); };
    if (!runs_.is_shared(row->back()) || std::none_of(session.rows.begin(), row, has_same)) ++count;
  }
  return count;
}

// Pages that extending to `length` takes, copies on write included.
Page PagePool::growth(const Session& session, std::int64_t length) const {
  if (length == session.length) return 0;
  std::int64_t runs = (runs_for(length) - runs_for(session.length)) * session.shape.batch;
  if (is_last_run_open(session)) runs += session.shape.batch - static_cast<std::int64_t>(distinct_last_runs(session));
  return static_cast<Page>(runs * session.shape.num_blocks);
}

}  // namespace petalsd
