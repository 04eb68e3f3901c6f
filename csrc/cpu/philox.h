#pragma once
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): random bits as a function of a counter and a key. The same words
// on every instruction set.
#include "simd.h"

namespace ercn::ERCN_ISA {

using Words = Vec<uint32_t>;
constexpr int kWords = kVecBytes / 4;

// The halves of the 64-bit products of every lane.
ERCN_INLINE void multiply(Words x, uint32_t factor, Words& high, Words& low) {
#if defined(ERCN_AVX512)
  const auto even = (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi32(factor));
  const auto odd = (Vec<uint64_t>)_mm512_maskz_mul_epu32(
      0xff, (__m512i)((Vec<uint64_t>)x >> 32), _mm512_set1_epi32(factor));
  low = __builtin_shufflevector((Words)even, (Words)odd, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  high = __builtin_shufflevector((Words)even, (Words)odd, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif defined(ERCN_AVX2)
  const auto even = (Vec<uint64_t>)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(factor));
  const auto odd = (Vec<uint64_t>)_mm256_mul_epu32((__m256i)((Vec<uint64_t>)x >> 32), _mm256_set1_epi32(factor));
  low = __builtin_shufflevector((Words)even, (Words)odd, 0, 8, 2, 10, 4, 12, 6, 14);
  high = __builtin_shufflevector((Words)even, (Words)odd, 1, 9, 3, 11, 5, 13, 7, 15);
#elif defined(__SSE2__)
  const auto even = (Vec<uint64_t>)_mm_mul_epu32((__m128i)x, _mm_set1_epi32(factor));
  const auto odd = (Vec<uint64_t>)_mm_mul_epu32((__m128i)((Vec<uint64_t>)x >> 32), _mm_set1_epi32(factor));
  low = __builtin_shufflevector((Words)even, (Words)odd, 0, 4, 2, 6);
  high = __builtin_shufflevector((Words)even, (Words)odd, 1, 5, 3, 7);
#else
  for (int i = 0; i < kWords; ++i) {
    const uint64_t product = static_cast<uint64_t>(x[i]) * factor;
    low[i] = static_cast<uint32_t>(product);
    high[i] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// Four words for the counters (first, second, third[lane], 0).
ERCN_INLINE void philox(uint32_t first, uint32_t second, Words third, const uint32_t (&keys)[10][2], Words (&out)[4]) {
  Words a = Words{} + first, b = Words{} + second, c = third, d = {};
  ERCN_UNROLL for (int round = 0; round < 10; ++round) {
    Words high_a, low_a, high_c, low_c;
    multiply(a, 0xD2511F53, high_a, low_a);
    multiply(c, 0xCD9E8D57, high_c, low_c);
    a = high_c ^ b ^ keys[round][0], b = low_c;
    c = high_a ^ d ^ keys[round][1], d = low_a;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

}  // namespace ercn::ERCN_ISA
