// csrc/cuda/arch/async.h for the emulator: the target holds NaN from the copy until its wait.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

namespace detail {

// `width` bytes, of which the first `bytes` are copied and the others are zero.
inline void copy(void* shared, const void* global, int width, int bytes) {
  unsigned char* to = emulator::in_shared(shared, width, width, "cp_async");
  if (bytes < 0 || bytes > width) emulator::fail("cp_async: more bytes than it is wide");
  if (reinterpret_cast<uintptr_t>(global) % width != 0) emulator::fail("cp_async: the source is not aligned");
  std::memset(to, emulator::kPoison, width);
  emulator::thread().copies.push_back({to, static_cast<const unsigned char*>(global), bytes, width});
}

}  // namespace detail

template <int BYTES>
ERCN_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  detail::copy(shared, global, BYTES, valid ? BYTES : 0);
}
ERCN_DEVICE void cp_async_first(void* shared, const void* global, int bytes) {
  detail::copy(shared, global, 16, bytes);
}

ERCN_DEVICE void cp_async_commit() {
  emulator::Thread& self = emulator::thread();
  self.copy_groups.push_back(std::move(self.copies));
  self.copies.clear();
}

template <int N>
ERCN_DEVICE void cp_async_wait() {
  std::vector<std::vector<emulator::Copy>>& groups = emulator::thread().copy_groups;
  while (static_cast<int>(groups.size()) > N) {
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, copy.width - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace ercn::arch
