// Linear layers over packed weights on a team of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include "thread_team.hpp"
#include "tiers.hpp"

namespace petalsd {

// The task's outputs, shared out among the team.
void multiply(const LinearTask& task, const LinearKernels& kernels, ThreadTeam& team);

// Layers by themselves, for blocks that are not computed as a whole. All of them share the team's threads and its memory
// for operands.
class LinearTeam {
 public:
  // `num_threads` counts the caller.
  LinearTeam(int num_threads, Tier tier) : team_(num_threads), tier_(tier) {}

  const Tier& tier() const { return tier_; }

  // out[r, n] = sum_k in[r, k] * weight[n, k] for R rows; in `[R, num_in]` and out `[R, num_out]` are float32, and
  // with `is_wide` inputs are not rounded beside bfloat16 weights. May be called from any thread; waits for a call that is
  // running.
  void run(const PackedWeight& weight, const float* in, float* out, std::int64_t num_rows, bool is_wide);

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };

  void reserve(std::int64_t bytes);

  std::mutex mutex_;
  ThreadTeam team_;
  const Tier tier_;
  std::unique_ptr<char, Free> operands_;
  std::int64_t operands_bytes_ = 0;
};

}  // namespace petalsd
