// How a team's threads share out work whose parts lie one after the other in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "thread_team.hpp"

namespace petalsd {

// Work that a team's threads claim in turn, ordered so that each gets neighbours one after the other: what a kernel
// asks the memory for is what comes next in its own thread.
class Lanes {
 public:
  Lanes(std::int64_t count, const ThreadTeam& team)
      : count_(count), num_lanes_(std::min<std::int64_t>(team.num_threads(), count)) {}

  std::int64_t at(std::int64_t claim) const {
    const std::int64_t lane = claim % num_lanes_;
    const std::int64_t longer_lanes = std::min(lane, count_ % num_lanes_);
    return lane * (count_ / num_lanes_) + longer_lanes + claim / num_lanes_;
  }

 private:
  const std::int64_t count_;
  const std::int64_t num_lanes_;
};

}  // namespace petalsd
