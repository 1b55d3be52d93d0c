#include "packed_linear.hpp"

#include <algorithm>
#include <cstddef>

#include "check.hpp"
#include "lanes.hpp"

namespace petalsd {

namespace {

// Tiles that one thread takes at a time: their weights stay in its cache for all rows.
constexpr std::int64_t kTilesPerChunk = 2;
constexpr std::int64_t kRowsAtOnce = 128;

}  // namespace

void multiply(const LinearTask& task, const LinearKernels& kernels, ThreadTeam& team) {
  const std::int64_t num_tiles = task.weight.num_tiles();
  const std::int64_t num_chunks = (num_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
  const Lanes lanes(num_chunks, team);
  team.run(num_chunks, [&](std::int64_t claim) {
    const std::int64_t first = lanes.at(claim) * kTilesPerChunk;
    kernels.multiply(task, first, std::min(first + kTilesPerChunk, num_tiles));
  });
}

void PackedLinear::run(const float* in, float* out, std::int64_t num_rows, ThreadTeam& team) {
  PETALSD_CHECK(num_rows > 0, "num_rows = ", num_rows);
  const LinearKernels& kernels = tier_.kernels.linear[static_cast<int>(weight_.format)];
  const std::int64_t stride = kernels.operand_bytes(weight_.num_in);
  if (operands_ == nullptr) {
    operands_.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(kRowsAtOnce * stride), kAlignment)));
  }
  for (std::int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, num_rows - row);
    team.run(count, [&](std::int64_t i) {
      kernels.prepare(in + (row + i) * weight_.num_in, operands_.get() + i * stride, weight_.num_in);
    });
    multiply({weight_, nullptr, operands_.get(), stride, nullptr, out + row * weight_.num_out, count}, kernels, team);
  }
}

}  // namespace petalsd
