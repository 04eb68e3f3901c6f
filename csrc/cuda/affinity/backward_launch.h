#pragma once
// One backward launch, whose instantiations are spread over files.
#include "affinity/backward.h"
#include "affinity/operands.h"

namespace ercn::affinity {

struct BackwardTensors {
  const Tensor &feat, &value, &grad;         // packed
  const Tensor *value_parts, *feat_parts;    // null where they are not needed
  const Tensor& grad_feat;
};

// CHUNKS: chunks of grad_feat that a block owns.
template <typename Precision, int CHUNKS>
void run_backward(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream) {
  using Kernel = Backward<Precision, CHUNKS>;
  const typename Kernel::Params params{
      data<unsigned char>(t.feat), data<float>(t.value), data<float>(t.grad),
      t.value_parts ? mutable_data<float>(*t.value_parts) : nullptr,
      t.feat_parts ? mutable_data<float>(*t.feat_parts) : nullptr,
      t.feat_parts ? nullptr : mutable_data<typename Precision::Element>(t.grad_feat), sizes.pixels, sizes.padded,
      static_cast<int>(sizes.batch), static_cast<int>(sizes.dim), sizes.chunks, static_cast<int>(sizes.channels),
      static_cast<int>(sizes.padded_channels), slabs.count, slabs.tiles};
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kBackwardRows) * arch::divide_up(sizes.chunks, CHUNKS) *
                         (sizes.padded_channels / kChannels) * sizes.batch * slabs.count;
  arch::launch<Kernel>(params, {grid_size(blocks)}, backward_shared(sizes.chunks), stream);
}

void backward_bf16(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);
void backward_fp16(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);
void backward_tf32(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);
void backward_fp32(const BackwardTensors& t, const Sizes& sizes, Slabs slabs, const arch::Stream& stream);

}  // namespace ercn::affinity
