#include "decode_kernels.hpp"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define PETALSD_LANES 8

namespace petalsd {
namespace avx2 {
#include "decode_kernels.inc"
}  // namespace avx2

const DecodeKernels& avx2_kernels(DType dtype) { return avx2::kernels_of(dtype); }

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
