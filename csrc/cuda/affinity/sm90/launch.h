#pragma once
// From operands in device memory to a launch of the kernel that is compiled for their sizes.
#include <arch/launch.h>
#include <arch/tensor_map.h>

#include <type_traits>

#include "affinity/sm90/params.h"
#include "affinity/sm90/tiles.h"
#include "precision.h"

namespace ercn::sm90::affinity {

// feat as [B, N, D] with D contiguous; strides in elements.
struct Features {
  const void* data;
  int64_t stride_b, stride_n, batch, pixels;
  int dim;
};

// Terms or pairs: [B, rows, padded pixels].
struct Rows {
  const void* data;
  int64_t batch;
  int rows;
  int64_t padded_pixels;
};

void forward(const ForwardParams& params, Float type, int dim, int padded_channels, const arch::Stream& stream);
void backward(const BackwardParams& params, Float type, int dim, int padded_channels, const arch::Stream& stream);

template <typename Element>
arch::TensorMap tensor_map(const Features& x, int box_pixels) {
  return arch::make_tensor_map<Element, 3>(
      x.data, {x.dim, x.pixels, x.batch}, {2 * x.stride_n, 2 * x.stride_b}, {kChunk, box_pixels, 1});
}

template <typename Element>
arch::TensorMap tensor_map(const Rows& x, int box_rows) {
  const int64_t row = 2 * x.padded_pixels;
  return arch::make_tensor_map<Element, 3>(
      x.data, {x.padded_pixels, x.rows, x.batch}, {row, x.rows * row}, {kChunk, box_rows, 1});
}

// run(an element, D, P), the sizes as constants.
template <typename Run>
void with_sizes(Float type, int dim, int padded_channels, const Run& run) {
  const auto with_channels = [&](auto element, auto d) {
    if (padded_channels == 8) return run(element, d, std::integral_constant<int, 8>());
    if (padded_channels == 24) return run(element, d, std::integral_constant<int, 24>());
    return run(element, d, std::integral_constant<int, 32>());
  };
  with_half(type, [&](auto element) {
    if (dim == 64) return with_channels(element, std::integral_constant<int, 64>());
    if (dim == 128) return with_channels(element, std::integral_constant<int, 128>());
    if (dim == 192) return with_channels(element, std::integral_constant<int, 192>());
    return with_channels(element, std::integral_constant<int, 256>());
  });
}

}  // namespace ercn::sm90::affinity
