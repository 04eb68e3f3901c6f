#pragma once
// The whole of one kernels_<isa>.cpp. No other code is compiled for that instruction set, so that none can leak out of
// it through an inline function that the linker picks.
#include "affinity_kernel.h"
#include "kernels.h"
#include "multiply_add.h"
#include "pool_kernel.h"
#include "refinement_kernel.h"

namespace ercn::ERCN_ISA {

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
