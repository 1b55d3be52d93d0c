#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PETALSD_DOT_INT8
#endif

#define PETALSD_LANES 16

namespace petalsd {
namespace avx512vnni {
#include "kernels.inc"
}  // namespace avx512vnni

const Kernels kAvx512VnniKernels = avx512vnni::kKernels;

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
