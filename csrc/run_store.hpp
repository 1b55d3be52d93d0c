// Runs: consecutive physical pages, one per block of a session, with a reference count and an address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "copy_log.hpp"
#include "free_space.hpp"

namespace petalsd {

using RunId = std::int32_t;  // stays the same when the run moves

// Knows addresses and reference counts, nothing of sessions. Runs differ in length, so the free pages may be
// enough and yet nowhere consecutive: `create` then moves runs together (their tables hold ids, so a move changes
// one number) and logs the copies. Asking for no more than `free_pages` therefore never fails. A run that is vacated
// keeps its id and its references, but has no pages until it is settled again.
//
// Not thread-safe; PagePool owns it.
class RunStore {
 public:
  // Pages 1 .. num_pages - 1; page 0 is never handed out.
  explicit RunStore(Page num_pages);

  // A run of undefined content and one reference; requires 1 <= pages <= free_pages().
  RunId create(Page pages);

  // A run of the same length and, once the copies are made, the same content, with one reference.
  RunId duplicate(RunId source);

  void retain(RunId run);
  bool release(RunId run);  // the last reference frees its pages and its id: true then

  void vacate(RunId run);  // gives the pages of a resident run back
  void settle(RunId run);  // takes pages of undefined content for one that is not, as `create` does

  bool is_resident(RunId run) const { return runs_[run].first != kNowhere; }
  bool is_shared(RunId run) const { return runs_[run].references > 1; }
  Page first_page(RunId run) const { return runs_[run].first; }
  Page num_pages(RunId run) const { return runs_[run].pages; }

  Page free_pages() const { return free_.total(); }
  Page shared_pages() const { return shared_pages_; }  // of runs with more than one reference, resident or not
  std::int64_t moved_pages() const { return moved_pages_; }
  std::int64_t logged_copies() const { return copies_.total(); }
  std::vector<Copy> take_copies(std::size_t limit) { return copies_.take_group(limit); }

  // `references[id]`: how often the tables name run `id`, as counted by the owner of the tables.
  void check_integrity(const std::vector<std::int32_t>& references) const;

  // Number of ids in use or free: the bound of RunId.
  std::size_t num_ids() const { return runs_.size(); }

 private:
  static constexpr Page kNowhere = 0;  // page 0 belongs to no run

  struct Run {
    Page first;
    Page pages;
    std::int32_t references;  // 0: the id is free
  };

  struct Window {
    Page begin;
    Page end;
  };

  Window cheapest_window(Page pages) const;
  void slide_down(Window window);
  Page move_down(Page from, Page to);

  Page num_pages_;
  std::vector<Run> runs_;
  std::vector<RunId> free_ids_;
  std::vector<RunId> run_at_;  // by the first page of a run; undefined elsewhere
  FreeSpace free_;
  CopyLog copies_;
  Page shared_pages_ = 0;
  std::int64_t moved_pages_ = 0;
};

}  // namespace petalsd
