#include "kernels.h"

namespace ercn {

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
