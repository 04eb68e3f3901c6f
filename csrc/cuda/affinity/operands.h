#pragma once
// Host side of prepare.h and sum.h: packed operands and partial sums as tensors.
#include "affinity/prepare.h"
#include "affinity/sum.h"
#include "library.h"

namespace ercn::affinity {

// Sizes of one call. Features are padded to whole chunks, pixels to kPixelMultiple, channels to whole blocks.
struct Sizes {
  int64_t batch, channels, dim, pixels, padded, padded_channels;
  int chunks;

  Sizes(const Tensor& value, const Tensor& feat);
};

Map map_of(const Tensor& x);
Tensor pack_features(const Tensor& feat, const Sizes& sizes, bool exact, const arch::Stream& stream);
Tensor pack_map(const Tensor& map, MapForm form, const Sizes& sizes, const arch::Stream& stream);

// parts [slabs, …] fp32 added into out, of any floating dtype.
void sum_slabs(const Tensor& parts, int64_t slabs, Tensor& out, const arch::Stream& stream);

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Blocks of a grid of one dimension.
int grid_size(int64_t blocks);

}  // namespace ercn::affinity
