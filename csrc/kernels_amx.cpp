#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
#define PETALSD_DOT_BF16
#define PETALSD_DOT_INT8
#endif

#define PETALSD_LANES 16

namespace petalsd {
namespace amx {
#include "kernels.inc"

#include "kernels_tiles.inc"

#include "amx_tiles.inc"

// Everything but the products is that of the widest registers.
template <typename Tiles>
constexpr Kernels with_tiles() {
  Kernels kernels = kKernels;
  kernels.linear[static_cast<int>(WeightFormat::kBFloat16)].multiply = multiply_bfloat16<Tiles>;
  kernels.linear[static_cast<int>(WeightFormat::kInt8)].multiply = multiply_int<Tiles, Int8Weights>;
  kernels.linear[static_cast<int>(WeightFormat::kInt4)].multiply = multiply_int<Tiles, Int4Weights>;
  return kernels;
}

}  // namespace amx

#if defined(__x86_64__)
const Kernels kAmxKernels = amx::with_tiles<amx::HardwareTiles>();
#else
const Kernels kAmxKernels = amx::with_tiles<amx::EmulatedTiles>();
#endif
const Kernels kEmulatedAmxKernels = amx::with_tiles<amx::EmulatedTiles>();

}  // namespace petalsd

#if defined(__x86_64__)
#pragma GCC pop_options
#endif
