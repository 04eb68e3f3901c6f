#if defined(__x86_64__)
#include <immintrin.h>
#define ERCN_ISA avx2
#define ERCN_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
