#include "tiers.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx_check.hpp"
#include "check.hpp"

namespace petalsd {

namespace {

struct TierInfo {
  const char* name;
  const char* needs;
  bool (*is_there)(const Processor& processor);
  const Kernels& kernels;
};

bool has_avx512_bf16(const Processor& p) { return p.has_avx512 && p.has_avx512_vnni && p.has_avx512_bf16; }

// The fastest first.
const TierInfo kTiers[] = {
    {"amx", "AMX with BF16 and INT8", [](const Processor& p) { return p.has_amx && has_avx512_bf16(p); }, kAmxKernels},
    {"avx512bf16", "AVX-512 with BF16 and VNNI",
     has_avx512_bf16, kAvx512Bf16Kernels},
    {"avx512vnni", "AVX-512 with VNNI", [](const Processor& p) { return p.has_avx512 && p.has_avx512_vnni; },
     kAvx512VnniKernels},
    {"avx512", "AVX-512 F, BW, DQ and VL", [](const Processor& p) { return p.has_avx512; }, kAvx512Kernels},
    {"avx2", "AVX2 with FMA", [](const Processor& p) { return p.has_avx2; }, kAvx2Kernels},
    {"baseline", "nothing", [](const Processor&) { return true; }, kBaselineKernels},
    // Never the fastest: for tests of the code around the tiles.
    {"amx-emulated", "AVX-512 with BF16 and VNNI", has_avx512_bf16, kEmulatedAmxKernels},
};

#if defined(__x86_64__)
// Linux gives a process the large state of tiles only if it asks.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool find_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, tiles, INT8
  if ((edx & kNeeded) != kNeeded || __builtin_cpu_supports("avx512bf16") == 0 || !may_use_tiles()) return false;
  static const bool is_right = amx_computes_rightly();
  return is_right;
}
#endif

}  // namespace

Processor Processor::here() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") != 0 &&
                          __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                          __builtin_cpu_supports("avx512vl") != 0;
  return {has_avx2, has_avx512, __builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx512bf16") != 0,
          find_amx()};
#else
  return {false, false, false, false, false};
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
