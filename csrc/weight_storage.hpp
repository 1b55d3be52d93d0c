// Row-major weights to packed storage and back: see packed_weight.hpp for the order and the formats.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "packed_weight.hpp"

namespace petalsd {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Some rows of a weight, `stride` elements apart, as a checkpoint has them.
struct WeightRows {
  const void* data;
  Element element;
  std::int64_t stride;
  std::int64_t num_rows;
};

// Writes these rows, one below the other and finite, to the memory of `weight`: num_out rows of num_in in all.
//
// No calibration data: what is minimized is the error of the weights themselves. int8 has the largest value of an output
// at +-127; kernels_rounding.inc chooses the scales of int4. Scales are normal numbers, never zero.
//
// On the calling thread alone: a model is often loaded while another span is served on the same cores, and threads that
// wait for each other would lose all of their time there.
void pack_weight(const std::vector<WeightRows>& rows, const PackedWeight& weight, const Kernels& kernels);

// Writes all tiles of `weight` as rows `[16 * tiles, num_in]`, num_in as it is padded, in float32 or bfloat16.
void unpack_weight(const PackedWeight& weight, DType dtype, void* out, int num_threads);

}  // namespace petalsd
