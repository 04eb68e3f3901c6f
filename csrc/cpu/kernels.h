#pragma once
#include "affinity/affinity.h"
#include "isa.h"
#include "pool/pool.h"
#include "refinement/refinement.h"

namespace ercn {

// Entry points of one instruction set. Where one is missing (null function), the next wider type serves.
struct Kernels {
  AffinityKernel<float, float> affinity_float;
  AffinityKernel<double, double> affinity_double;
  AffinityKernel<uint16_t, float> affinity_bf16;
  PoolKernel<float, float, float> pool_float;
  PoolKernel<double, double, double> pool_double;
  PoolKernel<uint16_t, float, uint16_t> pool_bf16;
  PoolKernel<uint16_t, float, float> pool_mixed;  // bfloat16 instances, float weights
  RefinementKernel<float> refinement_float;
  RefinementKernel<double> refinement_double;
  // Run `steps` of independent multiply-adds in registers, and give their FLOPs (kernels_isa.h).
  double (*multiply_add_float)(int64_t steps);
  double (*multiply_add_double)(int64_t steps);
  double (*multiply_add_bf16)(int64_t steps);
};

const Kernels& kernels(Isa isa);

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_bf16 {
const Kernels& kernels();
}

}  // namespace ercn
