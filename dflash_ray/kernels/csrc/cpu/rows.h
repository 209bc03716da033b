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

constexpr int64_t kBlock = 64;   // tokens that share a maximum, and whose noise is drawn together
constexpr int64_t kChunk = 256;  // tokens whose masses are computed together

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

// The largest of `count` values; `nans` gains bits where one is not a number.
inline float maximum_of(const float* x, int64_t count, LaneBits& nans) {
  Lanes best = Lanes{} + kMinusInf;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes value = load(x + i);
    best = value > best ? value : best;
    nans |= value != value;
  }
  float result = largest(best);
  for (; i < count; ++i) {
    result = x[i] > result ? x[i] : result;
    nans |= x[i] != x[i];
  }
  return result;
}

// Maxima of a row's blocks, from the one pass over its memory. Blocks begin at multiples of kBlock in the vocabulary,
// so that a shard's first one may be shorter.
struct Scan {
  std::vector<float> maxima;
  float maximum = kMinusInf;
  bool has_nan = false;

  template <class T>
  void run(const Row<T>& row) {
    size_ = row.size;
    skipped_ = row.start & (kBlock - 1);
    maxima.resize((skipped_ + size_ + kBlock - 1) / kBlock);
    maximum = kMinusInf;
    LaneBits nans{};
    float buffer[kBlock];
    for (int64_t block = 0; block < num_blocks(); ++block) {
      const int64_t tokens = count(block);
      maxima[block] = maximum_of(floats_at(row.data + begin(block), tokens, buffer), tokens, nans);
      maximum = std::max(maximum, maxima[block]);
    }
    has_nan = any(nans);
  }

  int64_t num_blocks() const { return static_cast<int64_t>(maxima.size()); }

  // A block's tokens, counted from the row's first.
  int64_t begin(int64_t block) const { return std::max<int64_t>(0, block * kBlock - skipped_); }
  int64_t end(int64_t block) const { return std::min(size_, (block + 1) * kBlock - skipped_); }
  int64_t count(int64_t block) const { return end(block) - begin(block); }

  // No token of [at, at + count) is larger.
  float highest(int64_t at, int64_t count) const {
    const auto first = maxima.begin() + (skipped_ + at) / kBlock;
    const auto last = maxima.begin() + (skipped_ + at + count - 1) / kBlock;
    return *std::max_element(first, last + 1);
  }

  bool is_bad() const { return has_nan || maximum == INFINITY; }

  int64_t block_of_maximum() const { return std::find(maxima.begin(), maxima.end(), maximum) - maxima.begin(); }

 private:
  int64_t size_ = 0, skipped_ = 0;
};

}  // namespace dflash_ray
