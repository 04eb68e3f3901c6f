#pragma once
#include <arch/launch.h>

#include "library.h"

namespace ercn::pool {

// to, any shape, from its partial results: to[c] = Σ parts[row, c] over `rows` rows in a fixed order, `stride` floats apart.
void column_sums(const float* parts, int64_t rows, int64_t stride, const Tensor& to, const arch::Stream& stream);

}  // namespace ercn::pool
