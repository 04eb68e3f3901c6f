#pragma once
// One backward launch, whose instantiations are spread over files.
#include "affinity/backward.h"

namespace ercn::affinity {

// CHUNKS: chunks of grad_feat that a block owns.
template <typename Precision, int CHUNKS>
void run_backward(const BackwardParams& p, const arch::Stream& stream) {
  const int64_t blocks = arch::divide_up<int64_t>(p.pixels, kBackwardRows) * arch::divide_up(p.chunks, CHUNKS) *
                         (p.padded_channels / kChannels) * p.batch * p.slabs;
  arch::launch<Backward<Precision, CHUNKS>>(p, {grid_size(blocks)}, backward_shared(p.chunks), stream);
}

}  // namespace ercn::affinity
