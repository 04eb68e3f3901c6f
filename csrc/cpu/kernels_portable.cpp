// For the instruction set that the compiler targets by default.
#define ERCN_ISA portable
#include "kernels_isa.h"
