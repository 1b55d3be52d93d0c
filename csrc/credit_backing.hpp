// What stands behind credit that the pages in memory do not cover.
#pragma once

#include <cstdint>

namespace petalsd {

// Called under PagePool's mutex: must not wait for anybody who may wait for the pool.
class CreditBacking {
 public:
  virtual ~CreditBacking() = default;

  // Makes room for at least `pages` pages in all, if it can: for how many there is room now.
  virtual std::int64_t grow_to(std::int64_t pages) = 0;

  // For how many pages there could be room, as far as is known.
  virtual std::int64_t limit() const = 0;

  // Gives all room back; nothing is stored.
  virtual void clear() = 0;
};

}  // namespace petalsd
