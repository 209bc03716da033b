// Tensor cores and asynchronous copies: mma.m16n8k16, ldmatrix and cp.async, sm_80 and later. A group of four lanes holds
// rows lane / 4 and lane / 4 + 8 of an accumulator, columns lane % 4 * 2 and the next. Under g++ the same words mean
// emulated_fragments.h.
#pragma once

#include "../scalars.h"
#include "simt.cuh"

#ifndef __CUDACC__
#include "emulated_fragments.h"
#else

namespace dflash_ray {

// c [16, 8] += a [16, 16] times b [16, 8].
template <class T>
DFLASH_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
DFLASH_DEVICE void multiply_add<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DFLASH_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8, of which lane l names the place of row l % 8 of matrix l / 8.
template <bool kTransposed, class T>
DFLASH_DEVICE void load_matrices(T* array, int at, uint32_t (&to)[4]) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(array + at));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// Rounded to the nearest, ties to even.
template <class T>
DFLASH_DEVICE uint32_t pack(float low, float high);

template <>
DFLASH_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
DFLASH_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Sixteen bytes from 16-byte aligned memory to a 16-byte aligned place; there after the next wait and barrier.
template <class T>
DFLASH_DEVICE void copy_async(T* array, int at, const T* from) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(array + at));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DFLASH_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace dflash_ray
#endif
