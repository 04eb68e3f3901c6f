// For the instruction set that the compiler targets by default.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#define ERCN_ISA portable
#include "kernels_isa.h"
