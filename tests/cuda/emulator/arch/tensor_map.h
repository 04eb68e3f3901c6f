// csrc/cuda/arch/tensor_map.h for the emulator, with the driver's rules.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <arch/elements.h>

namespace ercn::arch {

struct alignas(64) TensorMap {
  const unsigned char* address;
  int64_t sizes[3], strides[3];  // bytes
  int box[3];
  int rank, element_bytes;
};
static_assert(sizeof(TensorMap) == 128);

// The 128-byte swizzle of an offset in shared memory.
inline int64_t swizzled(int64_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

template <typename Element, int RANK>
TensorMap make_tensor_map(
    const void* address, const std::array<int64_t, RANK>& sizes, const std::array<int64_t, RANK - 1>& strides,
    const std::array<int, RANK>& box) {
  static_assert(RANK == 2 || RANK == 3);
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw std::runtime_error(std::string("tensor map: ") + rule);
  };
  TensorMap map{static_cast<const unsigned char*>(address), {1, 1, 1}, {}, {1, 1, 1}, RANK, sizeof(Element)};
  require(reinterpret_cast<uintptr_t>(address) % 16 == 0, "the address must be a multiple of 16");
  for (int i = 0; i < RANK; ++i) {
    require(sizes[i] >= 1 && sizes[i] <= int64_t{1} << 32, "sizes must be from 1 to 2^32");
    require(box[i] >= 1 && box[i] <= 256, "sides of the box must be from 1 to 256");
    map.sizes[i] = sizes[i], map.box[i] = box[i];
    map.strides[i] = i == 0 ? sizeof(Element) : strides[i - 1];
    if (i == 0) continue;
    require(
        map.strides[i] % 16 == 0 && map.strides[i] < int64_t{1} << 40, "strides must be multiples of 16 below 2^40");
  }
  const int row = box[0] * static_cast<int>(sizeof(Element));
  require(row % 16 == 0, "dimension 0 of the box must be a multiple of 16 bytes");
  require(row <= 128, "dimension 0 of the box must fit the swizzle");
  return map;
}

}  // namespace ercn::arch
