#pragma once
// The GEMM mainloop of a block of four warps: [64, 128] += A [64, K] · B [K, 128], by mma with fp32 sums. Operands come
// from device memory in three stages; either may be contiguous along K or along its other side.
#include <arch/async.h>
#include <arch/elements.h>
#include <arch/mma.h>
#include <arch/terms.h>

#include <type_traits>

namespace ercn::pool {

enum class Along { kK, kOther };

// Runs of elements in device memory.
template <typename Element>
struct Runs {
  const Element* first;     // element 0 of run 0
  int64_t run_step, step;   // from run to run, and within a run
  int64_t runs, elements;   // that exist; beyond them is zero
  bool vector;              // runs begin at multiples of 16 bytes, and step is 1
};

// One operand in a stage: SIDE rows (A) or columns (B) and kDepth of K.
template <typename Element, int SIDE, Along ALONG>
struct Tile {
  static constexpr int kDepth = 64 / sizeof(Element), kVector = 16 / sizeof(Element);
  static constexpr int kRuns = ALONG == Along::kK ? SIDE : kDepth, kElements = ALONG == Along::kK ? kDepth : SIDE;
  // Padded so that neither ldmatrix nor the 4-byte reads of fp32 have bank conflicts.
  static constexpr int kPitch =
      kElements * sizeof(Element) + (ALONG == Along::kOther && sizeof(Element) == 4 ? 32 : 16);
  static constexpr int kBytes = kRuns * kPitch;

  ERCN_DEVICE static void fill(unsigned char* tile, const Runs<Element>& from, int threads) {
    constexpr int kVectors = kElements / kVector;
    for (int i = arch::thread_index(); i < kRuns * kVectors; i += threads) {
      const int run = i / kVectors, element = i % kVectors * kVector;
      unsigned char* to = tile + run * kPitch + element * sizeof(Element);
      const int64_t left = run < from.runs ? from.elements - element : 0;
      const int count = left < 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
      const Element* source = from.first + run * from.run_step + element * from.step;
      if (from.vector) {
        arch::cp_async(to, count > 0 ? source : from.first, count * static_cast<int>(sizeof(Element)));
      } else {
        Element values[kVector] = {};
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (j < count) values[j] = source[j * from.step];
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) reinterpret_cast<Element*>(to)[j] = values[j];
      }
    }
  }

  ERCN_DEVICE static float at(const unsigned char* tile, int run, int element) {
    return *reinterpret_cast<const float*>(tile + run * kPitch + element * sizeof(float));
  }

  // Fragment of 16 rows of A from `row` on, 32 bytes of K at `step`.
  ERCN_DEVICE static void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int step) {
    const int lane = arch::lane_index();
    if constexpr (ALONG == Along::kK) {
      arch::ldmatrix(a, tile + (row + lane % 16) * kPitch + step * 32 + lane / 16 * 16);
    } else if constexpr (sizeof(Element) == 2) {
      const int k = step * 16 + lane / 16 * 8 + lane % 8;
      arch::ldmatrix_transposed(a, tile + k * kPitch + (row + lane / 8 % 2 * 8) * 2);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = arch::float_bits(at(tile, step * 8 + lane % 4 + i / 2 * 4, row + lane / 4 + i % 2 * 8));
      }
    }
  }

  // Fragments of 16 columns of B from `column` on: two of 8.
  ERCN_DEVICE static void load_b(uint32_t (&b)[2][2], const unsigned char* tile, int column, int step) {
    const int lane = arch::lane_index();
    if constexpr (sizeof(Element) == 4 && ALONG == Along::kOther) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i / 2][i % 2] = arch::float_bits(at(tile, step * 8 + lane % 4 + i % 2 * 4, column + i / 2 * 8 + lane / 4));
      }
    } else {
      uint32_t r[4];
      if constexpr (ALONG == Along::kK) {
        arch::ldmatrix(r, tile + (column + lane / 16 * 8 + lane % 8) * kPitch + step * 32 + lane / 8 % 2 * 16);
      } else {
        const int k = step * 16 + lane / 8 % 2 * 8 + lane % 8;
        arch::ldmatrix_transposed(r, tile + k * kPitch + (column + lane / 16 * 8) * 2);
      }
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
    }
  }
};

// Two neighbours, at a multiple of their size.
template <typename Element>
ERCN_DEVICE void store_pair(Element* to, float x, float y) {
  if constexpr (sizeof(Element) == 4) {
    struct alignas(8) Pair {
      float x, y;
    };
    *reinterpret_cast<Pair*>(to) = {x, y};
  } else {
    *reinterpret_cast<uint32_t*>(to) = arch::pack<Element>(x, y);
  }
}

// Sums of a warp: 32 rows by 64 columns. Warps are two by two.
struct Sums {
  static constexpr int kRowTiles = 2, kColumnTiles = 8;
  float at[kRowTiles][kColumnTiles][4];

  // Of this thread within the block: the row of at[m][…][i], and the column of at[…][n][i].
  ERCN_DEVICE static int row(int m, int i) {
    return arch::warp_index() / 2 * 32 + m * 16 + arch::lane_index() / 4 + i / 2 * 8;
  }
  ERCN_DEVICE static int column(int n, int i) {
    return arch::warp_index() % 2 * 64 + n * 8 + arch::lane_index() % 4 * 2 + i % 2;
  }
};

