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
  CpuFeatures found;
#if defined(__ARM_NEON)
  found.neon = true;
#endif
#if defined(__x86_64__) || defined(__i386__)
  const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1u) != 0; };
  uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr int kOsxsave = 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, kOsxsave)) return found;

  uint32_t xcr0 = 0, xcr0_high = 0;
  __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool ymm = (xcr0 & 0x6u) == 0x6u;            // xmm and upper halves of ymm
  const bool zmm = (xcr0 & 0xe6u) == 0xe6u;          // and opmask, upper halves of zmm0-15, zmm16-31
  const bool tiles = (xcr0 & 0x60000u) == 0x60000u;  // TILECFG and TILEDATA

  found.avx = ymm && bit(c, 28);
  found.fma = ymm && bit(c, 12);
  found.f16c = ymm && bit(c, 29);
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    const uint32_t last_subleaf = a;
    found.avx2 = ymm && bit(b, 5);
    found.avx512f = zmm && bit(b, 16);
    found.avx512dq = zmm && bit(b, 17);
    found.avx512bw = zmm && bit(b, 30);
    found.avx512vl = zmm && bit(b, 31);
    found.avx512_vnni = zmm && bit(c, 11);
    found.avx512_fp16 = zmm && bit(d, 23);
    found.amx_bf16 = tiles && bit(d, 22);
    found.amx_tile = tiles && bit(d, 24);
    found.amx_int8 = tiles && bit(d, 25);
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = zmm && bit(a, 5);
  }
#endif
  return found;
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
#if defined(__x86_64__)
  const CpuFeatures& has = cpu_features();
  if (!has.avx2 || !has.fma) return Isa::portable;
  if (!has.avx512f || !has.avx512bw || !has.avx512dq || !has.avx512vl) return Isa::avx2;
  return has.avx512_bf16 ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
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
