// Which kernels a processor can run: all tiers are compiled, one is chosen at run time.
#pragma once

#include <string>

#include "kernels.hpp"

namespace petalsd {

// Instructions beyond those that every processor of the architecture has.
struct Processor {
  bool has_avx2;         // with FMA
  bool has_avx512;       // F, BW, DQ and VL
  bool has_avx512_vnni;
  bool has_avx512_bf16;
  bool has_amx;  // tiles of BF16 and INT8, which the system lets this process use

  static Processor here();
};

struct Tier {
  const char* name;
  const Kernels& kernels;
};

// The fastest tier of the processor for "auto", or the one of that name. PoolError for one that it does not have.
Tier choose_tier(const std::string& name, const Processor& processor = Processor::here());

}  // namespace petalsd
