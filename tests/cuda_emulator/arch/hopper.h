// csrc/cuda/arch/hopper.h for the emulator. Copies happen when no thread can go on without them.
#pragma once

#include <arch/base.h>
#include <arch/tensor_map.h>

namespace ercn::arch {

// Not lane 0: the device promises no particular one.
ERCN_DEVICE bool elect_one() {
  sync_warp();
  return lane_index() == 13;
}

namespace detail {

struct Stmatrix {
  const uint32_t* r;
  void* row;
};

template <int N, bool TRANSPOSED>
void store_matrices(const char* instruction, void* row, const uint32_t (&r)[N]) {
  static_assert(N == 2 || N == 4);
  Stmatrix argument{r, row};
  emulator::meet(instruction, argument, [&](Stmatrix** lanes) {
    for (int i = 0; i < N; ++i) {
      uint16_t matrix[8][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        const uint32_t pair = lanes[lane]->r[i];
        (TRANSPOSED ? matrix[column][row] : matrix[row][column]) = static_cast<uint16_t>(pair);
        (TRANSPOSED ? matrix[column + 1][row] : matrix[row][column + 1]) = static_cast<uint16_t>(pair >> 16);
      }
      for (int j = 0; j < 8; ++j) {
        std::memcpy(emulator::in_shared(lanes[8 * i + j]->row, 16, 16, instruction), matrix[j], 16);
      }
    }
  });
}

}  // namespace detail

template <int N>
ERCN_DEVICE void stmatrix(void* row, const uint32_t (&r)[N]) {
  detail::store_matrices<N, false>("stmatrix", row, r);
}
template <int N>
ERCN_DEVICE void stmatrix_transposed(void* row, const uint32_t (&r)[N]) {
  detail::store_matrices<N, true>("stmatrix_transposed", row, r);
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

ERCN_DEVICE void fence_proxy_async() {
  emulator::Block& block = emulator::block();
  std::memcpy(block.async_view.data(), block.shared, block.shared_bytes);
}

ERCN_DEVICE void prefetch_tensor_map(const TensorMap&) {}

namespace detail {

// Calls visit(offset within the box as it is stored, address or nullptr outside the tensor) for every 16 bytes.
template <typename Visit>
void for_each_element(const TensorMap& map, const std::array<int, 3>& at, int64_t first, const Visit& visit) {
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
        visit(swizzled(first + linear, map.swizzle) - first, address);
      }
    }
  }
}

inline int box_bytes(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * map.element_bytes; }

inline void load_box(void* shared, const TensorMap& map, Barrier* barrier, int rank, std::array<int, 3> at) {
  if (rank != map.rank) emulator::fail("tma_load: the map has another rank");
  unsigned char* to = emulator::in_shared(shared, box_bytes(map), 128, "tma_load");
  const int64_t first = to - emulator::block().shared;
  emulator::transfer(to, box_bytes(map), emulator::mbarrier(barrier, "tma_load"), [=](unsigned char* data) {
    for_each_element(map, at, first, [&](int64_t offset, const unsigned char* address) {
      if (address) std::memcpy(data + offset, address, map.element_bytes);
      else std::memset(data + offset, 0, map.element_bytes);
    });
  });
}

inline void store_box(const TensorMap& map, const void* shared, int rank, std::array<int, 3> at) {
  if (rank != map.rank) emulator::fail("tma_store: the map has another rank");
  const int64_t first = emulator::in_shared(shared, box_bytes(map), 128, "tma_store") - emulator::block().shared;
  const unsigned char* from = emulator::block().async_view.data() + first;
  emulator::thread().stores.push_back([=] {
    for_each_element(map, at, first, [&](int64_t offset, const unsigned char* address) {
      if (address) std::memcpy(const_cast<unsigned char*>(address), from + offset, map.element_bytes);
    });
  });
}

}  // namespace detail

ERCN_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1) {
  detail::load_box(shared, map, barrier, 2, {c0, c1, 0});
}
ERCN_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2) {
  detail::load_box(shared, map, barrier, 3, {c0, c1, c2});
}
ERCN_DEVICE void tma_store(const TensorMap& map, const void* shared, int c0, int c1) {
  detail::store_box(map, shared, 2, {c0, c1, 0});
}
ERCN_DEVICE void tma_store(const TensorMap& map, const void* shared, int c0, int c1, int c2) {
  detail::store_box(map, shared, 3, {c0, c1, c2});
}

ERCN_DEVICE void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("bulk_load: size and source must be multiples of 16");
  }
  emulator::transfer(
      emulator::in_shared(shared, bytes, 16, "bulk_load"), bytes, emulator::mbarrier(barrier, "bulk_load"),
      [=](unsigned char* data) { std::memcpy(data, global, bytes); });
}

ERCN_DEVICE void tma_store_commit() {
  emulator::Thread& self = emulator::thread();
  self.store_groups.push_back(std::move(self.stores));
  self.stores.clear();
}
template <int N>
ERCN_DEVICE void tma_store_wait() {
  std::vector<std::vector<emulator::Action>>& groups = emulator::thread().store_groups;
  while (static_cast<int>(groups.size()) > N) {
    for (const emulator::Action& store : groups.front()) store();
    groups.erase(groups.begin());
  }
}

}  // namespace ercn::arch
