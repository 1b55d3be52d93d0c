// Linear layers over packed weights on a team of threads.
#pragma once

#include "kernels.hpp"
#include "thread_team.hpp"

namespace petalsd {

// The task's outputs, shared out among the team.
void multiply(const LinearTask& task, const LinearKernels& kernels, ThreadTeam& team);

}  // namespace petalsd
