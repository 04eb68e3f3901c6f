// Small kernels that test the emulator's Hopper instructions, for tests/cuda/test_emulator_hopper.py.
#include <arch/convert.h>
#include <arch/hopper.h>
#include <arch/wgmma.h>

#include "probe.h"

namespace {

using namespace ercn;
using namespace ercn::arch;

constexpr int kRow = 128;  // bytes

// The step that a product omits, so that the emulator catches it.
enum Omission { kNothing, kWait, kFence, kProxyFence, kBarrier, kCommit };

// A map of `rows` rows of `columns` elements, in boxes of 128 bytes by `box_rows`.
template <typename Element>
TensorMap rows_map(const void* x, int rows, int columns, int box_rows) {
  return make_tensor_map<Element, 2>(
      x, {columns, rows}, {int64_t{columns} * static_cast<int64_t>(sizeof(Element))},
      {kRow / static_cast<int>(sizeof(Element)), box_rows});
}

// One operand with MN rows and one row of 128 bytes of K: x is [MN, K] for kK and [K, MN] for kMN.
template <typename Element, int MN, Major kMajor>
struct Tile {
  static constexpr int kRowElements = kRow / sizeof(Element), K = kRowElements;
  static constexpr int kGroups = kMajor == Major::kK ? 1 : divide_up(MN, kRowElements);
  static constexpr int kGroupBytes = kRow * (kMajor == Major::kK ? round_up(MN, 8) : K);
  static constexpr int kBytes = round_up(kGroups * kGroupBytes, 1024);

  static TensorMap map(const void* x) {
    return kMajor == Major::kK ? rows_map<Element>(x, MN, K, round_up(MN, 8)) : rows_map<Element>(x, K, MN, K);
  }
  static void load(unsigned char* tile, const TensorMap& map, Barrier* barrier) {
    for (int group = 0; group < kGroups; ++group) {
      tma_load(tile + group * kGroupBytes, map, barrier, group * kRowElements, 0);
    }
  }
  static Operand operand(const unsigned char* tile, int step) {  // the K of one instruction
    return kMajor == Major::kK ? advance(operand_k(tile), 32 * step)
                               : advance(operand_mn(tile, kGroupBytes), 2048 * step);
  }
};

// d [64, N] = a · bᵀ over the K of one row of 128 bytes.
template <typename Element, int N, Major kA, Major kB, bool kRegisters>
const char* multiply(const Element* a, const Element* b, float* d, Omission without) {
  using A = Tile<Element, 64, kA>;
  using B = Tile<Element, N, kB>;
  const TensorMap map_a = A::map(a), map_b = B::map(b);
  return probe(128, A::kBytes + B::kBytes + 16, [=](unsigned char* shared) {
    unsigned char *tile_a = shared, *tile_b = shared + A::kBytes;
    auto* barrier = reinterpret_cast<Barrier*>(tile_b + B::kBytes);
    if (thread_index() == 0) {
      barrier_init(barrier, 1);
      fence_barrier_init();
    }
    sync_threads();
    if (warp_index() == 0 && elect_one()) {
      barrier_arrive_expect(barrier, A::kGroups * A::kGroupBytes + B::kGroups * B::kGroupBytes);
      A::load(tile_a, map_a, barrier);
      B::load(tile_b, map_b, barrier);
    }
    if (without != kBarrier) barrier_wait(barrier, 0);
    if (without == kProxyFence && thread_index() == 5) reinterpret_cast<float*>(tile_b)[7] = 1;
    const int w = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    float sums[N / 2];
    if (without != kFence) wgmma_fence();
    for (int step = 0; step < 4; ++step) {
      if constexpr (kRegisters) {
        uint32_t ra[4];
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * w + g + 8 * (i % 2), column = step * 16 + 2 * (t + 4 * (i / 2));
          std::memcpy(&ra[i], a + row * A::K + column, 4);
        }
        wgmma<Element, N, kB>(sums, ra, B::operand(tile_b, step), step > 0);
      } else {
        wgmma<Element, N, kA, kB>(sums, A::operand(tile_a, step), B::operand(tile_b, step), step > 0);
      }
    }
    if (without != kCommit) wgmma_commit();
    if (without != kWait) wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) {
      d[(16 * w + g + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * t + i % 2] = sums[i];
    }
    if (without == kWait) wgmma_wait<0>();
  });
}

