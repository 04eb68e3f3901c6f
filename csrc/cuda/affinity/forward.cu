#include "affinity/forward.h"

#include "affinity/launch.h"

namespace ercn::affinity {
namespace {

template <typename Precision>
void run(
    const ForwardOperands& operands, const Sizes& sizes, Slabs slabs, ForwardShared shared,
    const arch::Stream& stream) {
  const typename Forward<Precision>::Params params{
      operands.feat, operands.terms, operands.out, sizes.pixels, sizes.padded, static_cast<int>(sizes.batch),
      sizes.chunks, static_cast<int>(sizes.channels), static_cast<int>(sizes.padded_channels), slabs.count,
      slabs.tiles, shared.term_tiles, shared.resident};
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kForwardRows) * (sizes.padded_channels / kChannels) *
                         sizes.batch * slabs.count;
  arch::launch<Forward<Precision>>(params, {grid_size(blocks)}, shared.bytes, stream);
}

}  // namespace

void forward(
    Mode mode, const ForwardOperands& operands, const Sizes& sizes, Slabs slabs, ForwardShared shared,
    const arch::Stream& stream) {
  switch (mode) {
    case Mode::bf16: return run<BFloat16>(operands, sizes, slabs, shared, stream);
    case Mode::fp16: return run<Float16>(operands, sizes, slabs, shared, stream);
    case Mode::tf32: return run<TensorFloat32>(operands, sizes, slabs, shared, stream);
    case Mode::fp32: return run<Float32>(operands, sizes, slabs, shared, stream);
  }
}

}  // namespace ercn::affinity
