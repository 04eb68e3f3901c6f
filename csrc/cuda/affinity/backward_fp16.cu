#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_fp16(const BackwardParams& p, const arch::Stream& stream) {
  if (p.chunks <= 2) return run_backward<Float16, 2>(p, stream);
  run_backward<Float16, 4>(p, stream);
}

}  // namespace ercn::affinity
