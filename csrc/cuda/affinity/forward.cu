#include "affinity/affinity.h"
#include "affinity/forward.h"
#include "affinity/operands.h"

namespace ercn::affinity {
namespace {

template <typename Precision>
void run(
    const Tensor& feat, const Tensor& terms, const Tensor& parts, const Sizes& sizes, Slabs slabs, ForwardShared shared,
    const arch::Stream& stream) {
  const typename Forward<Precision>::Params params{
      data<unsigned char>(feat), data<unsigned char>(terms), mutable_data<float>(parts), sizes.pixels, sizes.padded,
      static_cast<int>(sizes.batch), sizes.chunks, static_cast<int>(sizes.channels),
      static_cast<int>(sizes.padded_channels), slabs.count, slabs.tiles, shared.term_tiles, shared.resident};
  const int64_t blocks = arch::divide_up<int64_t>(sizes.pixels, kForwardRows) * (sizes.padded_channels / kChannels) *
                         sizes.batch * slabs.count;
  arch::launch<Forward<Precision>>(params, {grid_size(blocks)}, shared.bytes, stream);
}

}  // namespace

Tensor forward(const Tensor& value, const Tensor& feat, bool exact) {
  const Sizes sizes(value, feat);
  Tensor out = empty(value, {sizes.batch, sizes.channels, sizes.pixels}, ScalarType::Float);
  if (out.numel() == 0) return out;
  if (sizes.dim == 0) return torch::stable::zero_(out);
  const arch::Stream stream(feat);
  exact = exact && feat.scalar_type() == ScalarType::Float;
  const Tensor packed = pack_features(feat, sizes, exact, stream);
  const Tensor terms = pack_map(value, exact ? MapForm::whole : MapForm::terms, sizes, stream);

  const int64_t rows = arch::divide_up<int64_t>(sizes.pixels, kForwardRows);
  const int64_t tiles = arch::divide_up<int64_t>(sizes.pixels, kForwardColumns);
  const Slabs cut =
      slabs(tiles, rows * sizes.batch * (sizes.padded_channels / kChannels), 2 * int64_t{stream.multiprocessors()});
  const ForwardShared shared = forward_shared(sizes.chunks, stream.shared_limit());
  const Tensor parts =
      cut.count == 1 ? out : empty(value, {cut.count, sizes.batch, sizes.channels, sizes.pixels}, ScalarType::Float);
  switch (feat.scalar_type()) {
    case ScalarType::BFloat16: run<BFloat16>(packed, terms, parts, sizes, cut, shared, stream); break;
    case ScalarType::Half: run<Float16>(packed, terms, parts, sizes, cut, shared, stream); break;
    default:
      exact ? run<Float32>(packed, terms, parts, sizes, cut, shared, stream)
            : run<TensorFloat32>(packed, terms, parts, sizes, cut, shared, stream);
  }
  if (cut.count > 1) sum_slabs(parts, cut.count, out, stream);
  return out;
}

}  // namespace ercn::affinity
