#include "decode_kernels.hpp"

#define PETALSD_LANES 4

namespace petalsd {
namespace baseline {
#include "decode_kernels.inc"
}  // namespace baseline

const DecodeKernels& baseline_kernels(DType dtype) { return baseline::kernels_of(dtype); }

}  // namespace petalsd
