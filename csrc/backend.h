#pragma once
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace ercn {

// Kernels of ercn::* take `backend` to be complete without Python, whose table of backends comes before them where it
// is loaded: here it may name the library's own backend alone.
inline void check_backend(const std::string& backend, const char* own) {
  STD_TORCH_CHECK(
      backend.empty() || backend == own, "backend '", backend, "' needs ercn in Python; this library has '", own, "'");
}

}  // namespace ercn
