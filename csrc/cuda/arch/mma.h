// Tensor-core products of a warp (sm_80), and loads of their fragments.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16" and "…k8"):
//   D, 16×8 fp32:            d[i] = D[g + 8 (i / 2), 2 t + i % 2]
//   A, 16×16 of 16 bits:     a[i] = A[g + 8 (i % 2), 2 t + 8 (i / 2) + {0, 1}]
//   B, 16×8 of 16 bits:      b[i] = B[2 t + 8 i + {0, 1}, g]
//   A, 16×8 of TF32:         a[i] = A[g + 8 (i % 2), t + 4 (i / 2)]
//   B, 8×8 of TF32:          b[i] = B[t + 4 i, g]
#pragma once

#include <arch/base.h>

namespace ercn::arch {

// d += A · B. K is 16 for bf16 and fp16, 8 for tf32.
template <typename Element>
ERCN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
ERCN_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
ERCN_DEVICE void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
ERCN_DEVICE void mma<tf32>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 4 matrices of 8 rows of 16 bytes from shared memory: lane 8 i + j gives the address of row j of matrix i, and
// r[i] of lane l becomes the 4 bytes at 4 (l % 4) of row l / 4 of matrix i.
ERCN_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed in 16-bit elements: r[i] of lane l becomes elements (2 (l % 4) + {0, 1}, l / 4) of matrix i.
ERCN_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace ercn::arch
