// csrc/cuda/arch/mma.h for the emulator.
#pragma once

#include <type_traits>

#include <arch/convert.h>

namespace ercn::arch {
namespace detail {

template <typename Element>
inline constexpr int kMmaK = std::is_same_v<Element, tf32> ? 8 : 16;

// Element k of a fragment's register.
template <typename Element>
float part(uint32_t bits, int k) {
  if constexpr (std::is_same_v<Element, tf32>) {
    return float_of(bits & 0xffffe000);
  } else {
    return k ? unpack_high<Element>(bits) : unpack_low<Element>(bits);
  }
}

struct Place {
  int row, column;
};

// The place of element `part` of a lane's register i in D [16, 8], A [16, K] and B [K, 8].
inline Place place_d(int lane, int i) { return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2}; }
template <typename Element>
Place place_a(int lane, int i, int part) {
  const int row = lane / 4 + 8 * (i % 2);
  return {row, std::is_same_v<Element, tf32> ? lane % 4 + 4 * (i / 2) : lane % 4 * 2 + 8 * (i / 2) + part};
}
template <typename Element>
Place place_b(int lane, int i, int part) {
  return {std::is_same_v<Element, tf32> ? lane % 4 + 4 * i : lane % 4 * 2 + 8 * i + part, lane / 4};
}

// Tensor cores truncate their sums to fp32.
inline float truncated_sum(float d, double products) {
  const double sum = d + products;
  const float near = static_cast<float>(sum);
  return std::isfinite(near) && std::fabs(near) > std::fabs(sum) ? std::nextafter(near, 0.0f) : near;
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

}  // namespace detail

template <typename Element>
ERCN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int K = detail::kMmaK<Element>, kParts = std::is_same_v<Element, tf32> ? 1 : 2;
  detail::Mma argument{d, a, b};
  emulator::meet("mma", argument, [](detail::Mma** lanes) {
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int part = 0; part < kParts; ++part) {
        for (int i = 0; i < 4; ++i) {
          const auto [row, column] = detail::place_a<Element>(lane, i, part);
          A[row][column] = detail::part<Element>(lanes[lane]->a[i], part);
        }
        for (int i = 0; i < 2; ++i) {
          const auto [row, column] = detail::place_b<Element>(lane, i, part);
          B[row][column] = detail::part<Element>(lanes[lane]->b[i], part);
        }
      }
    }
    double sums[16][8] = {};
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < 8; ++n) sums[m][n] += static_cast<double>(A[m][k]) * B[k][n];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto [row, column] = detail::place_d(lane, i);
        float& d = lanes[lane]->d[i];
        d = detail::truncated_sum(d, sums[row][column]);
      }
    }
  });
}

namespace detail {

struct Ldmatrix {
  uint32_t* r;
  const void* row;
};

template <bool TRANSPOSED>
void load_matrices(const char* instruction, uint32_t (&r)[4], const void* row) {
  Ldmatrix argument{r, row};
  emulator::meet(instruction, argument, [&](Ldmatrix** lanes) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j) {
        std::memcpy(matrix[j], emulator::in_shared(lanes[8 * i + j]->row, 16, 16, instruction), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? matrix[column][row] : matrix[row][column];
        const uint32_t high = TRANSPOSED ? matrix[column + 1][row] : matrix[row][column + 1];
        lanes[lane]->r[i] = low | high << 16;
      }
    }
  });
}

}  // namespace detail

ERCN_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) { detail::load_matrices<false>("ldmatrix", r, row); }
ERCN_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  detail::load_matrices<true>("ldmatrix_transposed", r, row);
}

}  // namespace ercn::arch
