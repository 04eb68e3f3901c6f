#pragma once
// The pool's kernels on Hopper and what they are given.
#include <arch/launch.h>

#include "library.h"
#include "sm90/pool_product.h"

namespace ercn::sm90 {

struct ForwardParams {
  pool::Problem problem;
  pool::Weights weights;
  pool::Parts parts;
  float* scores;  // [B, K, N] or [K, T]
  ProductMaps maps;
};

void pool_forward(const ForwardParams& params, ScalarType type, bool channels_first, const arch::Stream& stream);

}  // namespace ercn::sm90
