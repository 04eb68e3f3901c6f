#pragma once
// The operands of the affinity kernels as they copy them: features pixel-major, maps channel-major, padded with zeros.
#include "affinity/generic/launch.h"
#include "terms.h"

namespace ercn::affinity {

// feat [B, D, N] of any strides -> [B, padded pixels, chunks of 128 bytes]. ROUND: to TF32.
template <typename Element, bool ROUND>
struct PackFeatures {
  struct Params {
    const Element* feat;
    unsigned char* packed;
    int64_t stride_b, stride_d, stride_n, pixels, padded;
    int dim, chunks;
  };
  static constexpr int kThreads = affinity::kThreads, kMinBlocks = 1;
  static constexpr int kVector = 16 / sizeof(Element), kDepth = kRowBytes / sizeof(Element), kPixels = 64;
  static constexpr int kRow = kRowBytes + 16;  // so that 8 rows written at once meet no bank twice
  static constexpr int kShared = kPixels * kRow;

  // Grid: blocks of kPixels padded pixels · chunks · B.
  ERCN_DEVICE static void run(const Params& p, unsigned char* shared) {
    int64_t block = arch::block_index().x;
    const int chunk = block % p.chunks;
    block /= p.chunks;
    const int64_t n0 = block % (p.padded / kPixels) * kPixels, b = block / (p.padded / kPixels);
    const int d0 = chunk * kDepth;
    const Element* from = p.feat + b * p.stride_b + d0 * p.stride_d + n0 * p.stride_n;
    const int pixels = p.pixels - n0 < kPixels ? static_cast<int>(p.pixels - n0) : kPixels;
    const int depth = p.dim - d0 < kDepth ? p.dim - d0 : kDepth;
    if (p.stride_d < p.stride_n) {  // a pixel's features are nearer to each other than a feature's pixels
      gather(shared, kRow, sizeof(Element), from, p.stride_n, p.stride_d, kPixels, kDepth, pixels, depth);
    } else {
      gather(shared, sizeof(Element), kRow, from, p.stride_d, p.stride_n, kDepth, kPixels, depth, pixels);
    }
    arch::sync_threads();
    for (int i = arch::thread_index(); i < kPixels * kRowBytes / 16; i += kThreads) {
      const int n = i / 8, byte = i % 8 * 16;
      unsigned char* row = p.packed + ((b * p.padded + n0 + n) * p.chunks + chunk) * kRowBytes;
      arch::store_16(row + byte, arch::load_16(shared + n * kRow + byte));
    }
  }

  // rows × columns elements, those of a row `stride` apart in device memory and in runs of 16 bytes where that can be;
  // zeros outside of real_rows × real_columns.
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
          four.words[i] = arch::float_bits(FORM == MapForm::round ? arch::round_tf32(value) : value);
        }
        arch::store_16(to + 4 * half, four);
      }
    }
  }
};

}  // namespace ercn::affinity