// Stages that a producer warp fills and a consumer warp sums; without == kWait, the producer overruns the consumer.
const char* ring(const float* x, int boxes, float* y, Omission without) {
  constexpr int kStages = 2, kBox = 8 * 128;
  const TensorMap map = make_tensor_map<float, 2>(x, {32, 8 * boxes}, {128}, {32, 8});
  return probe(64, kStages * (kBox + 16), [=](unsigned char* shared) {
    auto* full = reinterpret_cast<Barrier*>(shared + kStages * kBox);
    auto* empty = full + kStages;
    if (thread_index() == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + s, 1);
        barrier_init(empty + s, 32);
      }
      fence_barrier_init();
    }
    sync_threads();
    if (warp_index() == 0) {
      if (!elect_one()) return;
      for (int i = 0; i < boxes; ++i) {
        const int s = i % kStages, turn = i / kStages;
        if (without != kWait) barrier_wait(empty + s, (turn + 1) % 2);
        barrier_arrive_expect(full + s, kBox);
        tma_load(shared + s * kBox, map, full + s, 0, 8 * i);
      }
    } else {
      float sum = 0;
      for (int i = 0; i < boxes; ++i) {
        const int s = i % kStages, turn = i / kStages;
        if (without != kBarrier) barrier_wait(full + s, turn % 2);
        for (int row = 0; row < 8; ++row) {
          sum += reinterpret_cast<float*>(shared + s * kBox)[row * 32 + (lane_index() ^ row * 4)];
        }
        if (without != kCommit) barrier_arrive(empty + s);
      }
      y[lane_index()] = sum;
    }
  });
}

template <Major kA, Major kB>
const char* multiply_bf16(int n, bool registers, const bf16* a, const bf16* b, float* d, int without) {
  const auto omission = static_cast<Omission>(without);
  const auto run = [&]<int N>() {
    if constexpr (kA == Major::kK) {
      if (registers) return multiply<bf16, N, kA, kB, true>(a, b, d, omission);
    }
    return multiply<bf16, N, kA, kB, false>(a, b, d, omission);
  };
  switch (n) {
    case 8: return run.template operator()<8>();
    case 96: return run.template operator()<96>();
    default: return run.template operator()<256>();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* set_seed(uint64_t seed) {
  emulator::set_seed(seed);
  return nullptr;
}

const char* wgmma_bf16(
    int n, bool a_mn, bool b_mn, bool registers, const bf16* a, const bf16* b, float* d, int without) {
  constexpr Major kK = Major::kK, kMN = Major::kMN;
  const auto run = a_mn   ? b_mn ? &multiply_bf16<kMN, kMN> : &multiply_bf16<kMN, kK>
                   : b_mn ? &multiply_bf16<kK, kMN>
                          : &multiply_bf16<kK, kK>;
  return run(n, registers, a, b, d, without);
}
const char* wgmma_fp16(const fp16* a, const fp16* b, float* d) {
  return multiply<fp16, 192, Major::kK, Major::kMN, false>(a, b, d, kNothing);
}
const char* ring_of_stages(const float* x, int boxes, float* y, int without) {
  return ring(x, boxes, y, static_cast<Omission>(without));
}

// The box [2, 8, 32] of x [depth, rows, columns] at (c2, c1, c0), as it lies in shared memory.
const char* box(const fp16* x, int columns, int rows, int depth, int c0, int c1, int c2, fp16* y) {
  constexpr int kBox = 2 * 8 * 32;
  const int64_t row = columns * 2;
  const TensorMap map = make_tensor_map<fp16, 3>(x, {columns, rows, depth}, {row, row * rows}, {32, 8, 2});
  return probe(32, 2 * kBox + 8, [=](unsigned char* shared) {
    auto* barrier = reinterpret_cast<Barrier*>(shared + 2 * kBox);
    if (lane_index() == 0) {
      barrier_init(barrier, 1);
      fence_barrier_init();
      barrier_arrive_expect(barrier, 2 * kBox);
      tma_load(shared, map, barrier, c0, c1, c2);
    }
    sync_warp();
    barrier_wait(barrier, 0);
    for (int i = lane_index(); i < kBox; i += 32) y[i] = reinterpret_cast<fp16*>(shared)[i];
  });
}

// What the driver says of a map of 2-byte elements.
const char* encode(int64_t address, int64_t columns, int64_t stride, int box) {
  return failure_of(
      [=] { make_tensor_map<fp16, 2>(reinterpret_cast<const void*>(address), {columns, 4}, {stride}, {box, 4}); });
}

// ldmatrix of what stmatrix stored.
const char* there_and_back(const uint32_t* x, uint32_t* y) {
  return probe(32, 512, [=](unsigned char* shared) {
    uint32_t r[4], s[4];
    for (int i = 0; i < 4; ++i) r[i] = x[4 * lane_index() + i];
    stmatrix(shared + 16 * lane_index(), r);
    sync_warp();
    ldmatrix(s, shared + 16 * lane_index());
    for (int i = 0; i < 4; ++i) y[4 * lane_index() + i] = s[i];
  });
}
}
#pragma GCC visibility pop
