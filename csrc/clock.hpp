// The time.
#pragma once

#include <chrono>

namespace petalsd {

// Seconds of a clock that never goes back.
inline double monotonic_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace petalsd
