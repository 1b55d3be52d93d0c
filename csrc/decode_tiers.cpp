#include "decode_tiers.hpp"

#include "check.hpp"

namespace petalsd {

namespace {

struct TierInfo {
  const char* name;
  const char* needs;
  bool (*is_there)(const Processor& processor);
  const DecodeKernels& (*kernels)(DType dtype);
};

// The fastest first.
constexpr TierInfo kTiers[] = {
    {"avx512bf16", "AVX-512 with BF16", [](const Processor& p) { return p.has_avx512 && p.has_avx512_bf16; },
     avx512bf16_kernels},
    {"avx512", "AVX-512 F, BW, DQ and VL", [](const Processor& p) { return p.has_avx512; }, avx512_kernels},
    {"avx2", "AVX2 with FMA", [](const Processor& p) { return p.has_avx2; }, avx2_kernels},
    {"baseline", "nothing", [](const Processor&) { return true; }, baseline_kernels},
};

}  // namespace

Processor Processor::here() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") != 0 &&
                          __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                          __builtin_cpu_supports("avx512vl") != 0;
  return {has_avx2, has_avx512, __builtin_cpu_supports("avx512bf16") != 0};
#else
  return {false, false, false};
#endif
}

Tier choose_tier(const std::string& name, DType dtype, const Processor& processor) {
  for (const TierInfo& tier : kTiers) {
    if (name != "auto" && name != tier.name) continue;
    const bool is_there = tier.is_there(processor);
    PETALSD_CHECK(is_there || name == "auto", "tier = ", name, ": this processor has no ", tier.needs);
    if (is_there) return {tier.name, tier.kernels(dtype)};
  }
  throw PoolError(text("tier = ", name, ": auto, baseline, avx2, avx512 or avx512bf16"));
}

}  // namespace petalsd
