#pragma once
// Sums over neighbours, weighted for each pixel, and the weights of PAMR and PAR, by blocks of two vectors of pixels.
#include "../activations.h"
#include "../simd.h"
#include "refinement.h"

namespace ercn::ERCN_ISA {

constexpr int kPixelVecs = 2;

// exp(y) for y <= 0; where that is less than 2^-126 (subnormal), some number as small. NaN stays.
ERCN_INLINE Vec<float> exp_of_negative(Vec<float> y) {
  const Vec<float> least = Vec<float>{} - 87.f;
  Vec<float> power, q;
  exp_parts(y < least ? least : y, power, q);
  return power * q + power;
}
ERCN_INLINE Vec<double> exp_of_negative(Vec<double> y) {
  for (unsigned i = 0; i < sizeof(y) / sizeof(double); ++i) y[i] = __builtin_exp(y[i]);
  return y;
}

template <typename T>
ERCN_INLINE Vec<T> square_root(Vec<T> x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(T); ++i) {
    x[i] = sizeof(T) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  }
  return x;
}

ERCN_INLINE Vec<float> absolute(Vec<float> x) { return (Vec<float>)((Vec<int32_t>)x & INT32_MAX); }
ERCN_INLINE Vec<double> absolute(Vec<double> x) { return (Vec<double>)((Vec<int64_t>)x & INT64_MAX); }

template <typename T, bool PAR>
void adaptive_weights(const AdaptiveWeights<T>& a) {
  using V = Vec<T>;
  constexpr int lanes = sizeof(V) / sizeof(T), block = kPixelVecs * lanes;
  T* const weights = a.weights;
  const Tap *const taps = a.taps, *const end = taps + a.count;
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* const plane = a.image + c * a.plane;
    const T samples = a.count + a.own;
    V own[kPixelVecs], mean[kPixelVecs] = {}, spread[kPixelVecs] = {}, scale[kPixelVecs];
    ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) own[v] = load<V>(plane + v * lanes);
    for (const Tap* tap = taps; tap < end; ++tap) {  // the mean's distance from the pixel
      ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) mean[v] += load<V>(plane + tap->offset + v * lanes) - own[v];
    }
    ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
      mean[v] /= samples;
      spread[v] = T(a.own) * mean[v] * mean[v];
    }
    for (const Tap* tap = taps; tap < end; ++tap) {
      ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
        const V d = load<V>(plane + tap->offset + v * lanes) - own[v] - mean[v];
        spread[v] += d * d;
      }
    }
    ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
      const V sigma = square_root<T>(spread[v] / (samples - 1));
      const V width = PAR ? T(0.3) * (sigma + T(1e-8)) : T(0.1) * sigma + T(1e-8);
      scale[v] = T(-1) / (T(a.channels) * (PAR ? width * width : width));
    }
    for (const Tap* tap = taps; tap < end; ++tap) {
      T* const to = weights + tap->slot * block;
      ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
        const V d = load<V>(plane + tap->offset + v * lanes) - own[v];
        const V term = (PAR ? d * d : absolute(d)) * scale[v];
        store(to + v * lanes, c ? load<V>(to + v * lanes) + term : term);
      }
    }
  }
  V most[kPixelVecs], total[kPixelVecs] = {};
  ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) most[v] = load<V>(weights + v * lanes);
  for (int64_t t = 1; t < a.count; ++t) {
    ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
      const V k = load<V>(weights + t * block + v * lanes);
      most[v] = k > most[v] ? k : most[v];
    }
  }
  for (int64_t t = 0; t < a.count; ++t) {
    ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
      const V e = exp_of_negative(load<V>(weights + t * block + v * lanes) - most[v]);
      store(weights + t * block + v * lanes, e);
      total[v] += e;
    }
  }
  ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) total[v] = T(1) / total[v];
  for (int64_t t = 0; t < a.count; ++t) {
    ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) {
      const V w = load<V>(weights + t * block + v * lanes) * total[v];
      store(weights + t * block + v * lanes, PAR ? w + a.position[t] : w);
    }
  }
}

// Channels c to c + ROWS of a row. From one block to the next most neighbours stay in the first cache.
template <typename T, int ROWS>
void sums_of_channels(const NeighbourSums<T>& s, int64_t c) {
  using V = Vec<T>;
  constexpr int lanes = sizeof(V) / sizeof(T), block = kPixelVecs * lanes;
  for (int64_t i = 0; i < s.blocks; ++i) {
    const T *const weights = s.weights + i * s.slots * block, *const map = s.map + c * s.map_plane + i * block;
    T* const out = s.out + c * s.out_plane + i * block;
    V sum[ROWS][kPixelVecs] = {};
    if (s.add) {
      ERCN_UNROLL for (int m = 0; m < ROWS; ++m) {
        ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) sum[m][v] = load<V>(out + m * s.out_plane + v * lanes);
      }
    }
    for (const Tap* tap = s.taps; tap < s.taps + s.count; ++tap) {
      V w[kPixelVecs];
      ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) w[v] = load<V>(weights + tap->slot * block + v * lanes);
      ERCN_UNROLL for (int m = 0; m < ROWS; ++m) {
        const T* const from = map + tap->offset + m * s.map_plane;
        ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) sum[m][v] += w[v] * load<V>(from + v * lanes);
      }
    }
    ERCN_UNROLL for (int m = 0; m < ROWS; ++m) {
      ERCN_UNROLL for (int v = 0; v < kPixelVecs; ++v) store(out + m * s.out_plane + v * lanes, sum[m][v]);
    }
  }
}

template <typename T, int ROWS>
void sums_of_rest(const NeighbourSums<T>& s, int64_t c) {
  if constexpr (ROWS > 0) {
    if (s.channels - c == ROWS) sums_of_channels<T, ROWS>(s, c);
    else sums_of_rest<T, ROWS - 1>(s, c);
  }
}

template <typename T>
void neighbour_sums(const NeighbourSums<T>& s) {
  int64_t c = 0;
  for (; c + kRows <= s.channels; c += kRows) sums_of_channels<T, kRows>(s, c);
  sums_of_rest<T, kRows - 1>(s, c);
}

template <typename T>
void adaptive_weights_of_form(const AdaptiveWeights<T>& a) {
  if (a.position) adaptive_weights<T, true>(a);
  else adaptive_weights<T, false>(a);
}

template <typename T>
RefinementKernel<T> refinement_kernel() {
  return {kPixelVecs * sizeof(Vec<T>) / sizeof(T), adaptive_weights_of_form<T>, neighbour_sums<T>};
}

}  // namespace ercn::ERCN_ISA
