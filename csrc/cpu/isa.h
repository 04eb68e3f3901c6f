#pragma once

namespace ercn {

// Instruction sets that the processor has and whose registers the operating system saves.
struct CpuFeatures {
  bool avx = false, avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512dq = false, avx512bw = false, avx512vl = false;
  bool avx512_vnni = false, avx512_bf16 = false, avx512_fp16 = false;
  // The kernel lets a process use AMX only after arch_prctl(ARCH_REQ_XCOMP_PERM).
  bool amx_tile = false, amx_int8 = false, amx_bf16 = false;
  bool neon = false;
};
const CpuFeatures& cpu_features();

// What the kernels are compiled for; each has its own translation unit, kernels_<name>.cpp.
enum class Isa { portable, avx2, avx512, avx512_bf16 };
constexpr Isa kAllIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

// The best that this machine has, or the one that ERCN_CPU_ISA names (for tests; read at every call).
// Throws std::runtime_error if that is unknown or this machine lacks it.
Isa isa();
Isa best_isa();
const char* isa_name(Isa isa);

}  // namespace ercn
