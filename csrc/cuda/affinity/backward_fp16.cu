#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_fp16(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  if (sizes.chunks <= 2) return run_backward<Float16, 2>(operands, sizes, slabs, stream);
  run_backward<Float16, 4>(operands, sizes, slabs, stream);
}

}  // namespace ercn::affinity
