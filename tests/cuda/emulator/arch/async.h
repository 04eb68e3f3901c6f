// csrc/cuda/arch/async.h for the emulator. The target holds NaN from the copy until its wait.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

// Of 16 bytes, the first `bytes` are copied and the others are zero.
ERCN_DEVICE void cp_async(void* shared, const void* global, int bytes = 16) {
  unsigned char* to = emulator::in_shared(shared, 16, 16, "cp_async");
  if (bytes < 0 || bytes > 16) emulator::fail("cp_async: more bytes than it is wide");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("cp_async: the source is not aligned");
  std::memset(to, emulator::kPoison, 16);
  emulator::thread().copies.push_back({to, static_cast<const unsigned char*>(global), bytes});
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
      std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace ercn::arch
