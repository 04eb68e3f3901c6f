#pragma once
// P = [V|U] h of one segment, 128 columns at a time, and both branches of a unit from it.
#include "pool/instances.h"
#include "pool/kernels.h"
#include "pool/softmax.h"

namespace ercn::pool {

template <typename Precision, bool CHANNELS_FIRST>
using Projection = Product<Precision, CHANNELS_FIRST ? Along::kOther : Along::kK, Along::kK>;

template <typename Element, bool CHANNELS_FIRST>
struct ProjectionSource {
  static constexpr bool kMasked = false;
  static constexpr int kDepth = 64 / sizeof(Element);
  Instances<Element> h;
  const Element* projections;  // of these columns
  int depth;

  ERCN_DEVICE Runs<Element> a(int step) const {
    return CHANNELS_FIRST ? h.as_channels(0, step * kDepth) : h.as_rows(0, step * kDepth, kDepth);
  }
  ERCN_DEVICE Runs<Element> b(int step) const {
    return {projections + step * kDepth, depth, 1, kColumns, kDepth, true};
  }
};

// sums of columns `group` · kColumns ….
template <typename Precision, bool CHANNELS_FIRST>
ERCN_DEVICE void project(
    Sums& sums, const Instances<typename Precision::Element>& h, const Packed& weights, int group,
    unsigned char* stages) {
  using Element = typename Precision::Element;
  const Element* projections = static_cast<const Element*>(weights.projections);
  const ProjectionSource<Element, CHANNELS_FIRST> source{
      h, projections + int64_t{group} * kColumns * weights.depth, weights.depth};
  Projection<Precision, CHANNELS_FIRST>::run(sums, weights.depth / source.kDepth, source, stages);
}

// This thread's units within a group: tile n of TILES, GATED ? 4 : 8, and register i.
template <bool GATED>
ERCN_DEVICE int unit_at(int group, int n, int i) {
  constexpr int kUnits = GATED ? 32 : 64;  // of a warp
  return group * 2 * kUnits + arch::warp_index() % 2 * kUnits + n * 8 + arch::lane_index() % 4 * 2 + i % 2;
}

// activate, but with tanh to a few ulp of itself: 1 - e^(-2 |v|) cancels where v is small.
ERCN_DEVICE Activations activate_small(float v, float u) {
  Activations on = activate(v, u);
  if (fabsf(v) < 0.25f) {
    const float square = v * v;
    const float series = -1 / 3.0f + square * (2 / 15.0f + square * (-17 / 315.0f + square * (62 / 2835.0f)));
    on.t = v + v * square * series;
  }
  return on;
}

// tanh and σ (1 if not gated) of tile (m, n), register i; 0 and 1 for units that do not exist, which an infinite h
// makes NaN.
template <bool GATED>
ERCN_DEVICE Activations activations_at(
    const Sums& sums, const float* biases, const Columns& columns, int group, int m, int n, int i) {
  if (unit_at<GATED>(group, n, i) >= columns.L) return {0, 1};
  const float* bias = biases + group * kColumns;
  const float v = sums.at[m][n][i] + bias[Sums::column(n, i)];
  if constexpr (GATED) {
    return activate_small(v, sums.at[m][n + 4][i] + bias[Sums::column(n + 4, i)]);
  } else {
    return {activate_small(v, 0).t, 1};
  }
}

}  // namespace ercn::pool
