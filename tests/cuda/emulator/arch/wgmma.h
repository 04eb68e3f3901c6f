// csrc/cuda/arch/wgmma.h for the emulator. A product reads shared memory at its wgmma or at its wgmma_wait, by a random
// coin, and writes its accumulators at the wait; until then they hold NaN. Each warp computes its own 16 rows.
#pragma once

#include <optional>
#include <utility>

#include <arch/mma.h>
#include <arch/tensor_map.h>

namespace ercn::arch {

enum class Major { kK, kMN };

using Operand = uint64_t;

namespace detail {

constexpr int K = 16, kUnit = 8;  // of a product; elements of 16 bytes

inline Operand operand(const void* tile, uint64_t leading_bytes, uint64_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | leading_bytes >> 4 << 16 | stride_bytes >> 4 << 32 | kSwizzle128 << 62;
}

// The offset of 16 bytes of an operand in shared memory: row `mn` and unit `k` along K of kK; unit `mn` and row `k` of
// kMN.
inline int64_t place_operand(Operand descriptor, Major major, int mn, int k) {
  const int64_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const int64_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int64_t linear = major == Major::kK ? mn % 8 * 128 + mn / 8 * stride + k * 16
                                            : mn % 8 * 16 + mn / 8 * leading + k % 8 * 128 + k / 8 * stride;
  return swizzled(start + linear);
}

// Rows mn, mn + 1, … of an operand as [count][K].
template <typename Element, Major kMajor>
std::vector<float> read_operand(Operand descriptor, int first, int count) {
  const emulator::Block& block = emulator::block();
  std::vector<float> rows(count * K);
  const auto read = [&](int mn, int k, const auto& put) {
    const unsigned char* unit = block.async_view.data() + place_operand(descriptor, kMajor, mn, k);
    for (int i = 0; i < kUnit; ++i) {
      Element element;
      std::memcpy(&element, unit + 2 * i, 2);
      put(i, to_float(element));
    }
  };
  if constexpr (kMajor == Major::kK) {
    for (int row = 0; row < count; ++row) {
      for (int k = 0; k < K / kUnit; ++k) {
        read(first + row, k, [&](int i, float x) { rows[row * K + k * kUnit + i] = x; });
      }
    }
  } else {
    for (int mn = 0; mn < count / kUnit; ++mn) {
      for (int k = 0; k < K; ++k) {
        read(first / kUnit + mn, k, [&](int i, float x) { rows[(mn * kUnit + i) * K + k] = x; });
      }
    }
  }
  return rows;
}

// Fails unless the operand lies in shared memory, no ordinary store to it lacks a fence, and its swizzle begins at 0.
template <Major kMajor>
void check_operand(Operand descriptor, int count) {
  const emulator::Block& block = emulator::block();
  if ((descriptor << 4 & 0x3ff) >= 128) {
    emulator::fail("wgmma: an operand must begin in the first row of a multiple of 1024");
  }
  const int rows = kMajor == Major::kK ? count : count / kUnit, columns = kMajor == Major::kK ? K / kUnit : K;
  for (int mn = 0; mn < rows; ++mn) {
    for (int k = 0; k < columns; ++k) {
      const int64_t offset = place_operand(descriptor, kMajor, mn, k);
      emulator::in_shared(block.shared + offset, 16, 16, "wgmma");
      if (std::memcmp(block.shared + offset, block.async_view.data() + offset, 16) != 0) {
        emulator::fail(
            "wgmma reads offset " + std::to_string(offset) +
            " of shared memory, which was stored to without a fence_proxy_async after it");
      }
    }
  }
}

struct Wgmma {
  float* d;
  const uint32_t* a;
  Operand a_operand, b_operand;
  bool accumulate;
  emulator::Thread* thread;
};

// read_a(lanes) returns a function that returns the warp's 16 rows of A.
template <typename Element, int N, Major kB, typename ReadA>
void multiply(Wgmma argument, const ReadA& read_a) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  static constexpr int kCount = N / 2;
  argument.thread = &emulator::thread();
  emulator::meet("wgmma", argument, [&](Wgmma** lanes) {
    const Wgmma first = *lanes[0];
    emulator::Warp& warp = emulator::block().warps[first.thread->index / 32];
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane]->b_operand != first.b_operand || lanes[lane]->a_operand != first.a_operand ||
          lanes[lane]->accumulate != first.accumulate) {
        emulator::fail("wgmma: lanes of a warp give different operands");
      }
      if (!lanes[lane]->thread->wgmma_fenced) emulator::fail("wgmma without a wgmma_fence since the last wgmma_commit");
    }
    check_operand<kB>(first.b_operand, N);
    warp.wgmmas.insert(
        warp.wgmmas.end(), {first.a_operand, first.b_operand, static_cast<uint64_t>(N), first.accumulate});

