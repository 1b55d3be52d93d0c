#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define PETALSD_MADD(a, b) _mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#define PETALSD_MADDUBS(a, b) _mm512_maddubs_epi16((__m512i)(a), (__m512i)(b))
#endif

#define PETALSD_LANES 16

namespace petalsd {
namespace avx512 {
#include "kernels.inc"
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::kKernels;

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
