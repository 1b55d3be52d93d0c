#include "kernels.hpp"

#if defined(__x86_64__)
#include <emmintrin.h>
#define PETALSD_MADD(a, b) _mm_madd_epi16((__m128i)(a), (__m128i)(b))
#endif

#define PETALSD_LANES 4

namespace petalsd {
namespace baseline {
#include "kernels.inc"
}  // namespace baseline

const Kernels kBaselineKernels = baseline::kKernels;

}  // namespace petalsd
