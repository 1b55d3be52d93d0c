#include "thread_team.hpp"

#include <chrono>

#include "check.hpp"

namespace petalsd {

namespace {

// Longer than the pauses between the stages of a block; should one be long, the core is free for others.
constexpr auto kLookOut = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

ThreadTeam::ThreadTeam(int num_threads) {
  PETALSD_CHECK(1 <= num_threads && num_threads <= 1024, "num_threads = ", num_threads, ": a team has 1 to 1024");
  for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this] { help(); });
}

ThreadTeam::~ThreadTeam() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  wake_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadTeam::begin_shift() {
  ++shift_;
  wake_sleepers();
}

void ThreadTeam::wake_sleepers() {
  if (sleeping_ == 0) return;
  // Under the mutex, so that no helper is between its last look and its sleep.
  { const std::lock_guard lock(mutex_); }
  wake_.notify_all();
}

void ThreadTeam::run_job(std::int64_t num_chunks, Call call, const void* context) {
  if (num_chunks <= 1 || helpers_.empty()) {
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) call(context, chunk);
    return;
  }
  PETALSD_CHECK(num_chunks <= static_cast<std::int64_t>(Claims::kMask), "a job of ", num_chunks, " chunks");
  call_ = call;
  context_ = context;
  done_ = 0;
  claims_ = Claims::pack(++job_, static_cast<std::uint64_t>(num_chunks));
  wake_sleepers();
  work_off();
  while (done_ < num_chunks) pause();
}

void ThreadTeam::work_off() {
  std::uint64_t word = claims_;
  while (Claims::has_chunks(word)) {
    if (!claims_.compare_exchange_weak(word, word + 1)) continue;
    call_.load()(context_.load(), static_cast<std::int64_t>(Claims::next(word)));
    ++done_;
    word = claims_;
  }
}

void ThreadTeam::help() {
  while (await_job()) work_off();
}

// False when the team ends.
bool ThreadTeam::await_job() {
  while (true) {
    const std::uint64_t shift = shift_;
    const auto give_up = std::chrono::steady_clock::now() + kLookOut;
    while (is_on(shift) && shift_ == shift && std::chrono::steady_clock::now() < give_up) {
      if (Claims::has_chunks(claims_)) return true;
      if (is_ending_) return false;
      pause();
    }
    std::unique_lock lock(mutex_);
    ++sleeping_;
    wake_.wait(lock, [this, shift] {
      return is_ending_ || Claims::has_chunks(claims_) || (is_on(shift_) && shift_ != shift);
    });
    --sleeping_;
    if (is_ending_) return false;
    if (Claims::has_chunks(claims_)) return true;
  }
}

}  // namespace petalsd
