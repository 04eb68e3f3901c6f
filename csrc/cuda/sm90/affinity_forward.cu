#include "affinity_forward.h"
#include "affinity_launch.h"

namespace ercn::sm90::affinity {

template <typename Element>
void forward(const ForwardCall& call, const arch::Stream& stream) {
  with_sizes(call.feat.dim, call.padded_channels, [&](auto d, auto p) {
    using Kernel = Forward<Element, d, p>;
    arch::launch<Kernel>(
        {tensor_map<Element>(call.feat, kPixels), tensor_map<Element>(call.terms, Kernel::kTerms), call.schedule,
         call.direct, call.mirrored, call.width, call.channels},
        {static_cast<int>(call.schedule.workers)}, Kernel::Tiles::kShared, stream);
  });
}

template void forward<arch::bf16>(const ForwardCall&, const arch::Stream&);
template void forward<arch::fp16>(const ForwardCall&, const arch::Stream&);

}  // namespace ercn::sm90::affinity
