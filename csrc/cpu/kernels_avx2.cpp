#if defined(__x86_64__)
#include <immintrin.h>
#define ERCN_ISA avx2
#define ERCN_AVX2
#define ERCN_TARGET "avx2,fma"
#include "kernels_isa.h"
#endif
