#pragma once
// The instances of a segment as the generic kernels read them: rows of channels, or channels of rows (feature maps).
#include <arch/convert.h>
#include <arch/launch.h>

#include "pool/problem.h"
#include "pool/generic/product.h"

namespace ercn::pool {

template <typename Element>
struct Instances {
  const Element* first;
  int64_t h_n, h_d;
  int rows, D;
  bool vector;

  ERCN_DEVICE Instances(const Problem& p, const Segment& segment)
      : first(static_cast<const Element*>(p.h) + row_offset(p.bags, segment, p.h_b, p.h_n)),
        h_n(p.h_n),
        h_d(p.h_d),
        rows(segment.rows),
        D(p.D),
        vector(p.vector) {}

  // From row `row` and channel `d` on, as rows or as channels.
  ERCN_DEVICE Runs<Element> as_rows(int row, int d, int channels) const {
    const int left = D - d;
    return {first + row * h_n + d * h_d, h_n, h_d, rows - row, left < channels ? left : channels, vector};
  }
  ERCN_DEVICE Runs<Element> as_channels(int row, int d) const {
    return {first + row * h_n + d * h_d, h_d, h_n, D - d, rows - row, vector};
  }
};

// `count` elements, zeros after them.
template <typename Element, int N>
ERCN_DEVICE void read(float (&x)[N], const Element* from, int64_t step, int count, bool vector) {
  static_assert(N * sizeof(Element) == 16);
  if (vector && count >= N) {
    const arch::Vector16 v = arch::load_16(from);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(Element) == 4) {
        x[i] = arch::float_of(v.words[i]);
      } else {
        x[i] = i % 2 ? arch::unpack_high<Element>(v.words[i / 2]) : arch::unpack_low<Element>(v.words[i / 2]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i < count ? arch::to_float(from[i * step]) : 0.0f;
  }
}

// Starts Kernel<Precision, CHANNELS_FIRST> as the problem has it.
template <template <typename, bool> class Kernel, typename Params>
void launch(const Params& p, arch::Grid grid, const arch::Stream& stream) {
  const auto start = [&](auto kernel) {
    using Chosen = decltype(kernel);
    arch::launch<Chosen>(p, grid, sizeof(typename Chosen::Shared), stream);
  };
  with_precision(p.problem.type, p.problem.exact, [&](auto precision) {
    using Precision = decltype(precision);
    p.problem.channels_first ? start(Kernel<Precision, true>()) : start(Kernel<Precision, false>());
  });
}

}  // namespace ercn::pool
