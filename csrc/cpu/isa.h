#pragma once
#include <utility>
#include <vector>

namespace ercn {

// Instruction sets, and whether the processor has them and the operating system saves their registers. The kernel lets
// a process use AMX only after arch_prctl(ARCH_REQ_XCOMP_PERM).
using CpuFeatures = std::vector<std::pair<const char*, bool>>;
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
