// The page pool: which session may use how many pages, and which pages hold which tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "run_store.hpp"

namespace petalsd {

// Names one request for pages and the session that it becomes. Never used twice.
using Handle = std::int64_t;

// What a session asks for. Every number is at least 1, but for first_block, which is at least 0.
struct SessionShape {
  std::int64_t first_block;
  std::int64_t num_blocks;
  std::int64_t batch;       // rows
  std::int64_t max_tokens;  // that each row may reach
};

// Page counts are of physical pages, page 0 left out.
struct PoolStats {
  Page pages_total;
  Page pages_free;      // hold nothing, promised or not
  Page pages_mapped;    // hold tokens of open sessions
  Page pages_reserved;  // promised to open sessions, mapped pages included
  Page pages_shared;    // mapped, in runs that several rows continue from
  Page high_water;      // most pages mapped at once
  std::int64_t sessions;
  std::int64_t waiters;
  std::int64_t copies;       // page copies ever asked for: copy on write, and moves
  std::int64_t pages_moved;  // how many of them made room for a run
};

// A caller's int32 table of `rows` x `columns`; rows are `stride` entries apart.
struct OriginTable {
  std::int32_t* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t stride;
};

// A session is promised credit = batch * ceil(max_tokens / page_tokens) * num_blocks pages when it opens, and takes
// pages as its tokens come. The sum of all credits never exceeds the pool, rows that share a run are charged as
// if they did not, and runs are moved together when the free pages are scattered: an open session never runs out.
//
// Requests are granted strictly in the order they came. Nothing here waits: a caller asks `granted` after every
// call that may give credit back (`close`) and after `request`.
//
// Threads: every method may be called from any thread; one mutex, held for the length of one call. The pages of a
// batch stay where they are from `fill_origins` until the next `extend`, the only method that moves runs or
// takes pages; `close`, `truncate` and `reorder` only give pages back. So the thread that runs batches must be the only
// one that extends, and must make the copies of `take_copies` before each batch.
//
// Throws OutOfPages (`request`, `try_open`), ClosedHandle (a closed handle, but for `close`), and PoolError for a call
// against this contract. A call that throws has changed nothing.
class PagePool {
 public:
  PagePool(std::int64_t num_pages, std::int64_t page_tokens);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // Queues for credit; the handle can be used once `granted` has named it. OutOfPages when the whole pool is too small.
  Handle request(const SessionShape& shape);

  // Opens at once, or OutOfPages; also when the credit is there but others wait for it.
  Handle try_open(const SessionShape& shape);

  // The requests that got their credit since the last call, in order, but for those closed meanwhile.
  std::vector<Handle> granted();

  // Maps pages so that every row covers `length` tokens, length() <= length <= max_tokens. Rows that share a
  // partly filled last run get their own copies of it.
  void extend(Handle handle, std::int64_t length);

  // Rolls every row back to `length` <= length(); runs past it are dropped.
  void truncate(Handle handle, std::int64_t length);

  // Row j continues from old row hypo_ids[j]; takes no pages and copies nothing.
  void reorder(Handle handle, const std::vector<std::int64_t>& hypo_ids);

  // The next group of pending page copies; see CopyLog::take_group. Call until it is empty.
  std::vector<Copy> take_copies(std::size_t limit);

  // Writes one row of `out` per row of the sessions, in order: entry j is the first page of the row's run j minus the
  // session's first block. Entries past a row's runs are left as they are. Returns the number of rows.
  std::int64_t fill_origins(const std::vector<Handle>& handles, const OriginTable& out) const;

  std::int64_t length(Handle handle) const;

  // Gives pages and credit back, or withdraws the request. Does nothing when it was closed before.
  void close(Handle handle);

  PoolStats stats() const;

  // Throws PoolError with both sides of the first equation that does not hold. O(pages).
  void check_integrity() const;

 private:
  using Row = std::vector<RunId>;

  struct Session {
    SessionShape shape;
    Page credit;
    bool is_open = false;
    std::int64_t length = 0;
    std::vector<Row> rows;
  };

  const Session& find_open(Handle handle) const;
  Session& find_open(Handle handle);
  Page credit_of(const SessionShape& shape) const;
  Page unreserved() const { return num_pages_ - reserved_; }
  Page mapped() const { return num_pages_ - runs_.free_pages(); }
  std::int64_t runs_for(std::int64_t length) const { return (length + page_tokens_ - 1) / page_tokens_; }
  Handle add(const SessionShape& shape, Page credit);
  void open(Session& session);
  void grant_waiting();
  void own_last_runs(Session& session);
  void check_session(Handle handle, const Session& session) const;
  std::vector<std::int32_t> count_references() const;

  const std::int64_t page_tokens_;
  const Page num_pages_;  // without page 0
  mutable std::mutex mutex_;
  RunStore runs_;
  std::unordered_map<Handle, Session> sessions_;  // open and waiting
  std::deque<Handle> waiting_;
  std::vector<Handle> granted_;
  Handle next_handle_ = 1;
  Page reserved_ = 0;
  Page high_water_ = 0;
};

}  // namespace petalsd
