#include "affinity/generic/affinity.h"

#include "affinity/operands.h"

namespace ercn::affinity {
namespace {

// Whether products need TF32 terms; those of 16-bit features are exact without.
bool needs_terms(const Tensor& feat, bool exact) { return exact && type_of(feat) == Float::fp32; }

void combine_splits(const Tensor& parts, int64_t splits, const Tensor& out, const arch::Stream& stream) {
  affinity::combine_splits(
      data<float>(parts), static_cast<int>(splits), out.mutable_data_ptr(), type_of(out), out.numel(), stream);
}

}  // namespace

Map map_of(const Tensor& x) { return {x.const_data_ptr(), type_of(x), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor pack_features(const Tensor& feat, const Sizes& sizes, bool exact, const arch::Stream& stream) {
  const Tensor packed = empty(feat, {sizes.batch, sizes.padded, sizes.slabs, kRowBytes}, ScalarType::Byte);
  pack_features(map_of(feat), !exact, mutable_data<unsigned char>(packed), sizes, stream);
  return packed;
}

Tensor pack_map(const Tensor& map, MapForm form, const Sizes& sizes, const arch::Stream& stream) {
  const bool terms = form == MapForm::terms;
  const Tensor packed = empty(
      map, {sizes.batch, terms ? 2 : 1, sizes.padded_channels, sizes.padded},
      terms ? ScalarType::BFloat16 : ScalarType::Float);
  pack_map(map_of(map), form, packed.mutable_data_ptr(), sizes, stream);
  return packed;
}

Tensor forward(const Tensor& value, const Tensor& feat, bool exact) {
  const Sizes sizes(value, feat);
  Tensor out = empty(value, {sizes.batch, sizes.channels, sizes.pixels}, ScalarType::Float);
  if (out.numel() == 0) return out;
  if (sizes.dim == 0) return torch::stable::zero_(out);
  const arch::Stream stream(feat);
  const Tensor packed = pack_features(feat, sizes, exact, stream);
  const Tensor terms = pack_map(value, needs_terms(feat, exact) ? MapForm::fp32 : MapForm::terms, sizes, stream);

  const int64_t rows = arch::divide_up<int64_t>(sizes.pixels, kForwardBlockM);
  const int64_t tiles = arch::divide_up<int64_t>(sizes.pixels, kForwardBlockN);
  const int64_t blocks = rows * sizes.batch * (sizes.padded_channels / kBlockC);
  const Splits splits = split_columns(tiles, blocks, 2 * int64_t{stream.multiprocessors()});
  const ForwardShared shared = forward_shared(sizes.slabs, stream.shared_limit());
  Tensor parts = out;
  if (splits.count > 1) {
    parts = empty(value, {splits.count, sizes.batch, sizes.channels, sizes.pixels}, ScalarType::Float);
  }
  const ForwardParams params{
      data<unsigned char>(packed), data<unsigned char>(terms), mutable_data<float>(parts), sizes, splits, shared};
  forward(params, type_of(feat), exact, stream);
  if (splits.count > 1) combine_splits(parts, splits.count, out, stream);
  return out;
}

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
  const int most = most_backward_slabs(stream.shared_limit());
  STD_TORCH_CHECK(
      sizes.slabs <= most, "the backward takes at most ", most * slab_channels(static_cast<int>(feat.element_size())),
      " features of this dtype on this device; got ", sizes.dim);
  const MapForm form = needs_terms(feat, exact) ? MapForm::fp32 : MapForm::tf32;
  const Tensor packed = pack_features(feat, sizes, exact, stream);
  const Tensor packed_value = pack_map(value, form, sizes, stream);
  const Tensor packed_grad = pack_map(grad_out, form, sizes, stream);

  const int64_t rows = arch::divide_up<int64_t>(sizes.pixels, kBackwardBlockM);
  const int64_t tiles = arch::divide_up<int64_t>(sizes.pixels, kBackwardBlockN);
  const int64_t channel_blocks = sizes.padded_channels / kBlockC, blocks = rows * sizes.batch * channel_blocks;
  const Splits splits = split_columns(tiles, blocks, 2 * int64_t{stream.multiprocessors()});
  const int64_t feat_parts = splits.count * channel_blocks;
  const bool one_feat_part = feat_parts == 1;
  const bool value_in_place = splits.count == 1 && value.scalar_type() == ScalarType::Float;
  const Tensor sums_feat =
      empty(feat, {one_feat_part ? 0 : feat_parts, sizes.batch, sizes.dim, sizes.pixels}, ScalarType::Float);
  Tensor sums_value = grad_value;
  if (need_value && !value_in_place) {
    sums_value = empty(value, {splits.count, sizes.batch, sizes.channels, sizes.pixels}, ScalarType::Float);
  }
  const BackwardParams params{
      data<unsigned char>(packed),
      data<float>(packed_value),
      data<float>(packed_grad),
      need_value ? mutable_data<float>(sums_value) : nullptr,
      one_feat_part ? nullptr : mutable_data<float>(sums_feat),
      grad_feat.mutable_data_ptr(),
      sizes,
      splits};
  backward(params, type_of(feat), exact, stream);
  if (!one_feat_part) combine_splits(sums_feat, feat_parts, grad_feat, stream);
  if (need_value && !value_in_place) combine_splits(sums_value, splits.count, grad_value, stream);
  return {grad_value, grad_feat};
}

}  // namespace ercn::affinity
