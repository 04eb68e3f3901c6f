#if defined(__x86_64__)
#include <immintrin.h>
#define ERCN_ISA avx512_bf16
#define ERCN_AVX512
#define ERCN_AVX512_BF16
#define ERCN_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#include "kernels_isa.h"
#endif
