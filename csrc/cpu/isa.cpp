#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "features.h"

namespace ercn {

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

}  // namespace ercn
