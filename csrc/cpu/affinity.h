#pragma once
// What the affinity kernels of all instruction sets share: the packed operands of one image, and their entry points.
#include <cstdint>

namespace ercn {

constexpr int64_t kBlock = 96;  // pixels of a block, a multiple of every tile: a T block of fp32 is 36 KiB

constexpr int64_t kRowSlack = 8;  // rows of C channels are rounded up to it: the narrowest vectors' lanes

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One image, n its pixels padded with zeros to whole blocks. Per instruction set a panel is some pixels side by side,
// [n / panel, rows, panel], and a strip some channels of the pixels of a block, [n / kBlock, D / strip, kBlock, strip].
//   forward:  out_rows += A · value_rows               A = relu(T), T = FᵀF
//   backward: out_rows += A · (G of value_rows), if asked for;  out_feat += W · feat_strips, W = 1[T > 0] ⊙ (VᵀG + GᵀV)
// Elements of F are E (float, double, or bfloat16 as uint16_t, two channels of a pixel side by side), all else is T.
template <typename E, typename T>
struct AffinityImage {
  const E* feat_panels;  // [n / panel, D, panel]
  const T* value_rows;   // [n, value_row]: per pixel V, in backward followed at once by G
  const T* pair_panels;  // backward: [n / panel, 2C, panel], G above V
  const T* feat_strips;  // backward: F, D padded
  T* out_rows;           // [n, out_row], or null
  T* out_feat;           // backward: in strips, else null
  int64_t C, D, N, value_row, out_row;
};

template <typename E, typename T>
struct AffinityKernel {
  int64_t panel, strip;
  // Adds everything that the blocks i <= j give to each other. scratch holds 2 · kBlock² elements.
  void (*pair)(const AffinityImage<E, T>& image, int64_t i, int64_t j, T* scratch);
};

}  // namespace ercn
