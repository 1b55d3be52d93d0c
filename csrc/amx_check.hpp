// Whether tiles compute on this machine what they should.
#pragma once

namespace petalsd {

// Multiplies small matrices in every format on the processor's tiles and on emulated ones and compares. To be asked only
// where the processor has tiles and this process may use them: virtual machines have offered broken ones.
bool amx_computes_rightly();

}  // namespace petalsd
