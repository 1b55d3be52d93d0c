#include "decode_kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define PETALSD_DOT_BF16
#endif

#define PETALSD_LANES 16

namespace petalsd {
namespace avx512bf16 {
#include "decode_kernels.inc"
}  // namespace avx512bf16

const DecodeKernels& avx512bf16_kernels(DType dtype) { return avx512bf16::kernels_of(dtype); }

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
