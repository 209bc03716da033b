// The noise of 16 groups of four tokens at once, and which tokens need it.
#pragma once

#include <algorithm>
#include <iterator>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../verify_core.cuh"
#include "rows.h"

namespace dflash_ray {

constexpr int kGroups = kBlock / 4;  // that are drawn together: the four words of a counter go to one group

// As many of Philox's counters as stay in registers, two products of 32-bit words a round.
#if defined(__AVX512F__)
struct Counters {
  static constexpr int kSize = 16;
  __m512i at;

  static Counters all(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
  static Counters from(const uint32_t* values) { return {_mm512_loadu_si512(values)}; }
  Counters operator^(Counters other) const { return {_mm512_xor_si512(at, other.at)}; }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    const __m512i by = _mm512_set1_epi64(factor);
    const __m512i even = _mm512_mul_epu32(at, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(at, 32), by);
    high.at = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low.at = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  Counters larger(Counters other) const { return {_mm512_max_epu32(at, other.at)}; }
  void store(uint32_t* to) const { _mm512_storeu_si512(to, at); }
};
#elif defined(__AVX2__)
// A counter is the low half of 64 bits, so that a product's two words need no sorting; high halves hold anything.
struct Counters {
  static constexpr int kSize = 8;
  __m256i first, second;

  static Counters all(uint32_t value) {
    const __m256i same = _mm256_set1_epi32(static_cast<int>(value));
    return {same, same};
  }
  static Counters from(const uint32_t* values) {
    const __m128i* at = reinterpret_cast<const __m128i*>(values);
    return {_mm256_cvtepu32_epi64(_mm_loadu_si128(at)), _mm256_cvtepu32_epi64(_mm_loadu_si128(at + 1))};
  }
  Counters operator^(Counters other) const {
    return {_mm256_xor_si256(first, other.first), _mm256_xor_si256(second, other.second)};
  }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    const __m256i by = _mm256_set1_epi64x(factor);
    low = {_mm256_mul_epu32(first, by), _mm256_mul_epu32(second, by)};
    high = {_mm256_srli_epi64(low.first, 32), _mm256_srli_epi64(low.second, 32)};
  }
  Counters larger(Counters other) const {
    return {_mm256_max_epu32(first, other.first), _mm256_max_epu32(second, other.second)};
  }
  void store(uint32_t* to) const {
    const __m256 low = _mm256_shuffle_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second), 0x88);
    const __m256i sorted = _mm256_permute4x64_epi64(_mm256_castps_si256(low), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sorted);
  }
};
#else
struct Counters {
  static constexpr int kSize = 4;
  uint32_t at[kSize];

  static Counters all(uint32_t value) { return {value, value, value, value}; }
  static Counters from(const uint32_t* values) { return {values[0], values[1], values[2], values[3]}; }
  Counters operator^(Counters other) const {
    for (int i = 0; i < kSize; ++i) other.at[i] ^= at[i];
    return other;
  }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    for (int i = 0; i < kSize; ++i) {
      const uint64_t product = uint64_t{factor} * at[i];
      high.at[i] = static_cast<uint32_t>(product >> 32);
      low.at[i] = static_cast<uint32_t>(product);
    }
  }
  Counters larger(Counters other) const {
    for (int i = 0; i < kSize; ++i) other.at[i] = std::max(at[i], other.at[i]);
    return other;
  }
  void store(uint32_t* to) const { std::copy_n(at, kSize, to); }
};
#endif

// What the groups of a row have in common.
struct RowNoise {
  static constexpr int kRounds = 10;
  uint32_t position_low, position_high, purpose, keys[kRounds][2];

  explicit RowNoise(const RowDraw& draw)
      : position_low(static_cast<uint32_t>(draw.position)),
        position_high(static_cast<uint32_t>(static_cast<uint64_t>(draw.position) >> 32)),
        purpose(static_cast<uint32_t>(draw.purpose)) {
    uint32_t k0 = static_cast<uint32_t>(draw.seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(draw.seed) >> 32);
    for (auto& key : keys) {
      key[0] = k0;
      key[1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // Of kGroups groups: words[w][g] belongs to token 4 groups[g] + w. Returns the largest word.
  uint32_t draw(const uint32_t* groups, uint32_t (&words)[4][kGroups]) const {
    Counters largest = Counters::all(0);
    for (int g = 0; g < kGroups; g += Counters::kSize) {
      Counters c0 = Counters::all(position_low), c1 = Counters::all(position_high);
      Counters c2 = Counters::from(groups + g), c3 = Counters::all(purpose);
      for (const auto& key : keys) {
        Counters high0, low0, high1, low1;
        c0.multiply(0xD2511F53u, high0, low0);
        c2.multiply(0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ Counters::all(key[0]);
        c1 = low1;
        c2 = high0 ^ c3 ^ Counters::all(key[1]);
        c3 = low0;
      }
      c0.store(words[0] + g);
      c1.store(words[1] + g);
      c2.store(words[2] + g);
      c3.store(words[3] + g);
      largest = largest.larger(c0.larger(c1).larger(c2.larger(c3)));
    }
    uint32_t of_lanes[Counters::kSize];
    largest.store(of_lanes);
    return *std::max_element(of_lanes, of_lanes + Counters::kSize);
  }
};

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
