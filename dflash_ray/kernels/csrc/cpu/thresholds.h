// Top-k and top-p of a row that lies here whole, without a sort of it.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "masses.h"

namespace dflash_ray {

inline float floor_of(const int64_t* state, int64_t row) {
  return state ? value_of_key(static_cast<uint32_t>(state[row * kStateColumns + kFloorKey])) : kMinusInf;
}

// Raises the floor to the k-th largest value; fewer kept tokens than k all stay.
template <class T>
void keep_top_k(const ScaledRow<T>& scaled, int64_t k, int64_t* state) {
  const auto& [row, scan, inv_temperature, maximum] = scaled;
  thread_local std::vector<float> maxima;
  thread_local std::vector<uint32_t> kept;
  // The k largest maxima of blocks are k tokens, so that the k-th largest token lies no lower than the least of them.
  uint32_t low = static_cast<uint32_t>(state[kFloorKey]);
  if (k <= scan.num_blocks()) {
    maxima = scan.maxima;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    low = std::max(low, key_of(maxima[k - 1] * inv_temperature));
  }
  kept.clear();
  float buffer[kBlock];
  uint32_t keys[kBlock];
  for (int64_t block = 0; block < scan.num_blocks(); ++block) {
    if (key_of(scan.maxima[block] * inv_temperature) < low) continue;
    const int64_t at = scan.begin(block), count = scan.count(block);
    const float* values = floats_at(row.data + at, count, buffer);
    for (int64_t j = 0; j < count; ++j) keys[j] = key_of(values[j] * inv_temperature);
    for (int64_t j = 0; j < count; ++j) {
      if (keys[j] >= low) kept.push_back(keys[j]);
    }
  }
  if (kept.empty()) return;
  const auto last = kept.begin() + (std::min<int64_t>(k, kept.size()) - 1);
  std::nth_element(kept.begin(), last, kept.end(), std::greater<>());
  state[kFloorKey] = std::max<int64_t>(state[kFloorKey], *last);
}

// Scaled values between which a threshold is looked for.
struct Band {
  float high, low;
};

// Masses in bins of equal width from a band's top down: which bin a share of the mass falls into.
struct MassHistogram {
  static constexpr int kNumBins = 1024;
  static constexpr float kNarrowest = 1e-30f;  // values closer to each other share a bin
  double bins[kNumBins]{};
  float high, steps_a_unit;

  explicit MassHistogram(Band band)
      : high(band.high),
        steps_a_unit(band.high - band.low > kNarrowest ? (kNumBins - 1) / (band.high - band.low) : 0) {}

  // Never smaller for a smaller value, which is all that exactness asks for.
  int bin_of(float value) const { return static_cast<int>((high - value) * steps_a_unit); }
  float value_of(int bin) const { return high - static_cast<float>(bin) / steps_a_unit; }
  void add(float value, double mass) { bins[bin_of(value)] += mass; }

  // The bin in which the mass from the highest value down reaches `wanted`, the last one at most; adds to `above` what
  // the bins before it hold.
  int reach(double wanted, double& above) const {
    int bin = 0;
    while (bin < kNumBins - 1 && above + bins[bin] < wanted) above += bins[bin++];
    return bin;
  }
};

constexpr int64_t kSampledBlocks = 4, kSampledTokens = 4;  // of every so many blocks, the first so many tokens
constexpr int64_t kTallBlocks = 16;                        // that are looked at whole
constexpr int64_t kFewBlocks = 64;                         // a row of no more is too short to sample

// Logits of some of a row's tokens, and their masses.
struct Sample {
  std::vector<float> values, masses;

  void weigh(float inv_temperature, float maximum, float floor) {
    const int64_t size = static_cast<int64_t>(values.size());
    masses.resize(size + kChunk);
    for (int64_t at = 0; at < size; at += kChunk) {
      const int64_t count = std::min(kChunk, size - at);
      masses_of(values.data() + at, count, inv_temperature, maximum, floor, masses.data() + at);
    }
  }

