#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define PETALSD_MADD(a, b) _mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#define PETALSD_MADDUBS(a, b) _mm256_maddubs_epi16((__m256i)(a), (__m256i)(b))
#endif

#define PETALSD_LANES 8

namespace petalsd {
namespace avx2 {
#include "kernels.inc"
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::kKernels;

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
