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

void LinearTeam::run(const PackedWeight& weight, const float* in, float* out, std::int64_t num_rows,
                     bool is_wide) {
  PETALSD_CHECK(num_rows > 0, "num_rows = ", num_rows);
  const bool keeps_inputs = is_wide && weight.format == WeightFormat::kBFloat16;
  const LinearKernels& kernels =
      keeps_inputs ? tier_.kernels.wide_bfloat16 : tier_.kernels.linear[static_cast<int>(weight.format)];
  const std::int64_t stride = operand_stride(kernels.operand_bytes(weight.num_in));
  const std::lock_guard lock(mutex_);
  const ThreadTeam::Shift shift(team_);
  reserve(round_up(std::min(kRowsAtOnce, num_rows), kTileRows) * stride);
  for (std::int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, num_rows - row);
    team_.run(count, [&](std::int64_t i) {
      kernels.prepare(in + (row + i) * weight.num_in, operands_.get() + i * stride, weight.num_in);
    });
    multiply({weight, nullptr, operands_.get(), stride, nullptr, out + row * weight.num_out, count}, kernels, team_);
  }
}

void LinearTeam::reserve(std::int64_t bytes) {
  if (bytes <= operands_bytes_) return;
  operands_.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), kAlignment)));
  operands_bytes_ = bytes;
}

}  // namespace petalsd
