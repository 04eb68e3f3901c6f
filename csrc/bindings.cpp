// The Python module ercn._C: what was built and what this processor can do. It includes no torch header; the operators
// of the same library register themselves through the LibTorch stable ABI when it is loaded.
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "cpu/features.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

#define ERCN_STRING_(...) #__VA_ARGS__
#define ERCN_STRING(...) ERCN_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace {

py::dict build_info() {
  constexpr uint64_t target = TORCH_TARGET_VERSION;  // 0xMMmm…: major and minor in the two highest bytes
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "GCC " __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "MSVC " ERCN_STRING(_MSC_VER);
#endif
  info["cpp_standard"] = static_cast<int64_t>(__cplusplus);
  info["flags"] = ERCN_STRING(ERCN_FLAGS);
#if defined(NDEBUG)
  info["build_type"] = "release";
#else
  info["build_type"] = "debug";
#endif
  info["torch_target_version"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  info["pybind11"] = ERCN_STRING(PYBIND11_VERSION_MAJOR) "." ERCN_STRING(PYBIND11_VERSION_MINOR)
      "." ERCN_STRING(PYBIND11_VERSION_MICRO);
  return info;
}

py::dict cpu_features() {
  const ercn::CpuFeatures& found = ercn::cpu_features();
  py::dict features;
#if defined(__x86_64__) || defined(__i386__)
  features["avx"] = found.avx;
  features["avx2"] = found.avx2;
  features["fma"] = found.fma;
  features["f16c"] = found.f16c;
  features["avx512f"] = found.avx512f;
  features["avx512dq"] = found.avx512dq;
  features["avx512bw"] = found.avx512bw;
  features["avx512vl"] = found.avx512vl;
  features["avx512_vnni"] = found.avx512_vnni;
  features["avx512_bf16"] = found.avx512_bf16;
  features["avx512_fp16"] = found.avx512_fp16;
  features["amx_tile"] = found.amx_tile;
  features["amx_int8"] = found.amx_int8;
  features["amx_bf16"] = found.amx_bf16;
#else
  features["neon"] = found.neon;
#endif
  return features;
}

py::list cpu_isas() {
  py::list usable;
  for (const ercn::Isa isa : ercn::kAllIsas) {
    if (isa <= ercn::best_isa()) usable.append(ercn::isa_name(isa));
  }
  return usable;
}

// FLOP/s of one thread's multiply-adds.
double multiply_add_rate(const std::string& dtype, double seconds) {
  const ercn::Kernels& kernels = ercn::kernels(ercn::isa());
  const auto run = dtype == "bfloat16" && kernels.multiply_add_bf16 ? kernels.multiply_add_bf16
                   : dtype == "float64"                             ? kernels.multiply_add_double
                                                                    : kernels.multiply_add_float;
  const py::gil_scoped_release release;
  const auto begin = std::chrono::steady_clock::now();
  double flops = 0, elapsed = 0;
  while (elapsed < seconds) {
    flops += run(100'000);
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  return flops / elapsed;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of ercn; importing it also registers the operators torch.ops.ercn_native.*";
  m.def("build_info", &build_info, "Compiler, C++ standard, flags and the oldest torch that this library runs on.");
  m.def("cpu_features", &cpu_features, "Instruction sets usable on this machine (processor and operating system).");
  m.def(
      "multiply_add_rate", &multiply_add_rate, py::arg("dtype"), py::arg("seconds"),
      "FLOP/s that one thread reaches with independent multiply-adds in registers: the peak of its arithmetic units in "
      "float32, float64 or bfloat16 (float32's where there are no bfloat16 products). ERCN_CPU_ISA rules.");
  m.def("cpu_isas", &cpu_isas, "What the CPU kernels can run as here, the best last: values of ERCN_CPU_ISA.");
}
