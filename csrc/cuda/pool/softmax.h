#pragma once
// What softmaxes and their gradients are made of: the exponential, and sums and maxima over threads in a fixed order.
#include <arch/convert.h>

#include <cmath>

namespace ercn::pool {

constexpr float kLog2E = 1.4426950408889634f;

// e^x for x ≤ 0, to |x| · 2^-24 and 2 ulp; exactly 0 for -Inf.
ERCN_DEVICE float exp_fast(float x) { return arch::exp2_fast(x * kLog2E); }

// A maximum of -Inf is taken as 0, so that exp(-Inf - max) is 0 and not NaN.
ERCN_DEVICE float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

struct Add {
  ERCN_DEVICE static float apply(float a, float b) { return a + b; }
};
struct Max {
  ERCN_DEVICE static float apply(float a, float b) { return fmaxf(a, b); }
};

template <typename Operation>
ERCN_DEVICE float reduce_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = Operation::apply(x, arch::shuffle_xor(x, mask));
  return x;
}

// The result in every thread; scratch: THREADS / 32 floats of shared memory.
template <typename Operation, int THREADS>
ERCN_DEVICE float reduce_block(float x, float* scratch) {
  arch::sync_threads();  // scratch may still be read by a reduction before this one
  x = reduce_warp<Operation>(x);
  if (arch::lane_index() == 0) scratch[arch::warp_index()] = x;
  arch::sync_threads();
  x = scratch[0];
  for (int warp = 1; warp < THREADS / 32; ++warp) x = Operation::apply(x, scratch[warp]);
  return x;
}

}  // namespace ercn::pool