  // Calls work(scaled, mass) for the tokens that have a mass, as if each were `times` tokens.
  template <class Work>
  void for_massive(float inv_temperature, float times, const Work& work) const {
    for (size_t i = 0; i < values.size(); ++i) {
      if (masses[i] > 0) work(values[i] * inv_temperature, static_cast<double>(masses[i] * times));
    }
  }
};

// Where the mass seems to reach `share`: by the tokens that hold most of it in a peaked row, the largest of each block
// and all of the tallest blocks, and by a sample of the others. Three standard errors of the sample either way.
template <class T>
Band likely_band(const ScaledRow<T>& scaled, float share, Band whole) {
  const auto& [row, scan, inv_temperature, maximum] = scaled;
  if (scan.num_blocks() <= kFewBlocks || !(whole.high > whole.low)) return whole;
  thread_local std::vector<float> maxima;
  thread_local Sample known, others;
  maxima = scan.maxima;
  std::nth_element(maxima.begin(), maxima.begin() + (kTallBlocks - 1), maxima.end(), std::greater<>());
  known.values.clear();
  others.values.clear();
  float buffer[kBlock];
  for (int64_t block = 0; block < scan.num_blocks(); ++block) {
    const int64_t at = scan.begin(block), count = scan.count(block);
    const float highest = scan.maxima[block];
    if (highest > maxima[kTallBlocks - 1]) {
      const float* values = floats_at(row.data + at, count, buffer);
      known.values.insert(known.values.end(), values, values + count);
      continue;
    }
    known.values.push_back(highest);
    if (block % kSampledBlocks != 0) continue;
    const float* values = floats_at(row.data + at, std::min(kSampledTokens, count), buffer);
    for (int64_t i = 0; i < std::min(kSampledTokens, count); ++i) {
      if (values[i] < highest) others.values.push_back(values[i]);
    }
  }
  constexpr float kTimes = kSampledBlocks * kBlock / kSampledTokens;
  known.weigh(inv_temperature, maximum, whole.low);
  others.weigh(inv_temperature, maximum, whole.low);
  MassHistogram histogram(whole);
  double total = 0, above = 0, variance = 0;
  const auto count_mass = [&](float height, double mass) {
    histogram.add(height, mass);
    total += mass;
  };
  known.for_massive(inv_temperature, 1, count_mass);
  others.for_massive(inv_temperature, kTimes, count_mass);
  const int reached = histogram.reach(share * total, above);
  others.for_massive(inv_temperature, kTimes, [&](float height, double mass) {
    const double off = mass * (histogram.bin_of(height) < reached ? 1 - share : share);
    variance += off * off;
  });
  const double error = 3 * sqrt(variance), least = share * total - error, most = share * total + error;
  double above_high = 0, above_low = 0;
  const int high = histogram.reach(least, above_high), low = histogram.reach(most, above_low);
  Band band = whole;
  if (least > 0) band.high = std::min(whole.high, histogram.value_of(high));
  if (most < total) band.low = std::max(whole.low, histogram.value_of(low + 1));
  return band;
}

// The tokens of a band, and the mass of all kept tokens and of those above the band.
struct BandTokens {
  std::vector<float> values, masses;
  int64_t size = 0;
  double total = 0, above = 0;
};

template <class T>
void gather(const ScaledRow<T>& scaled, float floor, Band band, BandTokens& tokens) {
  tokens.values.resize(scaled.row.size + kLanes);
  tokens.masses.resize(scaled.row.size + kLanes);
  float *values_to = tokens.values.data(), *masses_to = tokens.masses.data();
  float masses[kChunk], heights[kChunk];
  int64_t size = 0;
  MassSum below, rest, above;  // `below` of chunks that are altogether below the band
  for_massive_chunks(scaled, floor, [&](const float* values, int64_t count, float highest) {
    masses_of(values, count, scaled.inv_temperature, scaled.maximum, floor, masses);
    if (highest < band.low) return below.add_chunk(masses);
    for (int64_t i = 0; i < count; ++i) heights[i] = values[i] * scaled.inv_temperature;
    std::fill(heights + count, heights + kChunk, kMinusInf);
    MassSum rest_so_far = rest, above_so_far = above;  // in registers
    int64_t at = size;
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const Lanes mass = load(masses + i);
      rest_so_far.add(mass);
      above_so_far.add(load(heights + i) > band.high ? mass : Lanes{});
      at += pack_within(heights + i, masses + i, band.low, band.high, values_to + at, masses_to + at);
    }
    rest = rest_so_far;
    above = above_so_far;
    size = at;
  });
  tokens.size = size;
  tokens.total = below.value() + rest.value();
  tokens.above = above.value();
}

