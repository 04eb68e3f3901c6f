// Functions that the host may call too: index arithmetic that tests check without a GPU.
#pragma once

#ifdef __CUDACC__
#define ERCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ERCN_HOST_DEVICE inline
#endif

namespace ercn::arch {

template <typename Integer>
ERCN_HOST_DEVICE constexpr Integer divide_up(Integer a, Integer b) {
  return (a + b - 1) / b;
}

template <typename Integer>
ERCN_HOST_DEVICE constexpr Integer round_up(Integer a, Integer b) {
  return divide_up(a, b) * b;
}

}  // namespace ercn::arch
