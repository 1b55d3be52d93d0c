// The engine's side of the page pool for the fuzz: runs batches on a fake slab and a fake disk.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "check.hpp"
#include "page_pool.hpp"

namespace petalsd {

inline constexpr std::int64_t kNumPages = 300;
inline constexpr std::int64_t kPageTokens = 3;
inline constexpr std::int64_t kMaxTokens = 18;
inline constexpr std::int64_t kMaxRuns = kMaxTokens / kPageTokens;
inline constexpr std::int64_t kMaxBatch = 3;

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

// Slots in memory. Now and then it has no room to give, and now and then it cannot be written.
class FakeDisk final : public CreditBacking {
 public:
  explicit FakeDisk(std::int64_t max_pages) : max_pages_(max_pages), slots_(max_pages * kPageTokens, -2) {}

  std::int64_t grow_to(std::int64_t pages) override {
    is_refused_ = pages > max_pages_ || ++num_growths_ % 7 == 0;
    if (!is_refused_) num_pages_ = std::max(num_pages_, pages);
    return num_pages_;
  }
  std::int64_t limit() const override { return is_refused_ ? num_pages_ : max_pages_; }
  void clear() override { num_pages_ = 0; }

  std::int64_t& at(Page slot, std::int64_t offset) { return slots_.at(slot * kPageTokens + offset); }

 private:
  const std::int64_t max_pages_;
  std::vector<std::int64_t> slots_;
  std::int64_t num_pages_ = 0;
  std::int64_t num_growths_ = 0;
  bool is_refused_ = false;
};

// The engine thread's side: runs batches on a fake slab. Every token of every block has its own number.
class FakeEngine {
 public:
  // `disk` is what backs the pool, or nothing.
  FakeEngine(PagePool& pool, FakeDisk* disk)
      : pool_(pool), disk_(disk), slab_(kNumPages * kPageTokens, -1), origins_(kMaxBatch * kMaxRuns) {}

  void admit(Handle handle, const SessionShape& shape) {
    sessions_[handle] = {shape, std::vector<std::vector<std::int64_t>>(static_cast<std::size_t>(shape.batch))};
  }

  void forget(Handle handle) { sessions_.erase(handle); }

  // One random call, if there is a session; whether there was. One that the other thread has closed is forgotten.
  bool call(Random& random) {
    if (sessions_.empty()) return false;
    std::vector<Handle> handles;
    for (const auto& [handle, model] : sessions_) handles.push_back(handle);
    const Handle handle = random.choice(handles);
    try {
      if (random.one_in(3)) run_together(handles, random);
      call_on(handle, sessions_.at(handle), random);
    } catch (const ClosedHandle&) {
      forget(handle);
    }
    return true;
  }

  // Every session that is still open reads what it wrote.
  void check_contents() {
    apply_copies(kNumPages);
    for (auto at = sessions_.begin(); at != sessions_.end();) {
      make_room({at->first}, {at->second.length()}, false);
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
          const std::int64_t length = model.length() + random.between(0, room);
          if (make_room({handle}, {length}, random.one_in(5)).empty()) return;
          pool_.extend(handle, length);
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
    if (make_room({handle}, {model.length() + count}, random.one_in(20)).empty()) return;
    pool_.extend(handle, model.length() + count);
    apply_copies(static_cast<std::size_t>(random.between(1, 40)));
    write_tokens(handle, model, count);
  }

  // One token for many: as many of them as fit run in one batch.
  void run_together(const std::vector<Handle>& handles, Random& random) {
    std::vector<Handle> wanted;
    std::vector<std::int64_t> lengths;
    for (const Handle handle : handles) {
      const Model& model = sessions_.at(handle);
      if (model.length() == model.shape.max_tokens || random.one_in(2)) continue;
      wanted.push_back(handle);
      lengths.push_back(model.length() + 1);
    }
    const bool fails = random.one_in(10);
    const std::vector<Handle> batch = make_room(wanted, lengths, fails);
    PETALSD_CHECK(fails || wanted.empty() || !batch.empty(), "nobody of ", wanted.size(), " fits");
    std::vector<Handle> open;
    for (const Handle handle : batch) {
      try {
        pool_.extend(handle, sessions_.at(handle).length() + 1);
        open.push_back(handle);
      } catch (const ClosedHandle&) {
      }
    }
    apply_copies(kNumPages);
    for (const Handle handle : open) {
      try {
        write_tokens(handle, sessions_.at(handle), 1);
      } catch (const ClosedHandle&) {
      }
    }
  }

  // As KVPool::make_room: who runs now. With `fails` the disk cannot be written.
  std::vector<Handle> make_room(const std::vector<Handle>& handles, const std::vector<std::int64_t>& lengths,
                                bool fails) {
    if (disk_ == nullptr) return handles;
    apply_copies(kNumPages);
    BatchPlan plan = pool_.plan_batch(handles, lengths, true);
    if (fails && !plan.spills.empty()) {
      pool_.finish_spills(false);
      plan = pool_.plan_batch(handles, lengths, false);
      PETALSD_CHECK(plan.spills.empty(), "pages are to be written to a broken disk");
    }
    for_each_slot(plan.spills, [](std::int64_t& in_memory, std::int64_t& on_disk) { on_disk = in_memory; });
    pool_.finish_spills(true);
    const auto restores = pool_.start_restores();
    apply_copies(kNumPages);
    for (const auto& transfers : restores) {
      for_each_slot(transfers, [](std::int64_t& in_memory, std::int64_t& on_disk) { in_memory = on_disk; });
    }
    std::vector<Handle> ready;
    for (const std::size_t index : plan.chosen) ready.push_back(handles[index]);
    return ready;
  }

  template <typename Visit>
  void for_each_slot(const std::vector<Transfer>& transfers, Visit visit) {
    for (const auto& [page, first_slot, pages] : transfers) {
      for (Page i = 0; i < pages; ++i) {
        for (std::int64_t offset = 0; offset < kPageTokens; ++offset) {
          visit(slab_.at(slot(page + i, offset)), disk_->at(first_slot + i, offset));
        }
      }
    }
  }

  // The session has been extended by `count` tokens and the copies are made.
  void write_tokens(Handle handle, Model& model, std::int64_t count) {
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
  FakeDisk* const disk_;
  std::vector<std::int64_t> slab_;
  std::vector<std::int32_t> origins_;
  std::map<Handle, Model> sessions_;
  std::int64_t next_token_ = 1;
};

}  // namespace petalsd
