#include "affinity/sm90/forward.h"
#include "affinity/sm90/launch.h"

namespace ercn::sm90::affinity {

void forward(const ForwardParams& params, Float type, int dim, int padded_channels, const arch::Stream& stream) {
  with_sizes(type, dim, padded_channels, [&](auto element, auto d, auto p) {
    using Kernel = Forward<decltype(element), d, p>;
    arch::launch<Kernel>(params, {static_cast<int>(params.scheduler.workers)}, Kernel::Tiles::kShared, stream);
  });
}

}  // namespace ercn::sm90::affinity
