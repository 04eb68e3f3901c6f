// Before the generic affinity kernels: operands packed and padded with zeros, features pixel-major, maps channel-major.
// After them: combined splits.
#include "affinity/generic/launch.h"
#include <arch/terms.h>

namespace ercn::affinity {

// feat [B, D, N] of any strides -> [B, padded pixels, slabs of 128 bytes]. ROUND: to TF32.
template <typename Element, bool ROUND>
struct PackFeatures {
  struct Params {
    const Element* feat;
    unsigned char* packed;
    int64_t stride_b, stride_d, stride_n, pixels, padded;
    int dim, slabs;
  };
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 1;
  static constexpr int kVector = 16 / sizeof(Element), kDepth = kRowBytes / sizeof(Element), kPixels = 64;
  static constexpr int kRow = kRowBytes + 16;  // stores to 8 rows have no bank conflict
  static constexpr int kShared = kPixels * kRow;

  // Grid: blocks of kPixels padded pixels · slabs · B.
  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    int64_t block = arch::block_index().x;
    const int slab = block % p.slabs;
    block /= p.slabs;
    const int64_t n0 = block % (p.padded / kPixels) * kPixels, b = block / (p.padded / kPixels);
    const int d0 = slab * kDepth;
    const Element* from = p.feat + b * p.stride_b + d0 * p.stride_d + n0 * p.stride_n;
    const int pixels = p.pixels - n0 < kPixels ? static_cast<int>(p.pixels - n0) : kPixels;
    const int depth = p.dim - d0 < kDepth ? p.dim - d0 : kDepth;
    if (p.stride_d < p.stride_n) {  // a pixel's features are closer than a feature's pixels
      gather(shared, kRow, sizeof(Element), from, p.stride_n, p.stride_d, kPixels, kDepth, pixels, depth);
    } else {
      gather(shared, sizeof(Element), kRow, from, p.stride_d, p.stride_n, kDepth, kPixels, depth, pixels);
    }
    arch::sync_threads();
    for (int i = arch::thread_index(); i < kPixels * kRowBytes / 16; i += kThreads) {
      const int n = i / 8, byte = i % 8 * 16;
      unsigned char* row = p.packed + ((b * p.padded + n0 + n) * p.slabs + slab) * kRowBytes;
      arch::store_16(row + byte, arch::load_16(shared + n * kRow + byte));
    }
  }

  // Copies real_rows × real_columns elements, `stride` apart in a row, and zeros up to rows × columns; by 16 bytes
  // where they are aligned.
  ERCN_DEVICE static void gather(
      unsigned char* shared, int shared_row, int shared_column, const Element* from, int64_t stride_row, int64_t stride,
      int rows, int columns, int real_rows, int real_columns) {
    const bool aligned = stride == 1 && stride_row % kVector == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    for (int i = arch::thread_index(); i < rows * columns / kVector; i += kThreads) {
      const int row = i / (columns / kVector), column = i % (columns / kVector) * kVector;
      union {
        arch::Vector16 vector;
        Element elements[kVector];
      } run = {};
      if (row < real_rows) {
        const Element* at = from + row * stride_row + column * stride;
        if (aligned && column + kVector <= real_columns) {
          run.vector = arch::load_16(at);
        } else {
          for (int k = 0; k < kVector; ++k) {
            if (column + k < real_columns) run.elements[k] = at[k * stride];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        Element x = run.elements[k];
        if constexpr (ROUND) x = arch::round_tf32(x);
        *reinterpret_cast<Element*>(shared + row * shared_row + (column + k) * shared_column) = x;
      }
    }
  }
};

// Maps [B, C, N] of any strides -> [B, planes, padded channels, padded pixels].
template <MapForm FORM>
struct PackMap {
  struct Params {
    Map map;
    void* packed;
    int64_t pixels, padded;
    int channels, padded_channels;
  };
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 1, kPixels = 8;  // of a thread

  // Grid: runs of kThreads · kPixels padded pixels, padded channels · B.
  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const int64_t runs = arch::divide_up<int64_t>(p.padded, kThreads * kPixels);
    const int64_t n0 = (arch::block_index().x % runs * kThreads + arch::thread_index()) * kPixels;
    const int c = arch::block_index().x / runs % p.padded_channels;
    const int64_t b = arch::block_index().x / runs / p.padded_channels;
    if (n0 >= p.padded) return;
    float x[kPixels];
    for (int i = 0; i < kPixels; ++i) x[i] = c < p.channels && n0 + i < p.pixels ? read(p.map, b, c, n0 + i) : 0.0f;
    if constexpr (FORM == MapForm::terms) {
      const int64_t plane = static_cast<int64_t>(p.padded_channels) * p.padded;
      arch::bf16* to = static_cast<arch::bf16*>(p.packed) + 2 * b * plane + c * p.padded + n0;
      arch::Vector16 high, low;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float left = x[2 * i], right = x[2 * i + 1];
        high.words[i] = arch::pack<arch::bf16>(left, right);
        const float left_rest = rest(left, arch::unpack_low<arch::bf16>(high.words[i]));
        low.words[i] = arch::pack<arch::bf16>(left_rest, rest(right, arch::unpack_high<arch::bf16>(high.words[i])));
      }
      arch::store_16(to, high);
      arch::store_16(to + plane, low);
    } else {
      float* to = static_cast<float*>(p.packed) + (b * p.padded_channels + c) * p.padded + n0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        arch::Vector16 four;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = x[4 * half + i];
          four.words[i] = arch::float_bits(FORM == MapForm::tf32 ? arch::round_tf32(value) : value);
        }
        arch::store_16(to + 4 * half, four);
      }
    }
  }
};

