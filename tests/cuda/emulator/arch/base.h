// csrc/cuda/arch/base.h for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <arch/elements.h>
#include <arch/host_device.h>

#include "emulator.h"

#define ERCN_DEVICE inline

namespace ercn::arch {

using std::isnan;

struct Grid {
  int x, y = 1, z = 1;
};

ERCN_DEVICE int thread_index() { return emulator::thread().index; }
ERCN_DEVICE int lane_index() { return thread_index() % 32; }
ERCN_DEVICE int warp_index() { return thread_index() / 32; }
ERCN_DEVICE int uniform_warp_index() {
  int nothing = 0;
  emulator::meet("uniform_warp_index", nothing, [](int**) {});
  return thread_index() / 32;
}
ERCN_DEVICE Grid block_index() {
  const emulator::Coordinates& at = emulator::block().index;
  return {at.x, at.y, at.z};
}
ERCN_DEVICE Grid grid_blocks() {
  const emulator::Coordinates& grid = emulator::block().grid;
  return {grid.x, grid.y, grid.z};
}

ERCN_DEVICE void sync_threads() { emulator::barrier(0, static_cast<int>(emulator::block().threads.size())); }
ERCN_DEVICE void sync_warp() {
  int nothing = 0;
  emulator::meet("sync_warp", nothing, [](int**) {});
}
ERCN_DEVICE void named_barrier(int barrier, int threads) { emulator::barrier(barrier, threads); }

template <typename T>
ERCN_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  struct Shuffle {
    T value, result;
    int from;
  } argument{value, value, lane_index() ^ mask};
  emulator::meet("shuffle_xor", argument, [](Shuffle** lanes) {
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = lanes[lanes[lane]->from]->value;
  });
  return argument.result;
}

ERCN_DEVICE uint32_t ballot(bool predicate) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } vote{predicate, 0};
  emulator::meet("ballot", vote, [](Vote** lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<uint32_t>(lanes[lane]->predicate) << lane;
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = all;
  });
  return vote.result;
}

ERCN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(emulator::in_shared(pointer, 0, 1, "shared_address") - emulator::block().shared);
}

struct alignas(16) Vector16 {
  uint32_t words[4];
};
ERCN_DEVICE Vector16 load_16(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) emulator::fail("load_16: the address is not a multiple of 16");
  Vector16 v;
  std::memcpy(&v, pointer, sizeof v);
  return v;
}
ERCN_DEVICE void store_16(void* pointer, const Vector16& v) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) emulator::fail("store_16: the address is not a multiple of 16");
  std::memcpy(pointer, &v, sizeof v);
}

}  // namespace ercn::arch
