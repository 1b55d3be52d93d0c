// A few threads that share the work of one caller.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace petalsd {

// `run` cuts a job into chunks that the caller and the helpers claim one by one. The caller never waits for a helper
// that has not claimed a chunk, so a team stays as fast as its caller where the cores are taken by others. During a shift
// helpers look out for the next job; else they sleep, so that they keep no core from those who wait for the answer.
//
// One caller at a time. The helpers end with the team.
class ThreadTeam {
 public:
  // `num_threads` counts the caller; at least 1.
  explicit ThreadTeam(int num_threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  // While it lives, jobs follow one another closely: helpers come now, and go when it ends. The caller's, one at a time.
  class Shift {
   public:
    explicit Shift(ThreadTeam& team) : team_(team) { team_.begin_shift(); }
    ~Shift() { ++team_.shift_; }
    Shift(const Shift&) = delete;
    Shift& operator=(const Shift&) = delete;

   private:
    ThreadTeam& team_;
  };

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls work(chunk) for every chunk below `num_chunks`, each once, in any order; returns when all are done.
  template <typename Work>
  void run(std::int64_t num_chunks, const Work& work) {
    run_job(num_chunks, [](const void* context, std::int64_t chunk) { (*static_cast<const Work*>(context))(chunk); },
            &work);
  }

 private:
  using Call = void (*)(const void* context, std::int64_t chunk);

  // Which job, how many chunks it has and which is next, in one word: a claim succeeds only for the job it was
  // made for, and the caller does not end that job before the claimed chunk is done.
  struct Claims {
    static constexpr std::uint64_t kCountBits = 20;
    static constexpr std::uint64_t kMask = (std::uint64_t{1} << kCountBits) - 1;
    static std::uint64_t pack(std::uint64_t job, std::uint64_t count) { return job << 2 * kCountBits | count << kCountBits; }
    static std::uint64_t count(std::uint64_t word) { return word >> kCountBits & kMask; }
    static std::uint64_t next(std::uint64_t word) { return word & kMask; }
    static bool has_chunks(std::uint64_t word) { return next(word) < count(word); }
  };

  static bool is_on(std::uint64_t shift) { return shift % 2 == 1; }
  void begin_shift();
  void wake_sleepers();
  void run_job(std::int64_t num_chunks, Call call, const void* context);
  void work_off();
  void help();
  bool await_job();

  std::vector<std::thread> helpers_;
  std::uint64_t job_ = 0;
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<std::uint64_t> claims_{0};
  std::atomic<std::int64_t> done_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<std::uint64_t> shift_{0};  // counts beginnings and ends
  std::atomic<bool> is_ending_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace petalsd
