#include "residency.hpp"

#include <algorithm>
#include <tuple>

namespace petalsd {

std::vector<std::size_t> choose_batch(const std::vector<Need>& needs, std::int64_t capacity) {
  std::vector<std::size_t> chosen;
  for (const bool is_resident : {true, false}) {
    for (std::size_t index = 0; index < needs.size(); ++index) {
      const Need& need = needs[index];
      if (need.is_resident != is_resident || need.pages > capacity) continue;
      capacity -= need.pages;
      chosen.push_back(index);
    }
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

void order_victims(std::vector<Idle>& sessions) {
  std::sort(sessions.begin(), sessions.end(), [](const Idle& left, const Idle& right) {
    return std::tie(left.last_used, left.handle) < std::tie(right.last_used, right.handle);
  });
}

}  // namespace petalsd
