#pragma once
// Tensors as operands of the launchers in launch.h.
#include "affinity/generic/launch.h"
#include "library.h"

namespace ercn::affinity {

Map map_of(const Tensor& x);
Tensor pack_features(const Tensor& feat, const Sizes& sizes, bool exact, const arch::Stream& stream);
Tensor pack_map(const Tensor& map, MapForm form, const Sizes& sizes, const arch::Stream& stream);

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace ercn::affinity
