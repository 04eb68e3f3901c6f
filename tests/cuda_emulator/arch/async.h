// csrc/cuda/arch/async.h for the emulator: the target holds NaN from the copy until its wait.
#pragma once

#include <arch/base.h>

namespace ercn::arch {

template <int BYTES>
ERCN_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  unsigned char* to = emulator::in_shared(shared, BYTES, BYTES, "cp_async");
  if (valid && reinterpret_cast<uintptr_t>(global) % BYTES != 0) emulator::fail("cp_async: the source is not aligned");
  std::memset(to, emulator::kPoison, BYTES);
  emulator::thread().copies.push_back({to, valid ? static_cast<const unsigned char*>(global) : nullptr, BYTES});
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
      if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
      else std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace ercn::arch
