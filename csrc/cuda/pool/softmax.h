#pragma once
// The exponential of the pool.
#include <arch/convert.h>

namespace ercn::pool {

constexpr float kLog2E = 1.4426950408889634f;

// e^x for x ≤ 0, to |x| · 2^-24 and 2 ulp; exactly 0 for -Inf.
ERCN_DEVICE float exp_fast(float x) { return arch::exp2_fast(x * kLog2E); }

}  // namespace ercn::pool
