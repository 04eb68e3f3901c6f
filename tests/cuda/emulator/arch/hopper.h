// csrc/cuda/arch/hopper.h for the emulator. TMA copies when no thread can continue without it.
#pragma once

#include <arch/base.h>
#include <arch/tensor_map.h>

namespace ercn::arch {

// Not lane 0: the device may elect any.
ERCN_DEVICE bool elect_one() {
  sync_warp();
  return lane_index() == 13;
}

namespace detail {

struct Stmatrix {
  const uint32_t* r;
  void* row;
};

}  // namespace detail

ERCN_DEVICE void stmatrix(void* row, const uint32_t (&r)[4]) {
  detail::Stmatrix argument{r, row};
  emulator::meet("stmatrix", argument, [](detail::Stmatrix** lanes) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 8; ++j) {
        unsigned char* to = emulator::in_shared(lanes[8 * i + j]->row, 16, 16, "stmatrix");
        for (int k = 0; k < 4; ++k) std::memcpy(to + 4 * k, &lanes[4 * j + k]->r[i], 4);
      }
    }
  });
}

template <int REGISTERS>
ERCN_DEVICE void raise_registers() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  sync_warp();
}
template <int REGISTERS>
ERCN_DEVICE void lower_registers() {
  raise_registers<REGISTERS>();
}

struct alignas(8) Barrier {
  uint64_t state;
};

ERCN_DEVICE void barrier_init(Barrier* barrier, int count) {
  const ptrdiff_t offset = emulator::in_shared(barrier, 8, 8, "barrier_init") - emulator::block().shared;
  if (count < 1) emulator::fail("barrier_init: the count must be positive");
  emulator::block().mbarriers[offset] = {count, count, 0, 0, false, {}};
}
ERCN_DEVICE void fence_barrier_init() {
  for (auto& [offset, barrier] : emulator::block().mbarriers) barrier.fenced = true;
}

ERCN_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes) {
  emulator::Mbarrier& state = emulator::mbarrier(barrier, "barrier_arrive");
  if (state.pending == 0) {
    emulator::fail("barrier_arrive: more arrivals than the barrier counts, before its bytes have come");
  }
  state.bytes += bytes;
  --state.pending;
  emulator::mbarrier_advance(state);
}
ERCN_DEVICE void barrier_arrive(Barrier* barrier) { barrier_arrive_expect(barrier, 0); }

ERCN_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  emulator::Mbarrier& state = emulator::mbarrier(barrier, "barrier_wait");
  while (state.phase % 2 == parity) {
    state.waiting.push_back(&emulator::thread());
    emulator::wait(
        "parity " + std::to_string(parity) + " of the mbarrier at offset " +
        std::to_string(reinterpret_cast<unsigned char*>(barrier) - emulator::block().shared));
  }
}

// Covers all threads' stores: a writer without a fence of its own goes unnoticed.
ERCN_DEVICE void fence_proxy_async() {
  emulator::Block& block = emulator::block();
  std::memcpy(block.async_view.data(), block.shared, block.shared_bytes);
}

namespace detail {

inline void load_box(void* shared, const TensorMap& map, Barrier* barrier, int rank, std::array<int, 3> at) {
  if (rank != map.rank) emulator::fail("tma_load: the map has another rank");
  const int bytes = map.box[0] * map.box[1] * map.box[2] * map.element_bytes;
  unsigned char* to = emulator::in_shared(shared, bytes, 128, "tma_load");
  const int64_t first = to - emulator::block().shared;
  emulator::transfer(to, bytes, emulator::mbarrier(barrier, "tma_load"), [=](unsigned char* data) {
    int64_t linear = 0;
    for (int z = 0; z < map.box[2]; ++z) {
      for (int y = 0; y < map.box[1]; ++y) {
        for (int x = 0; x < map.box[0]; ++x, linear += map.element_bytes) {
          const int64_t c[3] = {int64_t{at[0]} + x, int64_t{at[1]} + y, int64_t{at[2]} + z};
          const unsigned char* address = map.address;
          for (int i = 0; i < 3; ++i) {
            if (address && (c[i] < 0 || c[i] >= map.sizes[i])) address = nullptr;
            if (address) address += c[i] * map.strides[i];
          }
          unsigned char* element = data + swizzled(first + linear) - first;
          address ? std::memcpy(element, address, map.element_bytes) : std::memset(element, 0, map.element_bytes);
        }
      }
    }
  });
}

}  // namespace detail

ERCN_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1) {
  detail::load_box(shared, map, barrier, 2, {c0, c1, 0});
}
ERCN_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2) {
  detail::load_box(shared, map, barrier, 3, {c0, c1, c2});
}

}  // namespace ercn::arch
