#pragma once
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace ercn {

// The operators ercn::* take `backend`. In Python a table of backends handles it first; without Python only the
// library's own backend can be named.
inline void check_backend(const std::string& backend, const char* own) {
  STD_TORCH_CHECK(
      backend.empty() || backend == own, "backend '", backend, "' needs ercn in Python; this library has '", own, "'");
}

}  // namespace ercn
