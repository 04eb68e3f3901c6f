// Compares the emulator's layouts with CuTe's, which others wrote from the same documents: the first difference, or
// nullptr.
#include <cute/algorithm/gemm.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <arch/wgmma.h>

#include "probe.h"

namespace {

using namespace ercn::arch;
namespace gmma = cute::SM90::GMMA;
using Bf16 = cute::bfloat16_t;

void expect(bool same, const std::string& what) {
  if (!same) throw std::runtime_error(what);
}

// place(thread, value) against a layout of CuTe, whose indices are column-major in `rows` rows.
template <typename Layout, typename Place>
void compare(const char* what, const Layout& layout, int threads, int values, int rows, const Place& place) {
  expect(cute::size<0>(layout) == threads && cute::size<1>(layout) == values, std::string(what) + ": sizes");
  for (int thread = 0; thread < threads; ++thread) {
    for (int value = 0; value < values; ++value) {
      const auto [row, column] = place(thread, value);
      expect(
          static_cast<int>(layout(thread, value)) == row + column * rows,
          std::string(what) + ": thread " + std::to_string(thread) + ", value " + std::to_string(value));
    }
  }
}

template <typename Element, typename Atom>
void warp_products(const char* what) {
  using Traits = cute::MMA_Traits<Atom>;
  constexpr int kParts = std::is_same_v<Element, tf32> ? 1 : 2;
  // CuTe's B is [N, K].
  const auto transposed = [](detail::Place place) { return detail::Place{place.column, place.row}; };
  compare(what, typename Traits::CLayout{}, 32, 4, 16, [](int lane, int i) { return detail::place_d(lane, i); });
  compare(what, typename Traits::ALayout{}, 32, 4 * kParts, 16, [](int lane, int i) {
    return detail::place_a<Element>(lane, i / kParts, i % kParts);
  });
  compare(what, typename Traits::BLayout{}, 32, 2 * kParts, 8, [&](int lane, int i) {
    return transposed(detail::place_b<Element>(lane, i / kParts, i % kParts));
  });
}

template <typename Element, typename Atom, int N>
void warpgroup_products(const char* what) {
  using Traits = cute::MMA_Traits<Atom>;
  compare(what, typename Traits::CLayout{}, 128, N / 2, 64, [](int thread, int i) {
    const auto [row, column] = detail::place_d(thread % 32, i % 4);
    return detail::Place{thread / 32 * 16 + row, i / 4 * 8 + column};
  });
  compare(what, typename Traits::ALayout{}, 128, 8, 64, [](int thread, int i) {
    const auto [row, column] = detail::place_a<Element>(thread % 32, i / 2, i % 2);
    return detail::Place{thread / 32 * 16 + row, column};
  });
}

// The offset of element (mn, k) in a tile of swizzled atoms, by its descriptor.
template <typename Element, Major kMajor, typename Atom>
void operand(const char* what, unsigned char* shared) {
  constexpr int kMN = 128, kK = 128 / sizeof(Element), kStep = 32 / sizeof(Element), kVector = 16 / sizeof(Element);
  const auto layout = cute::as_position_independent_swizzle_layout(
      cute::tile_to_shape(
          Atom{}, cute::Shape<cute::Int<kMN>, cute::Int<kMajor == Major::kK ? kK : 64>>{},
          cute::Step<cute::_2, cute::_1>{}));
  constexpr int kGroup = 64 * 128;  // bytes of 64 rows
  const Operand base = kMajor == Major::kK ? operand_k(shared) : operand_mn(shared, kGroup);
  for (int step = 0; step < 4; ++step) {
    const Operand descriptor = advance(base, kMajor == Major::kK ? 32 * step : 2048 * step);
    for (int mn = 0; mn < kMN; ++mn) {
      for (int k = 0; k < kStep; ++k) {
        const int64_t unit = kMajor == Major::kK ? detail::place_operand(descriptor, kMajor, mn, k / kVector)
                                                 : detail::place_operand(descriptor, kMajor, mn / kVector, k);
        const int64_t ours = unit + (kMajor == Major::kK ? k : mn) % kVector * sizeof(Element);
        const int64_t theirs = static_cast<int64_t>(layout(mn, step * kStep + k)) * sizeof(Element);
        expect(ours == theirs, std::string(what) + ": element " + std::to_string(mn) + ", " + std::to_string(k));
      }
    }
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" const char* layouts_differ() {
  return failure_of([] {
    warp_products<bf16, cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma of bf16");
    warp_products<fp16, cute::SM80_16x8x16_F32F16F16F32_TN>("mma of fp16");
    warp_products<tf32, cute::SM80_16x8x8_F32TF32TF32F32_TN>("mma of TF32");
    constexpr auto kK = gmma::Major::K;
    warpgroup_products<bf16, gmma::MMA_64x96x16_F32BF16BF16_RS<kK, kK>, 96>("wgmma of bf16");
    warpgroup_products<fp16, gmma::MMA_64x256x16_F32F16F16_RS<kK, kK>, 256>("wgmma of fp16");
    std::string difference;
    ercn::emulator::run({1, 1, 1}, 32, 1 << 17, [&](unsigned char* shared) {
      if (ercn::arch::thread_index() > 0) return;
      try {  // an exception cannot leave a fiber
        operand<bf16, Major::kK, gmma::Layout_K_SW128_Atom<Bf16>>("K-major operand", shared);
        operand<bf16, Major::kMN, gmma::Layout_MN_SW128_Atom<Bf16>>("MN-major operand", shared);
      } catch (const std::exception& error) {
        difference = error.what();
      }
    });
    expect(difference.empty(), difference);
  });
}
#pragma GCC visibility pop
