// Winners of rows, several blocks a row. All blocks know a score that some token of the row reaches before they draw
// noise for others: the best of the tiles' largest tokens, whose noise is drawn first.
#pragma once

#include "tiles.cuh"

namespace dflash_ray {
namespace {

// What a block found of its row.
struct Part {
  double score, token, mass;
};

// A float that is no larger.
DFLASH_FN float rounded_down(double value) {
  const float rounded = static_cast<float>(value);
  return static_cast<double>(rounded) > value ? value_of_key(key_of(rounded) - 1) : rounded;
}

// The best token of a lane, and the score to be beaten without 64-bit arithmetic.
struct Drawn {
  Best best;
  float reach;

  DFLASH_DEVICE explicit Drawn(const Best& known) : best(known), reach(rounded_down(known.score)) {}

  DFLASH_DEVICE void take(const RowDraw& draw, float scaled, uint32_t word, int64_t token) {
    consider(draw, scaled, word, token, best);
    reach = rounded_down(best.score);
  }
};

template <class T>
DFLASH_DEVICE void draw_tile(const Row<T>& row, const RowDraw& draw, const LaneOfTile& lane, Drawn& drawn) {
#pragma unroll
  for (int g = 0; g < kLaneGroups; ++g) {
    const float(&values)[kGroup] = lane.values[g];
    float highest = kMinusInf;
    for (int j = 0; j < kGroup; ++j) highest = values[j] > highest ? values[j] : highest;
    highest *= draw.inv_temperature;
    if (highest == kMinusInf || highest < draw.floor) continue;
    const uint32_t needed = word_that_may_reach(drawn.reach - highest);
    if (needed == kNoWord) continue;
    const int64_t token = row.start + lane.index(g);
    const Words words = noise_words(draw.seed, draw.position, token / kGroup, draw.purpose);
    for (int j = 0; j < kGroup; ++j) {
      if (words.at[j] >> 8 < needed) continue;
      drawn.take(draw, values[j] * draw.inv_temperature, words.at[j], token + j);
    }
  }
}

// The best of the tiles' largest tokens, to all threads.
template <class T>
DFLASH_DEVICE Best best_peak(const Row<T>& row, const Tile* tiles, int count, const RowDraw& draw, bool is_greedy) {
  DFLASH_SHARED(Best, bests, kWarps);
  DFLASH_SHARED(Best, known, 1);
  Best best;
  for (int t = threadIdx.x; t < count; t += kThreads) {
    const Tile tile = tiles[t];
    if (tile.at < 0) continue;
    const int64_t token = row.start + tile.at;
    if (is_greedy) {
      best.take(tile.maximum, token);
    } else {
      const uint32_t word = noise_word(draw.seed, draw.position, token, draw.purpose);
      consider(draw, tile.maximum * draw.inv_temperature, word, token, best);
    }
  }
  best = block_reduce(best, bests, TakeBest());
  if (threadIdx.x == 0) known[0] = best;
  __syncthreads();
  return known[0];
}

// One row's partial, as wide as `width`. Rows that are judged tell masses too.
template <class T>
DFLASH_DEVICE void write_partial(const Row<T>& row, int64_t i, const PlanView& plan, const DraftView& drafts,
                                 const RowPeak& peak, const Best& best, double mass, float maximum, float floor,
                                 double* partial) {
  const float scale = scale_of(plan, i);
  if (threadIdx.x == 0) {
    partial[kBestScore] = best.score;
    partial[kBestToken] = static_cast<double>(best.token);
    partial[kMaximum] = peak.maximum * scale;
    partial[kIsBad] = peak.is_bad;
    if (drafts.width > 0) partial[kMass] = mass;
  }
  const bool judged = is_judged(plan, drafts, i) && peak.is_drawable();
  for (int64_t j = threadIdx.x; j < drafts.width; j += kThreads) {
    const int64_t token = drafts.ids[i * drafts.width + j];
    const bool counts = judged && row.has(token) && row.get(token) * scale >= floor;
    partial[kDraftMass + j] = counts ? static_cast<double>(mass_of(row.get(token), scale, maximum)) : 0.0;
  }
}

// `maxima` over all shards, or null where this one is the whole vocabulary; `states` null without thresholds.
template <class T>
DFLASH_KERNEL_FITTING(3)
draw_kernel(LogitsView logits, PlanView plan, Spans spans, const Tile* all_tiles, unsigned* counters, Part* parts,
            const double* maxima, const int64_t* states, DraftView drafts, int64_t width, double* partials) {
  const int64_t i = spans.row();
  const Row<T> row = row_of<T>(logits, i);
  const Tile* tiles = all_tiles + i * spans.tiles;
  double* partial = partials + i * width;
  const RowPeak peak = row_peak(tiles, spans.tiles);
  const bool greedy = is_greedy(plan.parameters(plan.row(i)[kRowSequence]));
  const float floor = floor_of(states, i), scale = scale_of(plan, i);
  const float maximum = maxima ? static_cast<float>(maxima[i]) : peak.maximum * scale;
  const RowDraw draw = row_draw(plan, drafts, i, floor);
  const Best known = peak.is_drawable() ? best_peak(row, tiles, spans.tiles, draw, greedy) : Best{};
  if (greedy || !peak.is_drawable()) {
    if (spans.at() == 0) write_partial(row, i, plan, drafts, peak, known, 0, maximum, floor, partial);
    return;
  }
  const bool judged = is_judged(plan, drafts, i);
  Drawn drawn(known);
  long long mass = 0;
  for_tiles(spans.first(), spans.last(), [&](int t) {
    const float highest = tiles[t].maximum * scale;
    if (highest == kMinusInf || highest < floor) return;
    const bool may_win = word_that_may_reach(drawn.reach - highest) != kNoWord;
    const bool has_mass = judged && highest - maximum >= kMassless;
    if (!may_win && !has_mass) return;
    const LaneOfTile lane(row, t);
    if (may_win) draw_tile(row, draw, lane, drawn);
    if (!has_mass) return;
    lane.for_values([&](int, float value) { mass += value * scale >= floor ? mass_of(value, scale, maximum) : 0; });
  });
  DFLASH_SHARED(Best, bests, kWarps);
  DFLASH_SHARED(long long, masses, kWarps);
  Best best = block_reduce(drawn.best, bests, TakeBest());
  mass = block_reduce(mass, masses, TakeSum());
  if (spans.count > 1) {
    Part* mine = parts + i * spans.count;
    if (threadIdx.x == 0) mine[spans.at()] = {best.score, static_cast<double>(best.token), static_cast<double>(mass)};
    if (!is_last_of(spans.count, counters + i * kCounters + kDrawnBlocks)) return;
    best = Best{};
    mass = 0;
    for (unsigned n = threadIdx.x; n < spans.count; n += kThreads) {
      best.take(fresh(mine[n].score), static_cast<int64_t>(fresh(mine[n].token)));
      mass += static_cast<long long>(fresh(mine[n].mass));
    }
    best = block_reduce(best, bests, TakeBest());
    mass = block_reduce(mass, masses, TakeSum());
  }
  write_partial(row, i, plan, drafts, peak, best, static_cast<double>(mass), maximum, floor, partial);
}

}  // namespace
}  // namespace dflash_ray
