#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_bf16(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  if (sizes.chunks <= 1) return run_backward<BFloat16, 1>(operands, sizes, slabs, stream);
  if (sizes.chunks <= 2) return run_backward<BFloat16, 2>(operands, sizes, slabs, stream);
  if (sizes.chunks <= 3) return run_backward<BFloat16, 3>(operands, sizes, slabs, stream);
  run_backward<BFloat16, 4>(operands, sizes, slabs, stream);
}

}  // namespace ercn::affinity
