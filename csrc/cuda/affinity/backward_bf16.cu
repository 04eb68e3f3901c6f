#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_bf16(const BackwardParams& p, const arch::Stream& stream) {
  if (p.chunks <= 1) return run_backward<BFloat16, 1>(p, stream);
  if (p.chunks <= 2) return run_backward<BFloat16, 2>(p, stream);
  if (p.chunks <= 3) return run_backward<BFloat16, 3>(p, stream);
  run_backward<BFloat16, 4>(p, stream);
}

}  // namespace ercn::affinity
