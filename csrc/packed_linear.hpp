// Linear layers over packed weights on a team of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "thread_team.hpp"
#include "tiers.hpp"

namespace petalsd {

// The task's outputs, shared out among the team.
void multiply(const LinearTask& task, const LinearKernels& kernels, ThreadTeam& team);

// One layer by itself, for blocks that are not computed as a whole. `run` is called by one thread at a time.
class PackedLinear {
 public:
  PackedLinear(const PackedWeight& weight, Tier tier) : weight_(weight), tier_(tier) {}

  const Tier& tier() const { return tier_; }

  // out[r, n] = sum_k in[r, k] * weight[n, k] for R rows; in `[R, num_in]` and out `[R, num_out]` are float32.
  void run(const float* in, float* out, std::int64_t num_rows, ThreadTeam& team);

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };

  const PackedWeight weight_;
  const Tier tier_;
  std::unique_ptr<char, Free> operands_;
};

}  // namespace petalsd
