// Vectors of floats as wide as the processor's registers, and what plain loops over them lack.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace dflash_ray {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Lanes load(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline void store(float* at, const Lanes& lanes) { *reinterpret_cast<Lanes*>(at) = lanes; }

// Sum of all lanes, in a tree: the order never depends on anything but kLanes.
inline float sum(const Lanes& lanes) {
  float part[kLanes];
  store(part, lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

inline float dot(const float* a, const float* b, int64_t size) {
  Lanes first{}, second{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    first += load(a + i) * load(b + i);
    second += load(a + i + kLanes) * load(b + i + kLanes);
  }
  float total = sum(first + second);
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

// exp(x) for x <= 0 with a relative error below 2^-22; 0 below the range of normal floats. Branch-free, so that loops
// over it become vector code. Range reduction and polynomial after Cephes' expf.
inline float exp_of_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace dflash_ray
