#pragma once
// P = [V|U] h of one segment, kColumns columns at a time, and both branches of a unit from it.
#include <cmath>

#include "pool/activations.h"
#include "pool/generic/kernels.h"
#include "pool/generic/mainloop.h"
#include "pool/generic/segment_view.h"

namespace ercn::pool {

template <typename Precision, bool CHANNELS_FIRST>
using Projection = GemmMainloop<Precision, CHANNELS_FIRST ? Along::kOther : Along::kK, Along::kK>;

template <typename Element, bool CHANNELS_FIRST>
struct ProjectionSource {
  static constexpr bool kMasked = false;
  static constexpr int kDepth = 64 / sizeof(Element);
  SegmentView<Element> h;
  const Element* projections;  // of these columns
  int depth;

  ERCN_DEVICE Runs<Element> a(int step) const {
    return CHANNELS_FIRST ? h.as_channels(0, step * kDepth) : h.as_rows(0, step * kDepth, kDepth);
  }
  ERCN_DEVICE Runs<Element> b(int step) const {
    return {projections + step * kDepth, depth, 1, kColumns, kDepth, true};
  }
};

// sums = P in kColumns columns from `group` · kColumns on.
template <typename Precision, bool CHANNELS_FIRST>
ERCN_DEVICE void project(
    Sums& sums, const SegmentView<typename Precision::Element>& h, const Packed& weights, int group,
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
  const int warp = arch::warp_index() % 2, neighbour = arch::lane_index() % 4 * 2 + i % 2;
  return GATED ? group * 64 + n * 16 + warp * 8 + neighbour : group * 128 + warp * 64 + n * 8 + neighbour;
}

// Without a gate, v of a dropped unit becomes this NaN, which no arithmetic makes.
constexpr uint32_t kDropped = 0xffd20b0d;

// Dropout of a group's units for the instances from `first` on. A dropped unit gets a gate of σ(-Inf) = 0, or the mark
// above. A draw has the words of four tiles, of every second one if not gated. The loop over draws is not unrolled: its
// registers would cost a block of the multiprocessor.
template <bool GATED>
ERCN_DEVICE void drop(const Dropout& dropout, int64_t first, int group, Sums& sums) {
  constexpr int kStep = GATED ? 1 : 2;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
#pragma unroll
  for (int m = 0; m < Sums::kRowTiles; ++m) {
    uint32_t dropped = 0;
#pragma unroll 1
    for (int draw = 0; draw < 4 * kStep; ++draw) {
      const uint64_t instance = static_cast<uint64_t>(first + Sums::row(m, draw % 4));
      const Words words = random_words(seed, instance, counter_of(unit_at<GATED>(group, draw / 4, draw)));
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        dropped = dropped << 1 | (is_dropped<GATED>(words.at[word], dropout.limit) ? 1 : 0);
      }
    }
#pragma unroll
    for (int draw = 0; draw < 4 * kStep; ++draw) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float& sum = sums.at[m][draw / 4 + kStep * word + (GATED ? 4 : 0)][draw % 4];
        if (dropped >> (16 * kStep - 1 - 4 * draw - word) & 1) sum = GATED ? -INFINITY : arch::float_of(kDropped);
      }
    }
  }
}

// act(v) · σ(u) (σ = 1 if not gated) of tile (m, n), register i; 0 for units that do not exist, which an infinite h
// makes NaN, and for those that are dropped.
template <bool GATED, Activation A>
ERCN_DEVICE float gated_at(
    const Sums& sums, const float* biases, const Columns& columns, int group, int m, int n, int i) {
  if (unit_at<GATED>(group, n, i) >= columns.L) return 0;
  const float* bias = biases + group * kColumns;
  const float v = sums.at[m][n][i];
  if (!GATED && arch::float_bits(v) == kDropped) return 0;
  const float u = GATED ? sums.at[m][n + 4][i] + bias[Sums::column(n + 4, i)] : 0;
  const Branches on = branches<A, true>(v + bias[Sums::column(n, i)], u);
  return value_of<A>(on.kept) * (GATED ? on.gate : 1);
}

}  // namespace ercn::pool
