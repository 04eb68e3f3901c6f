// Tensor-core products of a warpgroup (sm_90a) by CuTe's atoms.
//
// D [64, N] in fp32 of bf16 or fp16, 16 deep. With w = warp % 4, g = lane / 4 and t = lane % 4:
//   D:                    d[i] = D[16 w + g + 8 (i / 2 % 2), 8 (i / 4) + 2 t + i % 2]
//   A from registers:     rows 16 w … of A, as in mma.h
//
// Operands in shared memory are rows of 128 bytes with 128-byte swizzle, as TMA stores a box of 128 bytes along
// dimension 0; 8 rows are 1024 bytes, at a multiple of 1024:
//   kK, K contiguous:     a row has 64 K for one m (n), rows follow each other. The next 16 K: advance(…, 32).
//   kMN, M or N contiguous: a row has 64 m (n) of one k, rows of k follow each other; the next 64
//                         m (n) are `group_bytes` away. The next 16 K: advance(…, 2048).
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // every N, not only powers of two
#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include <type_traits>
#include <utility>

#include <arch/base.h>

namespace ercn::arch {

enum class Major { kK, kMN };

// A matrix descriptor.
using Operand = uint64_t;

namespace detail {

ERCN_DEVICE Operand operand(const void* tile, uint64_t leading_bytes, uint64_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | leading_bytes >> 4 << 16 | stride_bytes >> 4 << 32 | kSwizzle128 << 62;
}

template <typename Element>
using Cute = std::conditional_t<std::is_same_v<Element, bf16>, cute::bfloat16_t, cute::half_t>;

template <Major kMajor>
inline constexpr cute::SM90::GMMA::Major kCuteMajor =
    kMajor == Major::kK ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN;

template <int N>
using Shape = cute::Shape<cute::_64, cute::Int<N>, cute::_16>;

template <typename Atom, size_t... I>
ERCN_DEVICE void multiply(float (&d)[sizeof...(I)], Operand a, Operand b, bool accumulate, std::index_sequence<I...>) {
  Atom::fma(a, b, d[I]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <typename Atom, size_t... I>
ERCN_DEVICE void multiply(
    float (&d)[sizeof...(I)], const uint32_t (&a)[4], Operand b, bool accumulate, std::index_sequence<I...>) {
  Atom::fma(
      a[0], a[1], a[2], a[3], b, d[I]...,
      accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

}  // namespace detail

ERCN_DEVICE Operand operand_k(const void* tile) { return detail::operand(tile, 16, 1024); }
ERCN_DEVICE Operand operand_mn(const void* tile, int group_bytes) { return detail::operand(tile, group_bytes, 1024); }
ERCN_DEVICE Operand advance(Operand operand, int bytes) { return operand + (bytes >> 4); }

// Starts d = A · B, or d += A · B where `accumulate`. N is a multiple of 8 up to 256.
template <typename Element, int N, Major kA, Major kB>
ERCN_DEVICE void wgmma(float (&d)[N / 2], Operand a, Operand b, bool accumulate) {
  using E = detail::Cute<Element>;
  using Atom = decltype(cute::SM90::GMMA::ss_op_selector<
                        E, E, float, detail::Shape<N>, detail::kCuteMajor<kA>, detail::kCuteMajor<kB>>());
  detail::multiply<Atom>(d, a, b, accumulate, std::make_index_sequence<N / 2>());
}
template <typename Element, int N, Major kB>
ERCN_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool accumulate) {
  using E = detail::Cute<Element>;
  using Atom = decltype(cute::SM90::GMMA::rs_op_selector<
                        E, E, float, detail::Shape<N>, cute::SM90::GMMA::Major::K, detail::kCuteMajor<kB>>());
  detail::multiply<Atom>(d, a, b, accumulate, std::make_index_sequence<N / 2>());
}

// Before the first wgmma and after each commit: orders earlier accesses of the registers and shared memory it reads.
ERCN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ERCN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last N groups.
template <int N>
ERCN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler moves no access of the accumulators across it: before wgmma_fence and after wgmma_wait.
template <int COUNT>
ERCN_DEVICE void pin(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace ercn::arch
