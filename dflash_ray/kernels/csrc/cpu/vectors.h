// Vectors of floats as wide as the processor's registers.
#pragma once

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace dflash_ray {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Lanes load(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline void store(float* at, const Lanes& lanes) { *reinterpret_cast<Lanes*>(at) = lanes; }

// Doubles in as many bytes as Lanes have, and the halves of Lanes as such.
typedef double WideLanes __attribute__((vector_size(kLanes * sizeof(float))));

#ifdef __AVX512F__
inline WideLanes first_half(const Lanes& lanes) {
  return __builtin_convertvector(__builtin_shufflevector(lanes, lanes, 0, 1, 2, 3, 4, 5, 6, 7), WideLanes);
}
inline WideLanes second_half(const Lanes& lanes) {
  return __builtin_convertvector(__builtin_shufflevector(lanes, lanes, 8, 9, 10, 11, 12, 13, 14, 15), WideLanes);
}
#else
inline WideLanes first_half(const Lanes& lanes) {
  return __builtin_convertvector(__builtin_shufflevector(lanes, lanes, 0, 1, 2, 3), WideLanes);
}
inline WideLanes second_half(const Lanes& lanes) {
  return __builtin_convertvector(__builtin_shufflevector(lanes, lanes, 4, 5, 6, 7), WideLanes);
}
#endif

// Joins all lanes in a tree: the order never depends on anything but kLanes.
template <class Join>
float fold(const Lanes& lanes, const Join& join) {
  float part[kLanes];
  store(part, lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] = join(part[i], part[i + width]);
  }
  return part[0];
}

inline float sum(const Lanes& lanes) {
  return fold(lanes, [](float a, float b) { return a + b; });
}

inline float largest(const Lanes& lanes) {
  return fold(lanes, [](float a, float b) { return a > b ? a : b; });
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

// Packs those of kLanes values that lie within [low, high], and what belongs to them, to the front of `values` and
// `others`, which have room for all; returns their number.
#if defined(__AVX512F__)
inline int pack_within(const float* from, const float* other, float low, float high, float* values, float* others) {
  const __m512 value = _mm512_loadu_ps(from);
  const __mmask16 is_in = _mm512_cmp_ps_mask(value, _mm512_set1_ps(low), _CMP_GE_OQ) &
                          _mm512_cmp_ps_mask(value, _mm512_set1_ps(high), _CMP_LE_OQ);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(is_in, value));
  _mm512_storeu_ps(others, _mm512_maskz_compress_ps(is_in, _mm512_loadu_ps(other)));
  return __builtin_popcount(is_in);
}
#elif defined(__AVX2__)
// For each set of lanes, their numbers in order.
struct LanesOfMasks {
  int32_t lanes[1 << kLanes][kLanes]{};

  constexpr LanesOfMasks() {
    for (int mask = 0; mask < 1 << kLanes; ++mask) {
      for (int lane = 0, next = 0; lane < kLanes; ++lane) {
        if (mask >> lane & 1) lanes[mask][next++] = lane;
      }
    }
  }
};

alignas(32) inline constexpr LanesOfMasks kLanesOfMasks;

inline int pack_within(const float* from, const float* other, float low, float high, float* values, float* others) {
  const __m256 value = _mm256_loadu_ps(from);
  const __m256 is_in = _mm256_and_ps(_mm256_cmp_ps(value, _mm256_set1_ps(low), _CMP_GE_OQ),
                                     _mm256_cmp_ps(value, _mm256_set1_ps(high), _CMP_LE_OQ));
  const int mask = _mm256_movemask_ps(is_in);
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanesOfMasks.lanes[mask]));
  _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(value, order));
  _mm256_storeu_ps(others, _mm256_permutevar8x32_ps(_mm256_loadu_ps(other), order));
  return __builtin_popcount(mask);
}
#else
inline int pack_within(const float* from, const float* other, float low, float high, float* values, float* others) {
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    values[count] = from[lane];
    others[count] = other[lane];
    count += (from[lane] >= low) & (from[lane] <= high);
  }
  return count;
}
#endif

}  // namespace dflash_ray
