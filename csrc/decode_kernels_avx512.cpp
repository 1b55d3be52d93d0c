#include "decode_kernels.hpp"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define PETALSD_LANES 16

namespace petalsd {
namespace avx512 {
#include "decode_kernels.inc"
}  // namespace avx512

const DecodeKernels& avx512_kernels(DType dtype) { return avx512::kernels_of(dtype); }

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
