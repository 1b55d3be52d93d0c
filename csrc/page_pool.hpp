// The page pool: which session may use how many pages, and which pages hold which tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "admission.hpp"
#include "credit_backing.hpp"
#include "residency.hpp"
#include "run_store.hpp"
#include "spill_file.hpp"
#include "spill_space.hpp"

namespace petalsd {

// What a session asks for. Every number is at least 1, but for first_block, which is at least 0.
struct SessionShape {
  std::int64_t first_block;
  std::int64_t num_blocks;
  std::int64_t batch;       // rows
  std::int64_t max_tokens;  // that each row may reach
};

// Page counts are of physical pages, page 0 left out.
struct PoolStats {
  std::int64_t pages_promisable;  // all credit that there is, promised or not
  std::int64_t pages_reserved;    // promised to open sessions, whether they hold tokens yet or not
  Page pages_total;               // in memory
  Page pages_free;                // of them hold nothing, promised or not
  Page pages_mapped;              // of them hold tokens of open sessions
  Page pages_spilled;             // hold tokens in the spill file alone
  Page pages_shared;              // hold tokens, in runs that several rows continue from
  Page high_water;                // most pages mapped at once
  std::int64_t tail_tokens;       // places for a token in a block that are held and empty: ends of last pages
  std::int64_t sessions;
  std::int64_t waiters;
  double oldest_wait_s;         // of those who wait
  std::int64_t copies;          // page copies ever asked for: copy on write, and moves
  std::int64_t pages_moved;     // how many of them made room for a run
  std::int64_t pages_evicted;   // that ever left the memory for others
  std::int64_t pages_restored;  // that ever came back
};

// A caller's int32 table of `rows` x `columns`; rows are `stride` entries apart.
struct OriginTable {
  std::int32_t* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t stride;
};

// A batch, and what must be written before it: `spills` in the order of the file's slots.
struct BatchPlan {
  std::vector<std::size_t> chosen;  // indices of the sessions that run in it
  std::vector<Transfer> spills;
};

// A session is promised credit = batch * ceil(max_tokens / page_tokens) * num_blocks pages when it opens, and takes
// pages as its tokens come. Behind the credit stand the pages in memory, or, where more is promised than these, room
// for everything promised in the spill file; rows that share a run are charged as if they did not, and runs are moved
// together when the free pages are scattered. So an open session never runs out. None may be larger than the memory.
//
// A session's pages may leave the memory while it is idle. A run that comes back keeps its place in the file until
// its content changes: what was full stays as it is there, and need not be written again.
//
// Who is served when is AdmissionQueue's to say. Nothing here waits: a caller asks `granted` after every call that
// may give credit back (`close`, `charge`) and after `request` and `try_open`.
//
// Threads: every method may be called from any thread; one mutex, held for the length of one call. The pages of a
// batch stay where they are from `fill_origins` until the next `extend`, `plan_batch` or `start_restores`, which alone
// move runs or take pages; `close`, `truncate` and `reorder` only give pages back. So the thread that runs batches must
// be the only one that calls these, and before each batch, in this order:
//     makes the copies of `take_copies`; calls `plan_batch`; writes its spills and calls `finish_spills`;
//     calls `start_restores`, makes the copies, reads what is to be restored; extends; makes the copies.
// Where nothing is promised beyond the memory all of that but the last two may be left out. It also calls `truncate` and
// `reorder`, never between `plan_batch` and `finish_spills`: what is being written belongs to the rows as they were.
//
// Throws OutOfPages (`request`, `try_open`, `charge`), ClosedHandle (a closed handle, but for `close` and `plan_batch`), and
// PoolError for a call against this contract. A call that throws has changed nothing.
class PagePool {
 public:
  // Without `backing` no more is promised than the pages in memory.
  PagePool(std::int64_t num_pages, std::int64_t page_tokens, const AdmissionRules& rules = {},
           std::shared_ptr<CreditBacking> backing = nullptr);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // Queues for credit; the handle can be used once `granted` has named it. OutOfPages when the memory is too small.
  Handle request(const SessionShape& shape, const std::string& peer = "");

  // Opens at once, or OutOfPages; also when the credit is there but others who may not be passed wait for it.
  Handle try_open(const SessionShape& shape, const std::string& peer = "");

  // Counts an open session to the share of `peer` from now on; OutOfPages when that peer may not hold as much.
  void charge(Handle handle, const std::string& peer);

  // The requests that got their credit since the last call, in order, but for those closed meanwhile.
  std::vector<Handle> granted();