// keep_top_p within a band. False, with nothing raised, where the value is not in it.
template <class T>
bool settle_top_p(const ScaledRow<T>& scaled, float share, float floor, Band band, int64_t* state) {
  thread_local BandTokens tokens;
  gather(scaled, floor, band, tokens);
  const double wanted = std::min(tokens.total, std::max(1.0, ceil(static_cast<double>(share) * tokens.total)));
  if (tokens.above >= wanted) return false;
  MassHistogram histogram(band);
  for (int64_t i = 0; i < tokens.size; ++i) histogram.add(tokens.values[i], static_cast<double>(tokens.masses[i]));
  double above = tokens.above;
  const int bin = histogram.reach(wanted, above);
  // The bin in which it is reached, token by token.
  thread_local std::vector<std::pair<uint32_t, float>> last;
  last.clear();
  for (int64_t i = 0; i < tokens.size; ++i) {
    if (histogram.bin_of(tokens.values[i]) == bin) last.emplace_back(key_of(tokens.values[i]), tokens.masses[i]);
  }
  std::sort(last.begin(), last.end(), std::greater<>());
  for (const auto& [key, mass] : last) {
    above += static_cast<double>(mass);
    if (above < wanted) continue;
    state[kFloorKey] = std::max<int64_t>(state[kFloorKey], key);
    return true;
  }
  return false;
}

// Raises the floor to the value at which the mass from the largest down first reaches `share` of what is kept.
template <class T>
void keep_top_p(const ScaledRow<T>& scaled, float share, int64_t* state) {
  const Band whole{scaled.maximum, std::max(floor_of(state, 0), scaled.maximum + kMassless)};
  if (settle_top_p(scaled, share, whole.low, likely_band(scaled, share, whole), state)) return;
  settle_top_p(scaled, share, whole.low, whole, state);
}

// Masses in units of the likeliest token's, not rounded to multiples of 2^-32: of what is above a height, and of all.
struct AboutMasses {
  MassSum above, total;

  // Of `count` values, a block's at most.
  void add(const float* values, int64_t count, float inv_temperature, float maximum, float floor, float height) {
    float heights[kBlock], masses[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      heights[i] = values[i] * inv_temperature;
      masses[i] = exp_of_nonpositive(fmaf(values[i], inv_temperature, -maximum));
    }
    std::fill(heights + count, heights + kBlock, kMinusInf);
    std::fill(masses + count, masses + kBlock, 0.0f);
    Lanes above_here{}, total_here{};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Lanes mass = load(heights + i) >= floor ? load(masses + i) : Lanes{};
      above_here += load(heights + i) > height ? mass : Lanes{};
      total_here += mass;
    }
    above.add(above_here);
    total.add(total_here);
  }
};

// Whether a token that is `height` when scaled is sure to lie at or above the floor that keep_top_p would set. Where it
// takes exact sums to tell, it is not.
template <class T>
bool surely_in_top_p(const ScaledRow<T>& scaled, float share, float floor, float height) {
  const auto& [row, scan, inv_temperature, maximum] = scaled;
  if (height >= maximum) return true;
  // Sums of floats are rounded, masses rounded down.
  const double slack = 1e-4 + 0x1p-32 * static_cast<double>(row.size + 1);
  AboutMasses sums;
  float buffer[kBlock];
  const auto add_blocks = [&](bool with_tokens_above) {
    for (int64_t block = 0; block < scan.num_blocks(); ++block) {
      if ((scan.maxima[block] * inv_temperature > height) != with_tokens_above) continue;
      const int64_t at = scan.begin(block), count = scan.count(block);
      sums.add(floats_at(row.data + at, count, buffer), count, inv_temperature, maximum, floor, height);
    }
  };
  const auto is_sure = [&] { return sums.above.value() < (share - slack) * sums.total.value(); };
  add_blocks(true);
  if (is_sure()) return true;
  add_blocks(false);
  return is_sure();
}

}  // namespace dflash_ray
