#include "registry.h"

#include <cxxabi.h>

#include <cstdlib>
#include <memory>

namespace ercn {
namespace {

std::string type_name(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(type.name(), nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : type.name();
}

}  // namespace

KernelRecord::KernelRecord(const std::type_info& type, const void* entry) : name(type_name(type)), function(entry) {
  kernel_records().push_back(this);
}

std::vector<KernelRecord*>& kernel_records() {
  static std::vector<KernelRecord*> records;
  return records;
}

}  // namespace ercn