  // Which of these sessions run in the next batch, side by side, and can be extended to `lengths` in it; the others'
  // turn is the batch after it. Makes room for them, taking it from sessions that are not in the batch, the one that
  // was in none for longest first. Without `may_spill` nothing is written for it: fewer sessions may fit, or none.
  // A closed handle is chosen and takes no room.
  BatchPlan plan_batch(const std::vector<Handle>& handles, const std::vector<std::int64_t>& lengths, bool may_spill);

  // The spills of the plan are in the file: their pages are free. Or they could not be written, and stay in memory.
  // Then no more is promised than memory holds until something can be written again, or half of the memory is not
  // promised any more.
  void finish_spills(bool are_written);

  // Takes pages for what the chosen sessions have in the file; what to read, one list for each of them.
  std::vector<std::vector<Transfer>> start_restores();

  // Maps pages so that every row covers `length` tokens, length() <= length <= max_tokens. Rows that share a
  // partly filled last run get their own copies of it.
  void extend(Handle handle, std::int64_t length);

  // Rolls every row back to `length` <= length(); runs past it are dropped.
  void truncate(Handle handle, std::int64_t length);

  // Row j continues from old row hypo_ids[j]; takes no pages and copies nothing.
  void reorder(Handle handle, const std::vector<std::int64_t>& hypo_ids);

  // Tokens start .. end - 1 of every row, which are in memory, get other content without a step: what the file holds
  // of their runs is out of date from now on. For rows that share nothing there.
  void overwrite(Handle handle, std::int64_t start, std::int64_t end);

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
    std::string peer;
    bool is_open = false;
    std::int64_t length = 0;
    std::vector<Row> rows;
    Page held = 0;     // pages of its runs, in memory or not
    Page spilled = 0;  // how many of them are not in memory
    std::int64_t last_used = 0;
  };

  Session* find(Handle handle);
  const Session& find_open(Handle handle) const;
  Session& find_open(Handle handle);
  Page credit_of(const SessionShape& shape) const;
  std::int64_t promisable() const;
  bool promise(std::int64_t credit);
  Page mapped() const { return num_pages_ - runs_.free_pages(); }
  std::int64_t runs_for(std::int64_t length) const { return (length + page_tokens_ - 1) / page_tokens_; }
  bool is_last_run_open(const Session& session) const { return session.length % page_tokens_ != 0; }
  Page growth(const Session& session, std::int64_t length) const;
  Handle add(const SessionShape& shape, const std::string& peer);
  void serve_waiting();
  [[noreturn]] void refuse(const SessionShape& shape, const std::string& peer);
  void check_share(const SessionShape& shape, Page credit, const std::string& peer) const;
  void give_back(const Session& session);
  void release(Session& session, RunId run);
  void own_last_runs(Session& session);
  std::size_t distinct_last_runs(const Session& session) const;
  std::int64_t count_missing(Handle handle, std::int64_t length);
  std::vector<std::size_t> choose(const std::vector<Handle>& handles, const std::vector<std::int64_t>& missing,
                                  bool may_spill);
  void evict(std::int64_t pages, std::vector<Transfer>& spills);
  std::int64_t evict_from(Handle handle, Session& session, std::int64_t pages, std::vector<Transfer>& spills);
  void settle_runs(Session& session, std::vector<RunId>& settled);
  void add_transfers(RunId run, std::vector<Transfer>& transfers) const;
  std::int64_t tail_tokens(const Session& session) const;
  void check_session(Handle handle, const Session& session) const;
  void check_credit() const;
  std::vector<std::int32_t> count_references() const;

  const std::int64_t page_tokens_;
  const Page num_pages_;  // without page 0
  const std::shared_ptr<CreditBacking> backing_;
  mutable std::mutex mutex_;
  RunStore runs_;
  SpillSpace slots_;
  AdmissionQueue queue_;
  std::unordered_map<Handle, Session> sessions_;  // open and waiting
  std::vector<Handle> granted_;
  std::vector<Handle> chosen_;                  // of the last plan
  std::unordered_map<RunId, Handle> spilling_;  // between plan_batch and finish_spills
  Handle next_handle_ = 1;
  std::int64_t reserved_ = 0;
  std::int64_t num_batches_ = 0;
  std::int64_t pages_evicted_ = 0;
  std::int64_t pages_restored_ = 0;
  bool is_failing_ = false;  // the last attempt to write to the spill file
  Page high_water_ = 0;
};

}  // namespace petalsd
