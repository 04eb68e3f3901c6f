#pragma once
// Operands of the Hopper affinity kernels, and launches of the kernels compiled for their sizes.
#include <arch/launch.h>
#include <arch/tensor_map.h>

#include <type_traits>

#include "affinity/sm90/tile_scheduler.h"
#include "affinity/sm90/tiles.h"

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

struct ForwardParams {
  arch::TensorMap feat, terms;  // [B, N, D] in boxes of [128, 64]; [B, 2 P, padded pixels] in boxes of [2 P, 64]
  TileScheduler scheduler;
  float* direct;    // [slots, P, rows of a row block]
  float* mirrored;  // [row blocks, B, channels, width], pixels beyond the first row block; null where A is dense
  int64_t width;
  int channels;
};

struct BackwardParams {
  // [B, N, D] in boxes of [128, 64] and of [columns, 64]; terms of the gradient [B, 2 P, padded pixels] in boxes of
  // [2 P, 64]; pairs [B, 2 P, padded pixels], V' then G', in boxes of [P, 64]
  arch::TensorMap feat_rows, feat_columns, terms, pairs;
  TileScheduler scheduler;
  float* feat_sums;   // [slots, rows, D]
  float* value_sums;  // [slots, P, rows], or null where value needs no gradient
};

void forward(const ForwardParams& params, Float type, int dim, int padded_channels, const arch::Stream& stream);
void backward(const BackwardParams& params, Float type, int dim, int padded_channels, const arch::Stream& stream);

template <typename Element>
arch::TensorMap tensor_map(const Features& x, int box_pixels) {
  return arch::make_tensor_map<Element, 3>(
      x.data, {x.dim, x.pixels, x.batch}, {2 * x.stride_n, 2 * x.stride_b}, {kSlab, box_pixels, 1});
}

template <typename Element>
arch::TensorMap tensor_map(const Rows& x, int box_rows) {
  const int64_t row = 2 * x.padded_pixels;
  return arch::make_tensor_map<Element, 3>(
      x.data, {x.padded_pixels, x.rows, x.batch}, {row, x.rows * row}, {kSlab, box_rows, 1});
}

// run(an element, D, P) with the sizes as constants.
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
