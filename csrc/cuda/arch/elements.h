// Element types as they lie in memory. Arithmetic is in fp32; convert.h goes between them.
#pragma once

#include <cstdint>

namespace ercn::arch {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// fp32 of which the tensor cores read the upper 19 bits.
struct tf32 {
  float value;
};

}  // namespace ercn::arch
