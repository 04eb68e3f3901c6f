#include "affinity/operands.h"

namespace ercn::affinity {
namespace {

template <typename Element, bool ROUND>
void launch_pack(const Tensor& feat, const Tensor& packed, const Sizes& sizes, const arch::Stream& stream) {
  using Kernel = PackFeatures<Element, ROUND>;
  const typename Kernel::Params params{
      data<Element>(feat), mutable_data<unsigned char>(packed), feat.stride(0), feat.stride(1), feat.stride(2),
      sizes.pixels, sizes.padded, static_cast<int>(sizes.dim), sizes.chunks};
  const int64_t blocks = sizes.padded / Kernel::kPixels * sizes.chunks * sizes.batch;
  arch::launch<Kernel>(params, {grid_size(blocks)}, Kernel::kShared, stream);
}

template <MapForm FORM>
void launch_pack_map(const Tensor& map, const Tensor& packed, const Sizes& sizes, const arch::Stream& stream) {
  using Kernel = PackMap<FORM>;
  const typename Kernel::Params params{
      map_of(map), packed.mutable_data_ptr(), sizes.pixels, sizes.padded, static_cast<int>(sizes.channels),
      static_cast<int>(sizes.padded_channels)};
  const int64_t runs = arch::divide_up<int64_t>(sizes.padded, Kernel::kThreads * Kernel::kPixels);
  arch::launch<Kernel>(params, {grid_size(runs * sizes.padded_channels * sizes.batch)}, 0, stream);
}

template <typename Element>
void launch_sum(const Tensor& parts, int64_t slabs, const Tensor& out, const arch::Stream& stream) {
  using Kernel = SumSlabs<Element>;
  const int64_t count = out.numel();
  const int blocks = grid_size(arch::divide_up<int64_t>(count, Kernel::kBlock));
  arch::launch<Kernel>(
      {data<float>(parts), mutable_data<Element>(out), count, static_cast<int>(slabs)}, {blocks}, 0, stream);
}

}  // namespace

Map map_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const Float kind = type == ScalarType::Float ? Float::fp32 : type == ScalarType::BFloat16 ? Float::bf16 : Float::fp16;
  return {x.const_data_ptr(), kind, x.stride(0), x.stride(1), x.stride(2)};
}

Sizes::Sizes(const Tensor& value, const Tensor& feat)
    : batch(feat.size(0)),
      channels(value.size(1)),
      dim(feat.size(1)),
      pixels(feat.size(2)),
      padded(arch::round_up<int64_t>(pixels, kPixelMultiple)),
      padded_channels(arch::round_up<int64_t>(channels, kChannels)),
      chunks(chunks_of(dim, static_cast<int>(feat.element_size()))) {}

Tensor pack_features(const Tensor& feat, const Sizes& sizes, bool exact, const arch::Stream& stream) {
  const Tensor packed = empty(feat, {sizes.batch, sizes.padded, sizes.chunks, kRowBytes}, ScalarType::Byte);
  switch (feat.scalar_type()) {
    case ScalarType::BFloat16: launch_pack<arch::bf16, false>(feat, packed, sizes, stream); break;
    case ScalarType::Half: launch_pack<arch::fp16, false>(feat, packed, sizes, stream); break;
    default:
      exact ? launch_pack<float, false>(feat, packed, sizes, stream)
            : launch_pack<float, true>(feat, packed, sizes, stream);
  }
  return packed;
}

Tensor pack_map(const Tensor& map, MapForm form, const Sizes& sizes, const arch::Stream& stream) {
  const bool terms = form == MapForm::terms;
  const Tensor packed = empty(
      map, {sizes.batch, terms ? 2 : 1, sizes.padded_channels, sizes.padded},
      terms ? ScalarType::BFloat16 : ScalarType::Float);
  switch (form) {
    case MapForm::terms: launch_pack_map<MapForm::terms>(map, packed, sizes, stream); break;
    case MapForm::whole: launch_pack_map<MapForm::whole>(map, packed, sizes, stream); break;
    case MapForm::round: launch_pack_map<MapForm::round>(map, packed, sizes, stream); break;
  }
  return packed;
}

void sum_slabs(const Tensor& parts, int64_t slabs, Tensor& out, const arch::Stream& stream) {
  switch (out.scalar_type()) {
    case ScalarType::BFloat16: return launch_sum<arch::bf16>(parts, slabs, out, stream);
    case ScalarType::Half: return launch_sum<arch::fp16>(parts, slabs, out, stream);
    default: return launch_sum<float>(parts, slabs, out, stream);
  }
}

int grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "a grid of ", blocks, " blocks; a GPU takes 2^31 - 1");
  return static_cast<int>(blocks);
}

}  // namespace ercn::affinity
