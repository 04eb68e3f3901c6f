#pragma once
// What the affinity kernels of all instruction sets share: the packed operands of one image, and their entry points.
#include <cstdint>

namespace ercn {

constexpr int64_t kBlock = 96;  // pixels of a block, a multiple of every tile: a T block of fp32 is 36 KiB

// Channels of V and G are padded to it: a multiple of the tile's rows, and 64 bits of each fill the widest vector.
constexpr int64_t kChannelMultiple = 8;

template <typename T>
constexpr int64_t kUnit = 8 / sizeof(T);  // pixels of one broadcast of 64 bits

[[gnu::always_inline]] constexpr int64_t round_up(int64_t n, int64_t by) { return (n + by - 1) / by * by; }

// One image, its n pixels padded with zeros to whole blocks. A panel has some pixels side by side, [n / panel, rows,
// panel]; a strip has some channels side by side, [n / kBlock, D / strip, kBlock, strip]. The instruction set fixes the
// sizes of F's. A pair of blocks adds A · V to the sums of one block as columns of A, and of the other as rows.
//   forward:  column_sums + row_sums = A · V            A = relu(T), T = FᵀF
//   backward: column_sums + row_sums = A · G, if asked for;  out_feat = W · F, W = 1[T > 0] ⊙ (VᵀG + GᵀV)
// F holds E (float, double, or bfloat16 as uint16_t, two channels of a pixel side by side), all else holds T.
template <typename E, typename T>
struct AffinityImage {
  const E* feat;         // panels
  const T* summed;       // V, in the backward G, in panels of a block
  const T* units;        // `summed` in panels of kUnit
  T* column_sums;        // in panels of a block; null where no sums are asked for
  T* row_sums;           // [n, channels, kUnit]: sums over even and over odd pixels where kUnit is 2
  const T* value;        // backward: V in panels of a block
  const T* feat_strips;  // backward
  T* out_feat;           // backward: in strips, else null
  int64_t C, channels, D, N;
};

constexpr int64_t kPairScratch = 2 * kBlock * kBlock;

template <typename E, typename T>
struct AffinityKernel {
  int64_t panel, strip;
  // Adds everything that the blocks i <= j give to each other. scratch holds kPairScratch elements.
  void (*pair)(const AffinityImage<E, T>& image, int64_t i, int64_t j, T* scratch);
};

}  // namespace ercn