    emulator::Accumulators& sums = warp.accumulators[first.d];
    if (sums.unfinished == 0) {
      sums.count = kCount;
      sums.values.resize(32 * kCount);
      for (int lane = 0; lane < 32; ++lane) {
        float* d = sums.registers[lane] = lanes[lane]->d;
        std::copy(d, d + kCount, sums.values.begin() + lane * kCount);
        std::fill(d, d + kCount, std::numeric_limits<float>::quiet_NaN());
      }
    } else if (sums.count != kCount) {
      emulator::fail("wgmma: accumulators of another shape are still being worked on");
    }
    ++sums.unfinished;
    const auto operands = [read = read_a(lanes), first] {
      return std::pair(read(), read_operand<Element, kB>(first.b_operand, 0, N));
    };
    std::optional<std::pair<std::vector<float>, std::vector<float>>> early;
    if (emulator::coin()) early = operands();
    warp.products.push_back([early, operands, first, &sums] {
      const auto [a, b] = early ? *early : operands();
      std::vector<double> product(16 * N), row(N);
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < N; ++n) row[n] = b[n * K + k];
        for (int m = 0; m < 16; ++m) {
          for (int n = 0; n < N; ++n) product[m * N + n] += a[m * K + k] * row[n];
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < kCount; ++i) {
          const auto [m, n] = place_d(lane, i % 4);
          float& sum = sums.values[lane * kCount + i];
          sum = truncated_sum(first.accumulate ? sum : 0, product[m * N + i / 4 * 8 + n]);
        }
      }
      --sums.unfinished;
    });
  });
}

}  // namespace detail

ERCN_DEVICE Operand operand_k(const void* tile) { return detail::operand(tile, 16, 1024); }
ERCN_DEVICE Operand operand_mn(const void* tile, int group_bytes) { return detail::operand(tile, group_bytes, 1024); }
ERCN_DEVICE Operand advance(Operand operand, int bytes) { return operand + (bytes >> 4); }

template <typename Element, int N, Major kA, Major kB>
ERCN_DEVICE void wgmma(float (&d)[N / 2], Operand a, Operand b, bool accumulate) {
  detail::multiply<Element, N, kB>({d, nullptr, a, b, accumulate, nullptr}, [&](detail::Wgmma**) {
    detail::check_operand<kA>(a, 64);
    const int first = warp_index() % 4 * 16;
    return [a, first] { return detail::read_operand<Element, kA>(a, first, 16); };
  });
}

template <typename Element, int N, Major kB>
ERCN_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool accumulate) {
  detail::multiply<Element, N, kB>({d, a, 0, b, accumulate, nullptr}, [&](detail::Wgmma** lanes) {
    constexpr int K = detail::K;
    std::vector<float> rows(16 * K);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int part = 0; part < 2; ++part) {
          const auto [row, column] = detail::place_a<Element>(lane, i, part);
          rows[row * K + column] = detail::part<Element>(lanes[lane]->a[i], part);
        }
      }
    }
    return [rows] { return rows; };
  });
}

ERCN_DEVICE void wgmma_fence() {
  sync_warp();
  emulator::thread().wgmma_fenced = true;
}

ERCN_DEVICE void wgmma_commit() {
  emulator::thread().wgmma_fenced = false;
  int nothing = 0;
  emulator::meet("wgmma_commit", nothing, [](int**) {
    emulator::Warp& warp = emulator::block().warps[warp_index()];
    warp.product_groups.push_back(std::move(warp.products));
    warp.products.clear();
  });
}

template <int N>
ERCN_DEVICE void wgmma_wait() {
  int nothing = 0;
  emulator::meet("wgmma_wait", nothing, [](int**) {
    emulator::Warp& warp = emulator::block().warps[warp_index()];
    while (static_cast<int>(warp.product_groups.size()) > N) {
      for (const emulator::Action& product : warp.product_groups.front()) product();
      warp.product_groups.erase(warp.product_groups.begin());
    }
    for (auto sums = warp.accumulators.begin(); sums != warp.accumulators.end();) {
      if (sums->second.unfinished > 0) {
        ++sums;
        continue;
      }
      for (int lane = 0; lane < 32; ++lane) {
        const float* values = sums->second.values.data() + lane * sums->second.count;
        std::copy(values, values + sums->second.count, sums->second.registers[lane]);
      }
      sums = warp.accumulators.erase(sums);
    }
  });
}

template <int COUNT>
ERCN_DEVICE void pin(float (&)[COUNT]) {}

}  // namespace ercn::arch
