#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_tf32(const BackwardParams& p, const arch::Stream& stream) {
  if (p.chunks <= 2) return run_backward<TensorFloat32, 2>(p, stream);
  if (p.chunks <= 4) return run_backward<TensorFloat32, 4>(p, stream);
  if (p.chunks <= 6) return run_backward<TensorFloat32, 6>(p, stream);
  run_backward<TensorFloat32, 8>(p, stream);
}

}  // namespace ercn::affinity
