#pragma once
// One backward launch, whose instantiations are spread over files.
#include "affinity/backward.h"
#include "affinity/launch.h"

namespace ercn::affinity {

// CHUNKS: chunks of grad_feat that a block owns.
template <typename Precision, int CHUNKS>
void run_backward(const BackwardOperands& operands, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  using Kernel = Backward<Precision, CHUNKS>;
  const typename Kernel::Params params{
      operands.feat, operands.value, operands.grad, operands.grad_value, operands.grad_feat_parts,
      static_cast<typename Precision::Element*>(operands.grad_feat), sizes.pixels, sizes.padded,
      static_cast<int>(sizes.batch), static_cast<int>(sizes.dim), sizes.chunks, static_cast<int>(sizes.channels),
      static_cast<int>(sizes.padded_channels), slabs.count, slabs.tiles};
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kBackwardRows) *
                         arch::divide_up(sizes.chunks, CHUNKS) * (sizes.padded_channels / kChannels) * sizes.batch *
                         slabs.count;
  arch::launch<Kernel>(params, {grid_size(blocks)}, backward_shared(sizes.chunks), stream);
}

}  // namespace ercn::affinity
