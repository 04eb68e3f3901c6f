#pragma once
// Value and gradient maps packed for the Hopper affinity kernels: rows of 16-bit terms, padded with zeros.
//
// A map x with fp16 terms is scaled by 2^-e to fit fp16's exponent: 2^e is the first power above every finite |x| of a
// channel (2^127 at most).
#include <arch/base.h>
#include <arch/convert.h>

#include "affinity/map.h"
#include <arch/terms.h>

namespace ercn::sm90::affinity {

// 2^e for -126 <= e <= 127
ERCN_DEVICE float power_of_two(int e) { return arch::float_of(static_cast<uint32_t>(e + 127) << 23); }

// x · 2^e for |e| <= 252
ERCN_DEVICE float scaled(float x, int e) { return x * power_of_two(e / 2) * power_of_two(e - e / 2); }

constexpr int kLeastExponent = -125;  // of a channel of zeros

// exponents [maps, B, C]: e of every channel.
struct Exponents {
  struct Params {
    Map maps[2];
    int channels, batch;
    int64_t pixels;
    int* exponents;
  };
  static constexpr int kThreads = 256, kMinBlocks = 1;
  static constexpr int kShared = kThreads / 32 * sizeof(uint32_t);

  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    const int c = arch::block_index().x, b = arch::block_index().y, map = arch::block_index().z;
    uint32_t largest = 0;  // the bits of |x| compare as |x| does
    for (int64_t n = arch::thread_index(); n < p.pixels; n += kThreads) {
      const uint32_t bits = arch::float_bits(read(p.maps[map], b, c, n)) & 0x7fffffff;
      if (bits < 0x7f800000 && bits > largest) largest = bits;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const uint32_t other = arch::shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    uint32_t* per_warp = reinterpret_cast<uint32_t*>(shared);
    if (arch::lane_index() == 0) per_warp[arch::warp_index()] = largest;
    arch::sync_threads();
    if (arch::thread_index() != 0) return;
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = per_warp[warp] > largest ? per_warp[warp] : largest;
    p.exponents[(static_cast<int64_t>(map) * p.batch + b) * p.channels + c] =
        largest == 0           ? kLeastExponent
        : largest >> 23 == 254 ? 127
                               : static_cast<int>(largest >> 23) - 126;
  }
};

// Exponent of W of image b: the largest of any channel's product of value and gradient. exponents [2, B, C].
ERCN_DEVICE int pair_exponent(const int* exponents, int batch, int channels, int b) {
  const int* value_exponents = exponents + static_cast<int64_t>(b) * channels;
  const int* grad_exponents = value_exponents + static_cast<int64_t>(batch) * channels;
  int most = 2 * kLeastExponent;
  for (int c = 0; c < channels; ++c) {
    most = value_exponents[c] + grad_exponents[c] > most ? value_exponents[c] + grad_exponents[c] : most;
  }
  return most;
}

// Rows [row, row + P) of terms [B, rows, padded pixels] = the high terms of P channels of a map from `channel` on, and
// rows [row + P, row + 2 P) = the low ones where `low`. Zeros beyond the map's channels and pixels.
//   scale: none        x
//          channel     x · 2^-e
//          pair        x · 2^(e' - u), e' of the other map, u the exponent of W: for the gradient beside value · 2^-e
struct WriteTerms {
  enum class Scale { none, channel, pair };
  struct Job {
    Map map;
    void* terms;
    bool fp16, low;
    int rows, row;
    Scale scale;
    int map_index;  // in exponents [2, B, C]
  };
  struct Params {
    Job jobs[3];
    const int* exponents;
    int batch;
    int end, channel, padded_channels;  // channels [channel, end) of:
    int channels;
    int64_t pixels, padded_pixels;
  };
  static constexpr int kThreads = 128, kMinBlocks = 1, kPixelsOfThread = 8, kPixelsOfBlock = 8 * kThreads;

  // Grid: blocks of pixels, channels, jobs · B.
  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const int c = arch::block_index().y, b = arch::block_index().z % p.batch;
    const Job& job = p.jobs[arch::block_index().z / p.batch];
    const int64_t thread = static_cast<int64_t>(arch::block_index().x) * kThreads + arch::thread_index();
    const int64_t n0 = thread * kPixelsOfThread;
    if (n0 >= p.padded_pixels) return;
    if (job.fp16) {
      write<arch::fp16>(p, job, b, c, n0);
    } else {
      write<arch::bf16>(p, job, b, c, n0);
    }
  }

  template <typename Element>
  ERCN_DEVICE static void write(const Params& p, const Job& job, int b, int c, int64_t n0) {
    const int channel = p.channel + c;
    const bool real = channel < p.end;
    int exponent = 0;
    if (real && job.scale != Scale::none) {
      const int* own = p.exponents + (static_cast<int64_t>(job.map_index) * p.batch + b) * p.channels;
      exponent = -own[channel];
      if (job.scale == Scale::pair) {
        const int* other = p.exponents + (static_cast<int64_t>(1 - job.map_index) * p.batch + b) * p.channels;
        exponent = other[channel] - pair_exponent(p.exponents, p.batch, p.channels, b);
        exponent = exponent < -252 ? -252 : exponent;
      }
    }
    float high[kPixelsOfThread], low[kPixelsOfThread];
#pragma unroll
    for (int i = 0; i < kPixelsOfThread; ++i) {
      float x = real && n0 + i < p.pixels ? read(job.map, b, channel, n0 + i) : 0.f;
      x = scaled(x, exponent);
      high[i] = arch::to_float(arch::from_float<Element>(x));
      low[i] = rest(x, high[i]);
    }
    const int64_t row = static_cast<int64_t>(b) * job.rows + job.row + c;
    Element* to = static_cast<Element*>(job.terms) + row * p.padded_pixels + n0;
    store<Element>(to, high);
    if (job.low) store<Element>(to + p.padded_channels * p.padded_pixels, low);
  }

  template <typename Element>
  ERCN_DEVICE static void store(Element* to, const float (&x)[kPixelsOfThread]) {
    arch::Vector16 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.words[i] = arch::pack<Element>(x[2 * i], x[2 * i + 1]);
    arch::store_16(to, packed);
  }
};

}  // namespace ercn::sm90::affinity
