#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_tf32(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  if (sizes.chunks <= 2) return run_backward<TensorFloat32, 2>(t, sizes, slabs, stream);
  if (sizes.chunks <= 4) return run_backward<TensorFloat32, 4>(t, sizes, slabs, stream);
  if (sizes.chunks <= 6) return run_backward<TensorFloat32, 6>(t, sizes, slabs, stream);
  run_backward<TensorFloat32, 8>(t, sizes, slabs, stream);
}

}  // namespace ercn::affinity
