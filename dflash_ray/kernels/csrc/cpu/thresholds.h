// Top-k and top-p of a row that lies here whole, without a sort of it; and the mass of what is kept.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "../verify_core.cuh"
#include "rows.h"

namespace dflash_ray {

constexpr float kMassless = -22.3f;  // further below the likeliest token, a token's mass is 0

inline float floor_of(const int64_t* state, int64_t row) {
  return state ? value_of_key(static_cast<uint32_t>(state[row * kStateColumns + kFloorKey])) : kMinusInf;
}

// Masses of `count` values from `floor` on. What stands behind them up to kChunk is 0.
inline void masses_of(const float* values, int64_t count, float inv_temperature, float maximum, float floor,
                      float* masses) {
  for (int64_t i = 0; i < count; ++i) {
    const float mass = integral_mass(values[i], inv_temperature, maximum);
    masses[i] = values[i] * inv_temperature >= floor ? mass : 0.0f;
  }
  std::fill(masses + count, masses + kChunk, 0.0f);
}

// Calls work(values, count) for the chunks of a row in which a token may be kept and have a mass.
template <class T, class Work>
void for_massive_chunks(const Row<T>& row, const Scan& scan, float inv_temperature, float maximum, float floor,
                        const Work& work) {
  float buffer[kChunk];
  for (int64_t at = 0; at < row.size; at += kChunk) {
    const float highest = scan.maxima[at / kChunk] * inv_temperature;
    if (highest < floor || highest - maximum < kMassless) continue;
    const int64_t count = std::min(kChunk, row.size - at);
    work(floats_at(row.data + at, count, buffer), count);
  }
}

// Doubles hold a row's sums exactly: less than 2^21 tokens of at most 2^32 each.
struct MassSum {
  WideLanes first{}, second{};

