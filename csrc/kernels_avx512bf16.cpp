#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define PETALSD_DOT_BF16
#define PETALSD_DOT_INT8
#endif

#define PETALSD_LANES 16

namespace petalsd {
namespace avx512bf16 {
#include "kernels.inc"
}  // namespace avx512bf16

const Kernels kAvx512Bf16Kernels = avx512bf16::kKernels;

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
