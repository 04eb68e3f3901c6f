#pragma once
#include <arch/launch.h>

#include "pool/problem.h"

namespace ercn::pool {

// to [columns] of `type` from its partial results: Σ parts[row, column] over `rows` rows `stride` floats apart, in a
// fixed order.
void column_sums(
    const float* parts, int64_t rows, int64_t stride, int64_t columns, void* to, Type type, const arch::Stream& stream);

}  // namespace ercn::pool
