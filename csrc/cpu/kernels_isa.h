#pragma once
// The whole of one kernels_<isa>.cpp. Headers that it shares with other code emit no inline functions: the linker could
// pick this instruction set's copy for all code.
#define ERCN_PRAGMA_(...) _Pragma(#__VA_ARGS__)
#define ERCN_PRAGMA(...) ERCN_PRAGMA_(__VA_ARGS__)
#if defined(ERCN_TARGET) && defined(__clang__)
ERCN_PRAGMA(clang attribute push(__attribute__((target(ERCN_TARGET))), apply_to = function))
#elif defined(ERCN_TARGET)
ERCN_PRAGMA(GCC target(ERCN_TARGET))
#endif

#include "affinity/kernel.h"
#include "kernels.h"
#include "pool/kernel.h"
#include "refinement/kernel.h"

namespace ercn::ERCN_ISA {

// ---- the rate of multiply-adds, which no kernel can exceed ----

constexpr int kChains = kVecBytes == 64 ? 24 : 12;  // independent sums, of 32 or 16 registers; they hide the latency

// FLOPs of `steps` multiply-adds of every chain, which never leave their registers.
template <typename T>
double multiply_add(int64_t steps) {
  // The sums are multiplied: a constant product would be formed once and only added. Each tends to b / (1 - a) = 1.
  // `start` is read for every chain: of equal chains the compiler would keep one.
  volatile T start = 1, scale = T(0.5);
  const Vec<T> a = Vec<T>{} + scale, b = Vec<T>{} + scale;
  Vec<T> sum[kChains];
  ERCN_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = Vec<T>{} + start;
  for (int64_t step = 0; step < steps; ++step) {
    ERCN_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * a + b;
  }
  Vec<T> total{};
  ERCN_UNROLL for (int i = 0; i < kChains; ++i) total += sum[i];
  volatile T used = total[0];
  static_cast<void>(used);
  return 2.0 * steps * kChains * kVecBytes / sizeof(T);
}

#if defined(ERCN_AVX512_BF16)
inline double multiply_add_bf16(int64_t steps) {
  volatile int32_t start = 0;
  const __m512bh a = (__m512bh)_mm512_set1_epi32(start), b = (__m512bh)_mm512_set1_epi32(start);
  __m512 sum[kChains];
  ERCN_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = (__m512)_mm512_set1_epi32(start);
  for (int64_t step = 0; step < steps; ++step) {
    ERCN_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
  }
  ERCN_UNROLL for (int i = 1; i < kChains; ++i) sum[0] += sum[i];
  volatile float used = sum[0][0];
  static_cast<void>(used);
  return 2.0 * steps * kChains * 32;
}
#endif

// ---- the table ----

const Kernels& kernels() {
  static const Kernels table{
      affinity_kernel<float, float>(),
      affinity_kernel<double, double>(),
#if defined(ERCN_AVX512_BF16)
      affinity_kernel<uint16_t, float>(),
#else
      {},
#endif
      pool_kernel<float, float, float>(),
      pool_kernel<double, double, double>(),
      pool_kernel<uint16_t, float, uint16_t>(),
      pool_kernel<uint16_t, float, float>(),
      refinement_kernel<float>(),
      refinement_kernel<double>(),
      multiply_add<float>,
      multiply_add<double>,
#if defined(ERCN_AVX512_BF16)
      multiply_add_bf16,
#else
      nullptr,
#endif
  };
  return table;
}

}  // namespace ercn::ERCN_ISA

#if defined(ERCN_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