template <typename Precision, Along A_ALONG, Along B_ALONG>
struct GemmMainloop {
  using Element = typename Precision::Element;
  using A = Tile<Element, 64, A_ALONG>;
  using B = Tile<Element, 128, B_ALONG>;
  static constexpr int kThreads = 128, kDepth = A::kDepth, kStages = 3, kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kBytes = kStages * kStageBytes;

  // sums = Σ over `steps` of kDepth of K. source.a(step) and source.b(step) are Runs; if kMasked, rows of B whose bit
  // in source.mask(step) is 0 count as zero whatever they hold. The caller may write the stages again at once.
  template <typename Source>
  ERCN_DEVICE static void run(Sums& sums, int steps, const Source& source, unsigned char* stages) {
    sums = {};
    for (int step = 0; step < kStages - 1; ++step) fill_stage(step, steps, source, stages);
    for (int step = 0; step < steps; ++step) {
      arch::cp_async_wait<kStages - 2>();
      arch::sync_threads();  // the stage is there for all threads, and the one before is no longer read
      fill_stage(step + kStages - 1, steps, source, stages);
      const unsigned char* a = stages + step % kStages * kStageBytes;
      multiply_stage(sums, a, a + A::kBytes, source, step);
    }
    arch::cp_async_wait<0>();
    arch::sync_threads();
  }

 private:
  template <typename Source>
  ERCN_DEVICE static void fill_stage(int step, int steps, const Source& source, unsigned char* stages) {
    if (step < steps) {
      unsigned char* a = stages + step % kStages * kStageBytes;
      A::fill(a, source.a(step), kThreads);
      B::fill(a + A::kBytes, source.b(step), kThreads);
    }
    arch::cp_async_commit();
  }

  template <typename Source>
  ERCN_DEVICE static void multiply_stage(
      Sums& sums, const unsigned char* a, const unsigned char* b, const Source& source, int step) {
    const int row = arch::warp_index() / 2 * 32, column = arch::warp_index() % 2 * 64;
    [[maybe_unused]] constexpr int kUnroll = Precision::kExact ? 1 : 2;  // terms take many registers
#pragma unroll kUnroll
    for (int part = 0; part < 2; ++part) {
      Factor<4> fa[Sums::kRowTiles];
#pragma unroll
      for (int m = 0; m < Sums::kRowTiles; ++m) {
        uint32_t r[4];
        A::load_a(r, a, row + m * 16, part);
        fa[m] = factor(r);
      }
#pragma unroll
      for (int n = 0; n < Sums::kColumnTiles; n += 2) {
        uint32_t r[2][2];
        B::load_b(r, b, column + n * 8, part);
        if constexpr (Source::kMasked) mask(r, source.mask(step) >> (part * kDepth / 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Factor<2> fb = factor(r[half]);
#pragma unroll
          for (int m = 0; m < Sums::kRowTiles; ++m) add(sums.at[m][n + half], fa[m], fb);
        }
      }
    }
  }

  // A fragment as mma takes it, with fp32 rounded to TF32.
  template <int N>
  struct Rounded {
    uint32_t high[N];

    ERCN_DEVICE void set(int i, uint32_t bits) {
      high[i] = sizeof(Element) == 4 ? arch::float_bits(arch::round_tf32(arch::float_of(bits))) : bits;
    }
  };
  // A fragment as TF32 and the rest, for fp32 accuracy.
  template <int N>
  struct Split : Terms<N> {
    ERCN_DEVICE void set(int i, uint32_t bits) { Terms<N>::set(i, arch::float_of(bits)); }
  };
  template <int N>
  using Factor = std::conditional_t<Precision::kExact, Split<N>, Rounded<N>>;

  template <int N>
  ERCN_DEVICE static Factor<N> factor(const uint32_t (&bits)[N]) {
    Factor<N> made;
#pragma unroll
    for (int i = 0; i < N; ++i) made.set(i, bits[i]);
    return made;
  }

  ERCN_DEVICE static void add(float (&d)[4], const Factor<4>& a, const Factor<2>& b) {
    using Type = typename Precision::Product;
    if constexpr (Precision::kExact) {
      // Tensor cores truncate their sums, so the total is kept in fp32. Where a factor is not finite, products with a
      // low term are NaN, and the high terms alone have the product.
      float large[4] = {}, small[4] = {};
      arch::mma<Type>(small, a.low, b.high);
      arch::mma<Type>(small, a.high, b.low);
      arch::mma<Type>(large, a.high, b.high);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += large[i] + (small[i] == small[i] ? small[i] : 0.0f);
    } else {
      arch::mma<Type>(d, a.high, b.high);
    }
  }

  // Keeps rows k of B whose bit is 1.
  ERCN_DEVICE static void mask(uint32_t (&b)[2][2], uint32_t bits) {
    const int t = arch::lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t keep;
      if constexpr (sizeof(Element) == 2) {
        const uint32_t two = bits >> (2 * t + 8 * i);
        keep = (two & 1 ? 0xffffu : 0u) | (two & 2 ? 0xffff0000u : 0u);
      } else {
        keep = bits >> (t + 4 * i) & 1 ? 0xffffffffu : 0u;
      }
      b[0][i] &= keep;
      b[1][i] &= keep;
    }
  }
};

}  // namespace ercn::pool
