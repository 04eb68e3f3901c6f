// The build and the processor: ercn_native::cpu_info and …::multiply_add_rate.
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "json.h"

namespace ercn {
namespace {

JsonObject build_info() {
  constexpr uint64_t target = TORCH_TARGET_VERSION;  // 0xMMmm…: major and minor in the two highest bytes
  JsonObject info;
#if defined(__clang__)
  info.add("compiler", "Clang " __clang_version__);
#elif defined(__GNUC__)
  info.add("compiler", "GCC " __VERSION__);
#elif defined(_MSC_VER)
  info.add("compiler", "MSVC " ERCN_STRING(_MSC_VER));
#endif
  info.add("cpp_standard", static_cast<int64_t>(__cplusplus));
  info.add("flags", ERCN_STRING(ERCN_FLAGS));
#if defined(NDEBUG)
  info.add("build_type", "release");
#else
  info.add("build_type", "debug");
#endif
  info.add("torch_target_version", std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff));
  return info;
}

JsonObject features_info() {
  JsonObject features;
  for (const auto& [name, present] : cpu_features()) features.add(name, present);
  return features;
}

std::string cpu_info() {
  JsonObject info;
  JsonList isas;  // the best last
  for (const Isa isa : kAllIsas) {
    if (isa <= best_isa()) isas.add_json(json(isa_name(isa)));
  }
  info.add_json("build", build_info().str());
  info.add_json("features", features_info().str());
  info.add_json("isas", isas.str());
  return info.str();
}

// FLOP/s of one thread's independent multiply-adds in registers: the peak of its arithmetic units in float32, float64
// or bfloat16 (float32's where there are no bfloat16 products), for the instruction set that ERCN_CPU_ISA names.
double multiply_add_rate(std::string dtype, double seconds) {
  const Kernels& k = kernels(isa());
  const auto run = dtype == "bfloat16" && k.multiply_add_bf16 ? k.multiply_add_bf16
                   : dtype == "float64"                       ? k.multiply_add_double
                                                              : k.multiply_add_float;
  const auto begin = std::chrono::steady_clock::now();
  double flops = 0, elapsed = 0;
  while (elapsed < seconds) {
    flops += run(100'000);
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  return flops / elapsed;
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_FRAGMENT(ercn_native, m) {
  m.def("cpu_info() -> str");
  m.def("multiply_add_rate(str dtype, float seconds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(ercn_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_info", TORCH_BOX(&ercn::cpu_info));
  m.impl("multiply_add_rate", TORCH_BOX(&ercn::multiply_add_rate));
}
