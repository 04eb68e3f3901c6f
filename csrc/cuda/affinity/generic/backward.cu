#include "affinity/generic/backward.h"

namespace ercn::affinity {
namespace {

// The first number of chunks that holds all features, or the last.
template <typename Precision, int CHUNKS, int... MORE>
void run(const BackwardParams& params, const arch::Stream& stream) {
  const Sizes& sizes = params.sizes;
  if constexpr (sizeof...(MORE) > 0) {
    if (sizes.chunks > CHUNKS) return run<Precision, MORE...>(params, stream);
  }
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kBackwardRows) *
                         arch::divide_up(sizes.chunks, CHUNKS) * (sizes.padded_channels / kChannels) * sizes.batch *
                         params.slabs.count;
  arch::launch<Backward<Precision, CHUNKS>>(params, {grid_size(blocks)}, backward_shared(sizes.chunks), stream);
}

}  // namespace

void backward(const BackwardParams& params, Float type, bool exact, const arch::Stream& stream) {
  if (type == Float::bf16) return run<BFloat16, 1, 2, 3, 4>(params, stream);
  if (type == Float::fp16) return run<Float16, 2, 4>(params, stream);
  exact ? run<Float32, 2, 4, 6>(params, stream) : run<TensorFloat32, 2, 4, 6, 8>(params, stream);
}

}  // namespace ercn::affinity
