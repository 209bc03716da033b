// A row's winner under Gumbel noise, which is drawn for no tokens but those that may win.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../verify_core.cuh"
#include "noise.h"
#include "rows.h"

namespace dflash_ray {

constexpr double kGapOfSome = 11;  // from the best score to a block's largest, from which on only some tokens may win

// Groups that may win, until there are enough to draw their noise together.
struct WaitingGroups {
  uint32_t numbers[2 * kGroups]{};  // the group's first token, divided by 4
  int count = 0;
  float highest = kMinusInf;  // none of their scaled tokens is larger

  // Takes the groups of an aligned, whole block in which a scaled token is at least `reach`.
  void take(const float* values, float inv_temperature, float reach, uint32_t first_group, float block_highest) {
    uint64_t tokens = 0;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      tokens |= uint64_t{reaching(load(values + i) * inv_temperature, reach)} << i;
    }
    tokens |= tokens >> 1;
    tokens |= tokens >> 2;
    for (tokens &= 0x1111111111111111u; tokens != 0; tokens &= tokens - 1) {
      numbers[count++] = first_group + static_cast<uint32_t>(__builtin_ctzll(tokens)) / 4;
    }
    highest = std::max(highest, block_highest);
  }

  // Forgets the first kGroups. What is left came with the last block.
  void drop_drawn(float last_highest) {
    count -= kGroups;
    std::copy_n(numbers + kGroups, kGroups, numbers);
    highest = count > 0 ? last_highest : kMinusInf;
  }
};

// Considers the tokens of the first `count` of kGroups groups.
template <class T>
void draw_groups(const Row<T>& row, const RowDraw& draw, const RowNoise& noise, const uint32_t* groups, int count,
                 float highest, Best& best) {
  const auto needed_at = [&](float scaled) {
    return best.token < 0 ? 0 : needed_words(best.score - static_cast<double>(scaled));
  };
  const uint32_t needed = needed_at(highest);
  if (needed == kNoWord) return;
  uint32_t words[4][kGroups];
  if ((noise.draw(groups, words) >> 8) < needed) return;
  for (int g = 0; g < count; ++g) {
    for (int w = 0; w < 4; ++w) {
      const uint32_t word = words[w][g];
      const int64_t token = 4 * static_cast<int64_t>(groups[g]) + w;
      if ((word >> 8) < needed || !row.has(token)) continue;
      const float scaled = row.get(token) * draw.inv_temperature;
      if ((word >> 8) >= needed_at(scaled)) consider(draw, scaled, word, token, best);
    }
  }
}

template <class T>
void best_drawn(const Row<T>& row, const Scan& scan, const RowDraw& draw, Best& best) {
  if (scan.maximum == kMinusInf) return;
  const RowNoise noise(draw);
  WaitingGroups waiting;
  // The likeliest block first: its winner rules out most others.
  const int64_t likeliest = scan.block_of_maximum();
  for (int64_t step = -1; step < scan.num_blocks(); ++step) {
    const int64_t block = step < 0 ? likeliest : step;
    const float highest = scan.maxima[block] * draw.inv_temperature;
    if (step == likeliest || highest == kMinusInf || highest < draw.floor) continue;
    const double gap = best.token < 0 ? 0 : best.score - static_cast<double>(highest);
    if (gap > kMaxGumbel) continue;
    const int64_t at = scan.begin(block), count = scan.count(block);
    const uint32_t first_group = static_cast<uint32_t>((row.start + at) / kBlock * kGroups);
    if (gap < kGapOfSome || count < kBlock) {
      uint32_t groups[kGroups];
      std::iota(groups, groups + kGroups, first_group);
      draw_groups(row, draw, noise, groups, kGroups, highest, best);
      continue;
    }
    float buffer[kBlock];
    const float least = static_cast<float>(best.score - kMaxGumbel);
    const float reach = std::max(draw.floor, std::nextafter(least, kMinusInf));  // as `least` may be rounded up
    waiting.take(floats_at(row.data + at, count, buffer), draw.inv_temperature, reach, first_group, highest);
    if (waiting.count < kGroups) continue;
    draw_groups(row, draw, noise, waiting.numbers, kGroups, waiting.highest, best);
    waiting.drop_drawn(highest);
  }
  if (waiting.count > 0) draw_groups(row, draw, noise, waiting.numbers, waiting.count, waiting.highest, best);
}

}  // namespace dflash_ray
