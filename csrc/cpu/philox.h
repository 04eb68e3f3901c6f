#pragma once
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): random bits as a function of a counter and a key. The same words
// on every instruction set.
#include "simd.h"

namespace ercn::ERCN_ISA {

using Words = Vec<uint32_t>;
using Wide = Vec<uint64_t>;  // words in the lower halves of the lanes; what the upper ones hold does not matter
constexpr int kWords = kVecBytes / 4;

// The 64-bit products of the lower halves.
ERCN_INLINE Wide multiply(Wide x, uint32_t factor) {
#if defined(ERCN_AVX512)
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(factor));  // without a mask GCC 12 warns
#elif defined(ERCN_AVX2)
  return (Wide)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xffffffff) * factor;
#endif
}

// Four words for each of the counters (first, second, third + lane, 0): those of even lanes and those of odd ones go
// side by side, so that no word changes its lane until the end.
ERCN_INLINE void philox(uint32_t first, uint32_t second, uint32_t third, const uint64_t (&keys)[10][2],
                        Words (&out)[4]) {
  Wide even[4] = {Wide{} + first, Wide{} + second, Wide{} + third, {}}, odd[4];
  for (int i = 0; i < kWords / 2; ++i) even[2][i] += 2 * i;
  ERCN_UNROLL for (int j = 0; j < 4; ++j) odd[j] = even[j];
  odd[2] += 1;
  ERCN_UNROLL for (int round = 0; round < 10; ++round) {
    ERCN_UNROLL for (Wide* x : {even, odd}) {
      const Wide a = multiply(x[0], 0xD2511F53), c = multiply(x[2], 0xCD9E8D57);
      x[0] = c >> 32 ^ x[1] ^ keys[round][0], x[1] = c;
      x[2] = a >> 32 ^ x[3] ^ keys[round][1], x[3] = a;
    }
  }
  ERCN_UNROLL for (int j = 0; j < 4; ++j) out[j] = (Words)((even[j] & 0xffffffff) | odd[j] << 32);
}

}  // namespace ercn::ERCN_ISA
