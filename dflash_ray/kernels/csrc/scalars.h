// Storage types of logits and their values as floats, the same on every device.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "verify_core.cuh"

namespace dflash_ray {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DFLASH_FN float to_float(float value) { return value; }

DFLASH_FN float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

DFLASH_FN float to_float(Float16 value) {
#ifdef __CUDACC__
  return __half2float(__half(__half_raw{value.bits}));
#else
  _Float16 out;
  memcpy(&out, &value.bits, sizeof out);
  return static_cast<float>(out);
#endif
}

DFLASH_FN void from_float(float value, float& out) { out = value; }

// To the nearest, ties to even.
DFLASH_FN void from_float(float value, Bfloat16& out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

DFLASH_FN void from_float(float value, Float16& out) {
#ifdef __CUDACC__
  out.bits = __half_raw(__float2half_rn(value)).x;
#else
  const _Float16 half = static_cast<_Float16>(value);
  memcpy(&out.bits, &half, sizeof out.bits);
#endif
}

// One row of a shard's logits, tokens start ... start + size - 1.
template <class T>
struct Row {
  T* data;
  int64_t size, start;

  DFLASH_FN bool has(int64_t token) const { return token >= start && token < start + size; }
  DFLASH_FN float at(int64_t index) const { return to_float(data[index]); }
  DFLASH_FN float get(int64_t token) const { return at(token - start); }
  DFLASH_FN void set(int64_t token, float value) { from_float(value, data[token - start]); }
};

}  // namespace dflash_ray
