// Rows of logits as floats, and the one pass over their memory.
#pragma once

#include <algorithm>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../scalars.h"
#include "vectors.h"

namespace dflash_ray {

constexpr int64_t kChunk = 256;  // tokens

// `count` values as floats: where they lie, or converted into `buffer`.
inline const float* floats_at(const float* from, int64_t, float*) { return from; }

inline const float* floats_at(const Bfloat16* from, int64_t count, float* buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

inline const float* floats_at(const Float16* from, int64_t count, float* buffer) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(bits));
  }
#endif
  for (; i < count; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

// The largest of `count` values; sets `has_nan` where one is not a number.
inline float maximum_of(const float* x, int64_t count, bool& has_nan) {
  Lanes best[2], nan[2]{};
  best[0] = best[1] = Lanes{} + kMinusInf;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      const Lanes value = load(x + i + j * kLanes);
      best[j] = value > best[j] ? value : best[j];
      nan[j] = value != value ? value : nan[j];
    }
  }
  float result = largest(best[0] > best[1] ? best[0] : best[1]);
  const float nans = sum(nan[0] + nan[1]);
  has_nan |= nans != nans;
  for (; i < count; ++i) {
    result = x[i] > result ? x[i] : result;
    has_nan |= x[i] != x[i];
  }
  return result;
}

// Maxima of a row's chunks, from the one pass over its memory.
struct Scan {
  std::vector<float> maxima;
  float maximum = kMinusInf;
  bool has_nan = false;

  template <class T>
  void run(const Row<T>& row) {
    float buffer[kChunk];
    maxima.clear();
    maximum = kMinusInf;
    has_nan = false;
    for (int64_t at = 0; at < row.size; at += kChunk) {
      const int64_t count = std::min(kChunk, row.size - at);
      maxima.push_back(maximum_of(floats_at(row.data + at, count, buffer), count, has_nan));
      maximum = std::max(maximum, maxima.back());
    }
  }

  bool is_bad() const { return has_nan || maximum == INFINITY; }

  int64_t chunk_of_maximum() const { return std::find(maxima.begin(), maxima.end(), maximum) - maxima.begin(); }
};

}  // namespace dflash_ray
