// Which sessions of a batch run together, and whose pages leave the memory for them. Pure arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "admission.hpp"
#include "free_space.hpp"

namespace petalsd {

// What one session of a batch needs of the memory.
struct Need {
  std::int64_t pages;
  bool is_resident;  // it has all its pages in memory now
};

// Indices, ascending, of the sessions that run now: as many as need at most `capacity` pages together. Resident ones
// are taken first, because the others would push them out only to wait for them in the next batch; within each kind
// in order, and one that does not fit does not keep out those after it. Whoever is left out must get the next batch,
// with nobody new beside them: then all get their turn, for a session alone fits.
std::vector<std::size_t> choose_batch(const std::vector<Need>& needs, std::int64_t capacity);

// A session that is not in the batch.
struct Idle {
  Handle handle;
  std::int64_t last_used;  // number of the last batch it was in
};

// Least recently used first, the older session first among equals.
void order_victims(std::vector<Idle>& sessions);

}  // namespace petalsd
