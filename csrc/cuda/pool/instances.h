#pragma once
// The instances of a segment as the generic kernels read them: rows of channels, or channels of rows (feature maps).
#include <arch/convert.h>

#include "pool/problem.h"
#include "pool/product.h"

namespace ercn::pool {

// How h lies in memory, known on the host. Channels-first is for maps whose rows can be read 16 bytes at a time; any
// other strides are read as rows, an element at a time where not `vector`.
struct Layout {
  bool channels_first, vector;
};

inline Layout layout_of(const Problem& p, int64_t element_bytes) {
  const auto is_aligned = [&](int64_t stride) { return stride * element_bytes % 16 == 0; };
  const bool ragged = p.bags.cu_seqlens != nullptr;
  const bool bags = ragged || p.bags.count == 1 || is_aligned(p.h_b);
  const bool start = reinterpret_cast<uintptr_t>(p.h) % 16 == 0;
  const int64_t rows = ragged ? p.bags.rows : p.bags.n;
  if (p.h_d != 1 && p.h_n == 1 && !ragged && bags && start && is_aligned(p.h_d)) return {true, true};
  return {false, (p.h_d == 1 || p.D == 1) && bags && start && (rows <= 1 || is_aligned(p.h_n))};
}

template <typename Element>
struct Instances {
  const Element* first;
  int64_t h_n, h_d;
  int rows, D;
  bool vector;

  ERCN_DEVICE Instances(const Problem& p, const Segment& segment, bool vector)
      : first(static_cast<const Element*>(p.h) + row_offset(p.bags, segment, p.h_b, p.h_n)),
        h_n(p.h_n),
        h_d(p.h_d),
        rows(segment.rows),
        D(p.D),
        vector(vector) {}

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

}  // namespace ercn::pool
