#pragma once
// Sums and maxima over the threads of a block, in a fixed order.
#include <arch/base.h>

#include <cmath>

namespace ercn::pool {

// max of -Inf only is taken as 0, so that exp(-Inf - max) is 0 and not NaN.
ERCN_DEVICE float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

struct Add {
  ERCN_DEVICE static float of(float a, float b) { return a + b; }
};
struct Max {
  ERCN_DEVICE static float of(float a, float b) { return fmaxf(a, b); }
};

template <typename Operation>
ERCN_DEVICE float reduce_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = Operation::of(x, arch::shuffle_xor(x, mask));
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
  for (int warp = 1; warp < THREADS / 32; ++warp) x = Operation::of(x, scratch[warp]);
  return x;
}

}  // namespace ercn::pool
