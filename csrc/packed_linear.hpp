// Linear layers over packed weights on a team of threads.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "thread_team.hpp"

namespace petalsd {

// Tiles that one thread takes at a time: their weights stay in its cache for all rows.
constexpr std::int64_t kTilesPerChunk = 2;

// The task's outputs, shared out among the team.
void multiply(const LinearTask& task, const LinearKernels& kernels, ThreadTeam& team);

}  // namespace petalsd
