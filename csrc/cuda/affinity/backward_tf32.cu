#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_tf32(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  if (sizes.chunks <= 2) return run_backward<TensorFloat32, 2>(operands, sizes, slabs, stream);
  if (sizes.chunks <= 4) return run_backward<TensorFloat32, 4>(operands, sizes, slabs, stream);
  if (sizes.chunks <= 6) return run_backward<TensorFloat32, 6>(operands, sizes, slabs, stream);
  run_backward<TensorFloat32, 8>(operands, sizes, slabs, stream);
}

}  // namespace ercn::affinity
