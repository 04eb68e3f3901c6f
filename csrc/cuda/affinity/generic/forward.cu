#include "affinity/generic/forward.h"

namespace ercn::affinity {

void forward(const ForwardParams& params, Float type, bool exact, const arch::Stream& stream) {
  const Sizes& sizes = params.sizes;
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kForwardRows) * (sizes.padded_channels / kChannels) *
                         sizes.batch * params.slabs.count;
  with_precision(type, exact, [&](auto precision) {
    arch::launch<Forward<decltype(precision)>>(params, {grid_size(blocks)}, params.shared.bytes, stream);
  });
}

}  // namespace ercn::affinity
