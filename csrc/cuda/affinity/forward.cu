#include "affinity/forward.h"

namespace ercn::affinity {

void forward(const ForwardParams& p, Float type, bool exact, int shared_bytes, const arch::Stream& stream) {
  const int64_t blocks = arch::divide_up<int64_t>(p.pixels, kForwardRows) * (p.padded_channels / kChannels) * p.batch *
                         p.slabs;
  with_precision(type, exact, [&](auto precision) {
    arch::launch<Forward<decltype(precision)>>(p, {grid_size(blocks)}, shared_bytes, stream);
  });
}

}  // namespace ercn::affinity
