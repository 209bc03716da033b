// Vectors of floats as wide as the processor's registers.
#pragma once

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

}  // namespace dflash_ray
