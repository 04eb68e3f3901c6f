#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_fp32(const BackwardParams& p, const arch::Stream& stream) {
  if (p.chunks <= 2) return run_backward<Float32, 2>(p, stream);
  if (p.chunks <= 4) return run_backward<Float32, 4>(p, stream);
  run_backward<Float32, 6>(p, stream);
}

}  // namespace ercn::affinity
