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

typedef int32_t LaneBits __attribute__((vector_size(kLanes * sizeof(int32_t))));  // of comparisons: all or none

inline Lanes load(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline void store(float* at, const Lanes& lanes) { *reinterpret_cast<Lanes*>(at) = lanes; }

// The same value, which the compiler must not load once more for every use.
[[gnu::always_inline]] inline Lanes in_register(Lanes lanes) {
#if defined(__x86_64__)
  asm("" : "+v"(lanes));
#endif
  return lanes;
}

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
float fold(Lanes lanes, const Join& join) {
#ifdef __AVX512F__
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7, 0, 1, 2, 3));
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1, 6, 7, 4, 5));
  lanes = join(lanes, __builtin_shufflevector(lanes, lanes, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
  return lanes[0];
}

inline float sum(const Lanes& lanes) {
  return fold(lanes, [](const Lanes& a, const Lanes& b) { return a + b; });
}

inline float largest(const Lanes& lanes) {
  return fold(lanes, [](const Lanes& a, const Lanes& b) { return a > b ? a : b; });
}

inline bool any(const LaneBits& bits) {
  int32_t joined = 0;
  for (int i = 0; i < kLanes; ++i) joined |= bits[i];
  return joined != 0;
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

// One bit for each of kLanes values that is at least `low`.
inline uint32_t reaching(const Lanes& lanes, float low) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)lanes, _mm512_set1_ps(low), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)lanes, _mm256_set1_ps(low), _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(lanes[lane] >= low) << lane;
  return bits;
#endif
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
