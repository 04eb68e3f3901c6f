#pragma once
// The kernels of this library, and how each was launched last: what `ercn bench` prints and tests look at.
#include <cstddef>
#include <cstdint>
#include <string>
#include <typeinfo>
#include <vector>

namespace ercn {

struct KernelRecord {
  std::string name;       // the type that defines it
  const void* function;   // its __global__ function, null in the emulator
  int threads = 0;        // of the last launch, as is
  size_t shared = 0;      // its dynamic shared memory in bytes
  int64_t launches = 0;
};

// All of them, in the order in which the library's files were initialised.
std::vector<KernelRecord*>& kernel_records();

// "int" for typeid(int).name() and so on
std::string type_name(const std::type_info& type);

// A static member of a kernel's launcher: it registers the kernel when the library is loaded.
struct RegisteredKernel : KernelRecord {
  RegisteredKernel(const std::type_info& type, const void* entry) : KernelRecord{type_name(type), entry} {
    kernel_records().push_back(this);
  }
};

}  // namespace ercn
