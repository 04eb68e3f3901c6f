#if defined(__x86_64__)
#include <immintrin.h>
#define ERCN_ISA avx512
#define ERCN_AVX512
#define ERCN_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#include "kernels_isa.h"
#endif