// out[i] = Σ_s parts[s · count + i], in the order of splits.
template <typename Element>
struct CombineSplits {
  struct Params {
    const float* parts;
    Element* out;
    int64_t count;
    int splits;
  };
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 1, kRun = 8, kBlock = kRun * kThreads;

  ERCN_DEVICE static void run(const Params& p, unsigned char*) {
    const int64_t i = (static_cast<int64_t>(arch::block_index().x) * kThreads + arch::thread_index()) * kRun;
    if (i >= p.count) return;
    if (p.count % kRun != 0) {  // splits do not begin at multiples of 16 bytes
      for (int k = 0; k < kRun && i + k < p.count; ++k) {
        float sum = 0;
        for (int s = 0; s < p.splits; ++s) sum += p.parts[s * p.count + i + k];
        p.out[i + k] = arch::from_float<Element>(sum);
      }
      return;
    }
    float sum[kRun] = {};
    for (int s = 0; s < p.splits; ++s) {
#pragma unroll
      for (int half = 0; half < kRun / 4; ++half) {
        const arch::Vector16 four = arch::load_16(p.parts + s * p.count + i + 4 * half);
        for (int k = 0; k < 4; ++k) sum[4 * half + k] += arch::float_of(four.words[k]);
      }
    }
    constexpr int kVector = 16 / sizeof(Element);
#pragma unroll
    for (int first = 0; first < kRun; first += kVector) {
      arch::Vector16 packed;
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(Element) == 4) {
          packed.words[k] = arch::float_bits(sum[first + k]);
        } else {
          packed.words[k] = arch::pack<Element>(sum[first + 2 * k], sum[first + 2 * k + 1]);
        }
      }
      arch::store_16(p.out + i + first, packed);
    }
  }
};

namespace {

template <typename Element, bool ROUND>
void launch_pack(const Map& feat, unsigned char* packed, const Sizes& sizes, const arch::Stream& stream) {
  using Kernel = PackFeatures<Element, ROUND>;
  const typename Kernel::Params params{
      static_cast<const Element*>(feat.data),
      packed,
      feat.stride_b,
      feat.stride_c,
      feat.stride_n,
      sizes.pixels,
      sizes.padded,
      sizes.dim,
      sizes.slabs};
  const int64_t blocks = sizes.padded / Kernel::kPixels * sizes.slabs * sizes.batch;
  arch::launch<Kernel>(params, {grid_size(blocks)}, Kernel::kShared, stream);
}

template <MapForm FORM>
void launch_pack_map(const Map& map, void* packed, const Sizes& sizes, const arch::Stream& stream) {
  using Kernel = PackMap<FORM>;
  const typename Kernel::Params params{map, packed, sizes.pixels, sizes.padded, sizes.channels, sizes.padded_channels};
  const int64_t runs = arch::divide_up<int64_t>(sizes.padded, Kernel::kThreads * Kernel::kPixels);
  arch::launch<Kernel>(params, {grid_size(runs * sizes.padded_channels * sizes.batch)}, 0, stream);
}

}  // namespace

void pack_features(const Map& feat, bool round, unsigned char* packed, const Sizes& sizes, const arch::Stream& stream) {
  if (feat.type == Float::fp32 && round) return launch_pack<float, true>(feat, packed, sizes, stream);
  with_element(feat.type, [&](auto element) { launch_pack<decltype(element), false>(feat, packed, sizes, stream); });
}

void pack_map(const Map& map, MapForm form, void* packed, const Sizes& sizes, const arch::Stream& stream) {
  switch (form) {
    case MapForm::terms: return launch_pack_map<MapForm::terms>(map, packed, sizes, stream);
    case MapForm::fp32: return launch_pack_map<MapForm::fp32>(map, packed, sizes, stream);
    case MapForm::tf32: return launch_pack_map<MapForm::tf32>(map, packed, sizes, stream);
  }
}

void combine_splits(const float* parts, int splits, void* out, Float type, int64_t count, const arch::Stream& stream) {
  with_element(type, [&](auto element) {
    using Element = decltype(element);
    using Kernel = CombineSplits<Element>;
    const int blocks = grid_size(arch::divide_up<int64_t>(count, Kernel::kBlock));
    arch::launch<Kernel>({parts, static_cast<Element*>(out), count, splits}, {blocks}, 0, stream);
  });
}

}  // namespace ercn::affinity
