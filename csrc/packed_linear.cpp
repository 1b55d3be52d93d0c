#include "packed_linear.hpp"

#include <algorithm>

#include "lanes.hpp"

namespace petalsd {

void multiply(const LinearTask& task, const LinearKernels& kernels, ThreadTeam& team) {
  const std::int64_t num_tiles = task.weight.num_tiles();
  const std::int64_t num_chunks = (num_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
  const Lanes lanes(num_chunks, team);
  team.run(num_chunks, [&](std::int64_t claim) {
    const std::int64_t first = lanes.at(claim) * kTilesPerChunk;
    kernels.multiply(task, first, std::min(first + kTilesPerChunk, num_tiles));
  });
}

}  // namespace petalsd
