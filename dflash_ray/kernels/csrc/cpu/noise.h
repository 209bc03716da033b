// The noise of 64 tokens at once, and which tokens need it.
#pragma once

#include <algorithm>
#include <iterator>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../verify_core.cuh"

namespace dflash_ray {

constexpr int64_t kBlock = 64;  // tokens whose noise is drawn together: 16 counters of 4 words

// Philox over the 16 counters of a block, two products of 32-bit words a round.
#if defined(__AVX512F__)
struct Counters {
  __m512i at;

  static Counters all(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
  static Counters from(uint32_t value) {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_add_epi32(all(value).at, steps)};
  }
  Counters operator^(Counters other) const { return {_mm512_xor_si512(at, other.at)}; }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    const __m512i by = _mm512_set1_epi64(factor);
    const __m512i even = _mm512_mul_epu32(at, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(at, 32), by);
    high.at = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low.at = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  void store(uint32_t* to) const { _mm512_storeu_si512(to, at); }
};
#elif defined(__AVX2__)
// A counter is the low half of 64 bits: a product's two words then need no sorting, as products ignore high halves.
struct Counters {
  static constexpr int kVectors = kBlock / 16;
  __m256i at[kVectors];

  template <class Work>
  static Counters each(const Work& work) {
    Counters counters;
    for (int i = 0; i < kVectors; ++i) counters.at[i] = work(i);
    return counters;
  }
  static Counters all(uint32_t value) {
    return each([&](int) { return _mm256_set1_epi64x(value); });
  }
  static Counters from(uint32_t value) {
    const __m256i steps = _mm256_set_epi64x(3, 2, 1, 0);
    return each([&](int i) { return _mm256_add_epi32(_mm256_set1_epi64x(value + 4 * i), steps); });
  }
  Counters operator^(const Counters& other) const {
    return each([&](int i) { return _mm256_xor_si256(at[i], other.at[i]); });
  }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    const __m256i by = _mm256_set1_epi64x(factor);
    low = each([&](int i) { return _mm256_mul_epu32(at[i], by); });
    high = each([&](int i) { return _mm256_srli_epi64(low.at[i], 32); });
  }
  void store(uint32_t* to) const {
    for (int i = 0; i < kVectors; i += 2) {
      const __m256 low = _mm256_shuffle_ps(_mm256_castsi256_ps(at[i]), _mm256_castsi256_ps(at[i + 1]), 0x88);
      const __m256i sorted = _mm256_permute4x64_epi64(_mm256_castps_si256(low), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * i), sorted);
    }
  }
};
#else
struct Counters {
  uint32_t at[kBlock / 4];

  static Counters all(uint32_t value) {
    Counters counters;
    std::fill_n(counters.at, kBlock / 4, value);
    return counters;
  }
  static Counters from(uint32_t value) {
    Counters counters;
    for (uint32_t i = 0; i < kBlock / 4; ++i) counters.at[i] = value + i;
    return counters;
  }
  Counters operator^(Counters other) const {
    for (int i = 0; i < kBlock / 4; ++i) other.at[i] ^= at[i];
    return other;
  }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    for (int i = 0; i < kBlock / 4; ++i) {
      const uint64_t product = uint64_t{factor} * at[i];
      high.at[i] = static_cast<uint32_t>(product >> 32);
      low.at[i] = static_cast<uint32_t>(product);
    }
  }
  void store(uint32_t* to) const { std::copy_n(at, kBlock / 4, to); }
};
#endif

// The noise of a block's tokens: words[w][c] belongs to token first_token + 4 c + w. Returns the largest word.
inline uint32_t block_words(const RowDraw& draw, int64_t first_token, uint32_t (&words)[4][kBlock / 4]) {
  const uint64_t at = static_cast<uint64_t>(draw.position), key = static_cast<uint64_t>(draw.seed);
  Counters c0 = Counters::all(static_cast<uint32_t>(at)), c1 = Counters::all(static_cast<uint32_t>(at >> 32));
  Counters c2 = Counters::from(static_cast<uint32_t>(first_token >> 2));
  Counters c3 = Counters::all(static_cast<uint32_t>(draw.purpose));
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Counters high0, low0, high1, low1;
    c0.multiply(0xD2511F53u, high0, low0);
    c2.multiply(0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ Counters::all(k0);
    c1 = low1;
    c2 = high0 ^ c3 ^ Counters::all(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  c0.store(words[0]);
  c1.store(words[1]);
  c2.store(words[2]);
  c3.store(words[3]);
  uint32_t largest[kBlock / 4];
  std::copy_n(words[0], kBlock / 4, largest);
  for (int w = 1; w < 4; ++w) {
    for (int c = 0; c < kBlock / 4; ++c) largest[c] = std::max(largest[c], words[w][c]);
  }
  for (int width = kBlock / 8; width > 0; width /= 2) {
    for (int c = 0; c < width; ++c) largest[c] = std::max(largest[c], largest[c + width]);
  }
  return largest[0];
}

// word_that_may_reach for gaps in steps of 1/16, rounded towards smaller words.
struct NeededWords {
  static constexpr int kSteps = 16;
  uint32_t words[static_cast<int>(kMaxGumbel * kSteps) + 1];

  NeededWords() {
    for (size_t i = 0; i < std::size(words); ++i) words[i] = word_that_may_reach(static_cast<float>(i) / kSteps);
  }
  uint32_t operator()(double gap) const {
    if (gap > kMaxGumbel) return kNoWord;
    return gap <= 0 ? 0 : words[static_cast<int>(gap * kSteps)];
  }
};

inline const NeededWords needed_words;

}  // namespace dflash_ray
