// What this processor has, and the kernels for it.
#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace ercn {
namespace {

CpuFeatures detect() {
#if defined(__x86_64__) || defined(__i386__)
  const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1u) != 0; };
  constexpr int kOsxsave = 27;
  uint32_t a = 0, b = 0, c = 0, d = 0, c1 = 0, b7 = 0, c7 = 0, d7 = 0, a7_1 = 0, xcr0 = 0, xcr0_high = 0;
  if (__get_cpuid(1, &a, &b, &c1, &d) && bit(c1, kOsxsave)) {
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    const bool leaf_7 = __get_cpuid_count(7, 0, &a, &b7, &c7, &d7);  // a: its last subleaf
    if (leaf_7 && a >= 1) __get_cpuid_count(7, 1, &a7_1, &b, &c, &d);
  }
  const bool ymm = (xcr0 & 0x6u) == 0x6u;            // xmm and upper halves of ymm
  const bool zmm = (xcr0 & 0xe6u) == 0xe6u;          // and opmask, upper halves of zmm0-15, zmm16-31
  const bool tiles = (xcr0 & 0x60000u) == 0x60000u;  // TILECFG and TILEDATA
  return {{"avx", ymm && bit(c1, 28)},         {"avx2", ymm && bit(b7, 5)},
          {"fma", ymm && bit(c1, 12)},         {"f16c", ymm && bit(c1, 29)},
          {"avx512f", zmm && bit(b7, 16)},     {"avx512dq", zmm && bit(b7, 17)},
          {"avx512bw", zmm && bit(b7, 30)},    {"avx512vl", zmm && bit(b7, 31)},
          {"avx512_vnni", zmm && bit(c7, 11)}, {"avx512_bf16", zmm && bit(a7_1, 5)},
          {"avx512_fp16", zmm && bit(d7, 23)}, {"amx_tile", tiles && bit(d7, 24)},
          {"amx_int8", tiles && bit(d7, 25)},  {"amx_bf16", tiles && bit(d7, 22)}};
#elif defined(__ARM_NEON)
  return {{"neon", true}};
#else
  return {{"neon", false}};
#endif
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    default: return "portable";
  }
}

Isa best_isa() {
  const auto has = [](const std::string& name) {
    for (const auto& [feature, present] : cpu_features()) {
      if (feature == name) return present;
    }
    return false;
  };
  if (!has("avx2") || !has("fma")) return Isa::portable;
  if (!has("avx512f") || !has("avx512bw") || !has("avx512dq") || !has("avx512vl")) return Isa::avx2;
  return has("avx512_bf16") ? Isa::avx512_bf16 : Isa::avx512;
}

Isa isa() {
  static const Isa best = best_isa();
  const char* name = std::getenv("ERCN_CPU_ISA");
  if (!name || !*name) return best;
  for (const Isa candidate : kAllIsas) {
    if (std::strcmp(name, isa_name(candidate)) != 0) continue;
    if (candidate > best) {
      throw std::runtime_error(std::string("ERCN_CPU_ISA is ") + name + "; this machine goes up to " + isa_name(best));
    }
    return candidate;
  }
  throw std::runtime_error(
      std::string("ERCN_CPU_ISA is '") + name + "'; there are portable, avx2, avx512, avx512_bf16");
}

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2::kernels();
    case Isa::avx512: return avx512::kernels();
    case Isa::avx512_bf16: return avx512_bf16::kernels();
#endif
    default: return portable::kernels();
  }
}

}  // namespace ercn
