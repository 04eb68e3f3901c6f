#pragma once
// What the refinement kernels (sums over fixed neighbours) of all instruction sets share.
#include <cstdint>

namespace ercn {

// A neighbour: its number among a pixel's weights, and its distance from the pixel in memory.
struct Tap {
  int64_t slot, offset;
};

// One row: out[c][x] = Σ_taps weights[slot][x] · map[c][x + offset], added to out if `add`. Planes c lie map_plane and
// out_plane apart; x runs over whole blocks of pixels.
template <typename T>
struct NeighbourSums {
  const T* weights;  // [blocks, slots, block]
  int64_t blocks, slots;
  const Tap* taps;
  int64_t count;
  const T* map;
  int64_t map_plane;
  T* out;
  int64_t out_plane, channels;
  bool add;
};

// One block of a row: weights[slot][x] = softmax_slot(-Σ_c |d| s_c(x)) with d = image[c][x + offset] - image[c][x].
//   form pamr: s_c = 1 / (K (1e-8 + 0.1 σ_c))
//   form par: d² for |d|, s_c = 1 / (K (0.3 (σ_c + 1e-8))²), and position[slot] is added to the softmax
// σ_c²: the unbiased variance of the neighbours and of the pixel, which counts `own` times.
template <typename T>
struct AdaptiveWeights {
  const T* image;
  int64_t plane, channels;
  const Tap* taps;
  int64_t count, own;
  const T* position;  // [count]: form par; null: form pamr
  T* weights;         // [count, block]
};

template <typename T>
struct RefinementKernel {
  int64_t block;  // pixels
  void (*weights)(const AdaptiveWeights<T>& weights);
  void (*sums)(const NeighbourSums<T>& sums);
};

}  // namespace ercn
