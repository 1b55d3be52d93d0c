#include "tiers.hpp"

#include "check.hpp"

namespace petalsd {

namespace {

struct TierInfo {
  const char* name;
  const char* needs;
  bool (*is_there)(const Processor& processor);
  const Kernels& kernels;
};

// The fastest first.
const TierInfo kTiers[] = {
    {"avx512bf16", "AVX-512 with BF16 and VNNI",
     [](const Processor& p) { return p.has_avx512 && p.has_avx512_vnni && p.has_avx512_bf16; }, kAvx512Bf16Kernels},
    {"avx512vnni", "AVX-512 with VNNI", [](const Processor& p) { return p.has_avx512 && p.has_avx512_vnni; },
     kAvx512VnniKernels},
    {"avx512", "AVX-512 F, BW, DQ and VL", [](const Processor& p) { return p.has_avx512; }, kAvx512Kernels},
    {"avx2", "AVX2 with FMA", [](const Processor& p) { return p.has_avx2; }, kAvx2Kernels},
    {"baseline", "nothing", [](const Processor&) { return true; }, kBaselineKernels},
};

}  // namespace

Processor Processor::here() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") != 0 &&
                          __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                          __builtin_cpu_supports("avx512vl") != 0;
  return {has_avx2, has_avx512, __builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx512bf16") != 0};
#else
  return {false, false, false, false};
#endif
}

Tier choose_tier(const std::string& name, const Processor& processor) {
  std::string names = "auto";
  for (const TierInfo& tier : kTiers) {
    names += text(", ", tier.name);
    if (name != "auto" && name != tier.name) continue;
    const bool is_there = tier.is_there(processor);
    PETALSD_CHECK(is_there || name == "auto", "tier = ", name, ": this processor has no ", tier.needs);
    if (is_there) return {tier.name, tier.kernels};
  }
  throw PoolError(text("tier = ", name, ": one of ", names));
}

}  // namespace petalsd
