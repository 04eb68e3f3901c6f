#pragma once
#include <arch/launch.h>

namespace ercn::pool {

// scale [2]: a power of two that brings dP, the gradients of the branches, into fp16's range, and its inverse; from the
// largest |ds| of every slot and w [count], fp16, of `heads` heads.
void branch_scale(
    const float* largest, int64_t slots, const void* w, int64_t count, int heads, float* scale,
    const arch::Stream& stream);

}  // namespace ercn::pool