  void add(const Lanes& masses) {
    first += first_half(masses);
    second += second_half(masses);
  }
  double value() const {
    const WideLanes lanes = first + second;
    double sum = 0;
    for (int j = 0; j < kLanes / 2; ++j) sum += lanes[j];
    return sum;
  }
};

template <class T>
double kept_mass(const Row<T>& row, const Scan& scan, float inv_temperature, float maximum, float floor) {
  float masses[kChunk];
  MassSum sum;
  for_massive_chunks(row, scan, inv_temperature, maximum, floor, [&](const float* values, int64_t count) {
    masses_of(values, count, inv_temperature, maximum, floor, masses);
    MassSum so_far = sum;  // in registers
    for (int64_t i = 0; i < kChunk; i += kLanes) so_far.add(load(masses + i));
    sum = so_far;
  });
  return sum.value();
}

// Raises the floor to the k-th largest value; fewer kept tokens than k all stay.
template <class T>
void keep_top_k(const Row<T>& row, const Scan& scan, int64_t k, float inv_temperature, int64_t* state) {
  thread_local std::vector<float> maxima;
  thread_local std::vector<uint32_t> kept;
  // The k largest chunk maxima are k tokens, so that the k-th largest token lies no lower than the least of them.
  uint32_t low = static_cast<uint32_t>(state[kFloorKey]);
  if (k <= static_cast<int64_t>(scan.maxima.size())) {
    maxima = scan.maxima;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    low = std::max(low, key_of(maxima[k - 1] * inv_temperature));
  }
  kept.clear();
  float buffer[kChunk];
  uint32_t keys[kChunk];
  for (int64_t at = 0; at < row.size; at += kChunk) {
    if (key_of(scan.maxima[at / kChunk] * inv_temperature) < low) continue;
    const int64_t count = std::min(kChunk, row.size - at);
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
  void add(float value, float mass) { bins[bin_of(value)] += static_cast<double>(mass); }

  // The bin in which the mass from the highest value down reaches `wanted`, the last one at most; adds to `above` what
  // the bins before it hold.
  int reach(double wanted, double& above) const {
    int bin = 0;
    while (bin < kNumBins - 1 && above + bins[bin] < wanted) above += bins[bin++];
    return bin;
  }
};

constexpr int64_t kSampleOfChunk = 16, kFewestSampled = 256;

// Where a sixteenth of the row's tokens says that the mass reaches `share`, three standard errors either way; all of
// `whole` where they say too little.
template <class T>
Band likely_band(const Row<T>& row, const Scan& scan, float share, float inv_temperature, float maximum, Band whole) {
  thread_local std::vector<float> sample;
  sample.clear();
  for_massive_chunks(row, scan, inv_temperature, maximum, whole.low, [&](const float* values, int64_t count) {
    sample.insert(sample.end(), values, values + std::min(count, kSampleOfChunk));
  });
  if (static_cast<int64_t>(sample.size()) < kFewestSampled || !(whole.high > whole.low)) return whole;
  MassHistogram histogram(whole);
  float masses[kChunk];
  double total = 0, squares = 0;
  for (size_t at = 0; at < sample.size(); at += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, sample.size() - at);
    masses_of(sample.data() + at, count, inv_temperature, maximum, whole.low, masses);
    for (int64_t i = 0; i < count; ++i) {
      const float value = sample[at + i] * inv_temperature;
      if (value < whole.low) continue;
      histogram.add(value, masses[i]);
      total += static_cast<double>(masses[i]);
      squares += static_cast<double>(masses[i]) * static_cast<double>(masses[i]);
    }
  }
  if (total * total < kFewestSampled * squares) return whole;  // a few tokens hold most of the mass
  const double error = 3 * sqrt(share * (1 - share) * squares);
  const double least = share * total - error, most = share * total + error;
  double above = 0, above_low = 0;
  const int high = histogram.reach(least, above), low = histogram.reach(most, above_low);
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
void gather(const Row<T>& row, const Scan& scan, float inv_temperature, float maximum, float floor, Band band,
            BandTokens& tokens) {
  tokens.values.resize(row.size + kLanes);
  tokens.masses.resize(row.size + kLanes);
  float *values_to = tokens.values.data(), *masses_to = tokens.masses.data();
  float masses[kChunk], scaled[kChunk];
  int64_t size = 0;
  MassSum total, above;
  for_massive_chunks(row, scan, inv_temperature, maximum, floor, [&](const float* values, int64_t count) {
    masses_of(values, count, inv_temperature, maximum, floor, masses);
    for (int64_t i = 0; i < count; ++i) scaled[i] = values[i] * inv_temperature;
    std::fill(scaled + count, scaled + kChunk, kMinusInf);
    MassSum total_so_far = total, above_so_far = above;  // in registers
    int64_t at = size;
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const Lanes mass = load(masses + i);
      total_so_far.add(mass);
      above_so_far.add(load(scaled + i) > band.high ? mass : Lanes{});
      at += pack_within(scaled + i, masses + i, band.low, band.high, values_to + at, masses_to + at);
    }
    total = total_so_far;
    above = above_so_far;
    size = at;
  });
  tokens.size = size;
  tokens.total = total.value();
  tokens.above = above.value();
}

// keep_top_p within a band. False, with nothing raised, where the value is not in it.
template <class T>
bool settle_top_p(const Row<T>& row, const Scan& scan, float share, float inv_temperature, float maximum, float floor,
                  Band band, int64_t* state) {
  thread_local BandTokens tokens;
  gather(row, scan, inv_temperature, maximum, floor, band, tokens);
  const double wanted = std::min(tokens.total, std::max(1.0, ceil(static_cast<double>(share) * tokens.total)));
  if (tokens.above >= wanted) return false;
  MassHistogram histogram(band);
  for (int64_t i = 0; i < tokens.size; ++i) histogram.add(tokens.values[i], tokens.masses[i]);
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
void keep_top_p(const Row<T>& row, const Scan& scan, float share, float inv_temperature, float maximum,
                int64_t* state) {
  const Band whole{maximum, std::max(floor_of(state, 0), maximum + kMassless)};
  const Band likely = likely_band(row, scan, share, inv_temperature, maximum, whole);
  if (settle_top_p(row, scan, share, inv_temperature, maximum, whole.low, likely, state)) return;
  settle_top_p(row, scan, share, inv_temperature, maximum, whole.low, whole, state);
}

}  // namespace dflash_ray
