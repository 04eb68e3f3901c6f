#pragma once
// The instances of a segment as the generic kernels read them: rows of channels, or channels of rows (feature maps).
#include <arch/convert.h>

#include "pool/generic/mainloop.h"
#include "pool/problem.h"

namespace ercn::pool {

template <typename Element>
struct SegmentView {
  const Element* first;
  int64_t stride_n, stride_d;
  int rows, D;
  bool vector;

  ERCN_DEVICE SegmentView(const Problem& p, const Segment& segment)
      : first(static_cast<const Element*>(p.h.data) + row_offset(p.bags, segment, p.h.stride_b, p.h.stride_n)),
        stride_n(p.h.stride_n),
        stride_d(p.h.stride_d),
        rows(segment.rows),
        D(p.D),
        vector(p.h.vector) {}

  // From row `row` and channel `d` on, as rows or as channels.
  ERCN_DEVICE Runs<Element> as_rows(int row, int d, int channels) const {
    const int count = D - d < channels ? D - d : channels;
    return {first + row * stride_n + d * stride_d, stride_n, stride_d, rows - row, count, vector};
  }
  ERCN_DEVICE Runs<Element> as_channels(int row, int d) const {
    return {first + row * stride_n + d * stride_d, stride_d, stride_n, D - d, rows - row, vector};
  }
};

// By a block: which rows are real, a bit each, for all after a barrier.
ERCN_DEVICE void store_real_rows(const Mask& mask, const Segment& segment, uint32_t (&real)[kSegmentRows / 32]) {
  if (arch::uniform_warp_index() >= kSegmentRows / 32) return;
  const uint32_t bits = arch::ballot(is_real(mask, segment, arch::thread_index()));
  if (arch::lane_index() == 0) real[arch::warp_index()] = bits;
}

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

}  // namespace ercn::pool
