#include "affinity/backward_launch.h"

namespace ercn::affinity {

void backward_bf16(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  if (sizes.chunks <= 1) return run_backward<BFloat16, 1>(t, sizes, slabs, stream);
  if (sizes.chunks <= 2) return run_backward<BFloat16, 2>(t, sizes, slabs, stream);
  if (sizes.chunks <= 3) return run_backward<BFloat16, 3>(t, sizes, slabs, stream);
  run_backward<BFloat16, 4>(t, sizes, slabs, stream);
}

}  // namespace ercn::affinity
