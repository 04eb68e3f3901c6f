#include "affinity/generic/prepare.h"

#include "affinity/generic/sum.h"

namespace ercn::affinity {
namespace {

template <typename Element, bool ROUND>
void launch_pack(const Map& feat, unsigned char* packed, const Sizes& sizes, const arch::Stream& stream) {
  using Kernel = PackFeatures<Element, ROUND>;
  const typename Kernel::Params params{
      static_cast<const Element*>(feat.data), packed, feat.stride_b, feat.stride_c, feat.stride_n, sizes.pixels,
      sizes.padded, sizes.dim, sizes.chunks};
  const int64_t blocks = sizes.padded / Kernel::kPixels * sizes.chunks * sizes.batch;
  arch::launch<Kernel>(params, {grid_size(blocks)}, Kernel::kShared, stream);
}

template <MapForm FORM>
void launch_pack_map(const Map& map, void* packed, const Sizes& sizes, const arch::Stream& stream) {
  using Kernel = PackMap<FORM>;
  const typename Kernel::Params params{
      map, packed, sizes.pixels, sizes.padded, sizes.channels, sizes.padded_channels};
  const int64_t runs = arch::divide_up<int64_t>(sizes.padded, Kernel::kThreads * Kernel::kPixels);
  arch::launch<Kernel>(params, {grid_size(runs * sizes.padded_channels * sizes.batch)}, 0, stream);
}

}  // namespace

void pack_features(const Map& feat, bool round, unsigned char* packed, const Sizes& sizes, const arch::Stream& stream) {
  if (feat.type == Float::fp32 && round) return launch_pack<float, true>(feat, packed, sizes, stream);
  with_element(feat.type, [&](auto element) { launch_pack<decltype(element), false>(feat, packed, sizes, stream); });
}

void pack_map(const Map& map, MapForm form, void* packed, const Sizes& sizes, const arch::Stream& stream) {
  switch (form) {
    case MapForm::terms: return launch_pack_map<MapForm::terms>(map, packed, sizes, stream);
    case MapForm::whole: return launch_pack_map<MapForm::whole>(map, packed, sizes, stream);
    case MapForm::round: return launch_pack_map<MapForm::round>(map, packed, sizes, stream);
  }
}

void sum_slabs(
    const float* parts, int slabs, void* out, Float type, int64_t count, const arch::Stream& stream) {
  with_element(type, [&](auto element) {
    using Element = decltype(element);
    using Kernel = SumSlabs<Element>;
    const int blocks = grid_size(arch::divide_up<int64_t>(count, Kernel::kBlock));
    arch::launch<Kernel>({parts, static_cast<Element*>(out), count, slabs}, {blocks}, 0, stream);
  });
}

}  // namespace ercn::affinity
