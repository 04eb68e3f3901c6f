#include "affinity/affinity.h"
#include "affinity/backward_launch.h"

namespace ercn::affinity {

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& value, const Tensor& feat, bool need_value, bool exact) {
  const Sizes sizes(value, feat);
  Tensor grad_feat = empty(feat, {sizes.batch, sizes.dim, sizes.pixels}, feat.scalar_type());
  Tensor grad_value = need_value ? empty(value, {sizes.batch, sizes.channels, sizes.pixels}, value.scalar_type())
                                 : empty(value, {0}, value.scalar_type());
  if (value.numel() == 0 || feat.numel() == 0) {
    return {torch::stable::zero_(grad_value), torch::stable::zero_(grad_feat)};
  }
  const arch::Stream stream(feat);
  exact = exact && feat.scalar_type() == ScalarType::Float;
  const int most = backward_chunks(stream.shared_limit());
  STD_TORCH_CHECK(
      sizes.chunks <= most, "the backward takes at most ", most * chunk_channels(static_cast<int>(feat.element_size())),
      " features of this dtype on this device; got ", sizes.dim);
  const MapForm form = exact ? MapForm::whole : MapForm::round;
  const Tensor packed = pack_features(feat, sizes, exact, stream);
  const Tensor packed_value = pack_map(value, form, sizes, stream);
  const Tensor packed_grad = pack_map(grad_out, form, sizes, stream);

  const int64_t rows = arch::divide_up<int64_t>(sizes.pixels, kBackwardRows);
  const int64_t tiles = arch::divide_up<int64_t>(sizes.pixels, kBackwardColumns);
  const int64_t channel_blocks = sizes.padded_channels / kChannels;
  const Slabs cut = slabs(tiles, rows * sizes.batch * channel_blocks, 2 * int64_t{stream.multiprocessors()});
  const bool whole_feat = cut.count * channel_blocks == 1;
  const bool whole_value = cut.count == 1 && value.scalar_type() == ScalarType::Float;
  const Tensor feat_parts = empty(
      feat, {whole_feat ? 0 : cut.count * channel_blocks, sizes.batch, sizes.dim, sizes.pixels}, ScalarType::Float);
  Tensor value_parts = grad_value;
  if (need_value && !whole_value) {
    value_parts = empty(value, {cut.count, sizes.batch, sizes.channels, sizes.pixels}, ScalarType::Float);
  }
  const BackwardTensors tensors{packed, packed_value, packed_grad, need_value ? &value_parts : nullptr,
                                whole_feat ? nullptr : &feat_parts, grad_feat};
  switch (feat.scalar_type()) {
    case ScalarType::BFloat16: backward_bf16(tensors, sizes, cut, stream); break;
    case ScalarType::Half: backward_fp16(tensors, sizes, cut, stream); break;
    default: exact ? backward_fp32(tensors, sizes, cut, stream) : backward_tf32(tensors, sizes, cut, stream);
  }
  if (!whole_feat) sum_slabs(feat_parts, cut.count * channel_blocks, grad_feat, stream);
  if (need_value && !whole_value) sum_slabs(value_parts, cut.count, grad_value, stream);
  return {grad_value, grad_feat};
}

}  // namespace ercn::affinity
