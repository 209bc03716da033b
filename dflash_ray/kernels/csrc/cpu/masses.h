// Masses of a row's tokens, and sums of them.
#pragma once

#include <algorithm>

#include "../verify_core.cuh"
#include "rows.h"

namespace dflash_ray {

// Masses of `count` values from `floor` on. What stands behind them up to kChunk is 0.
inline void masses_of(const float* values, int64_t count, float inv_temperature, float maximum, float floor,
                      float* masses) {
  for (int64_t i = 0; i < count; ++i) {
    const float mass = integral_mass(values[i], inv_temperature, maximum);
    masses[i] = values[i] * inv_temperature >= floor ? mass : 0.0f;
  }
  std::fill(masses + count, masses + kChunk, 0.0f);
}

// A row whose logits count by what they are when scaled, and whose largest scaled one is `maximum`.
template <class T>
struct ScaledRow {
  const Row<T>& row;
  const Scan& scan;
  float inv_temperature, maximum;
};

// Calls work(values, count, highest scaled one) for the chunks of a row in which a token may be kept and have a mass.
template <class T, class Work>
void for_massive_chunks(const ScaledRow<T>& scaled, float floor, const Work& work) {
  const auto& [row, scan, inv_temperature, maximum] = scaled;
  float buffer[kChunk];
  for (int64_t at = 0; at < row.size; at += kChunk) {
    const int64_t count = std::min(kChunk, row.size - at);
    const float highest = scan.highest(at, count) * inv_temperature;
    if (highest < floor || highest - maximum < kMassless) continue;
    work(floats_at(row.data + at, count, buffer), count, highest);
  }
}

// Doubles hold a row's sums exactly: less than 2^21 tokens of at most 2^32 each.
struct MassSum {
  WideLanes first{}, second{};

  void add(const Lanes& masses) {
    first += first_half(masses);
    second += second_half(masses);
  }
  void add_chunk(const float* masses) {
    MassSum so_far = *this;  // in registers
    for (int64_t i = 0; i < kChunk; i += kLanes) so_far.add(load(masses + i));
    *this = so_far;
  }
  double value() const {
    const WideLanes lanes = first + second;
    double sum = 0;
    for (int j = 0; j < kLanes / 2; ++j) sum += lanes[j];
    return sum;
  }
};

template <class T>
double kept_mass(const ScaledRow<T>& scaled, float floor) {
  float masses[kChunk];
  MassSum sum;
  for_massive_chunks(scaled, floor, [&](const float* values, int64_t count, float) {
    masses_of(values, count, scaled.inv_temperature, scaled.maximum, floor, masses);
    sum.add_chunk(masses);
  });
  return sum.value();
}

}  // namespace dflash_ray
