#include "affinity_backward.h"
#include "affinity_launch.h"

namespace ercn::sm90::affinity {

template <typename Element>
void backward(const BackwardCall& call, const arch::Stream& stream) {
  with_sizes(call.feat.dim, call.padded_channels, [&](auto d, auto p) {
    using Kernel = Backward<Element, d, p>;
    arch::launch<Kernel>(
        {tensor_map<Element>(call.feat, Kernel::Tiles::kRows), tensor_map<Element>(call.feat, Kernel::kColumns),
         call.value_sums == nullptr ? arch::TensorMap{} : tensor_map<Element>(call.terms, Kernel::kTerms),
         tensor_map<arch::fp16>(call.pairs, p), call.schedule, call.feat_sums, call.value_sums},
        {static_cast<int>(call.schedule.workers)}, Kernel::Tiles::kShared, stream);
  });
}

template void backward<arch::bf16>(const BackwardCall&, const arch::Stream&);
template void backward<arch::fp16>(const BackwardCall&, const arch::Stream&);

}  // namespace ercn::sm90::affinity
