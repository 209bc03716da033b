// Thresholds of rows that lie here whole: min-p, top-k and top-p as the lowest value kept.
//
// Top-k: the k largest of the tiles' largest tokens are k tokens, so the k-th largest token lies no lower than the least
// of them. What reaches it is gathered, little more than k tokens, and searched.
// Top-p: masses are summed in bins of equal width from the row's largest token down, which spreads them. What is in the
// bin in which the share is reached is gathered and searched.
// The last block of a row that is done with either goes on with what all have found; a list that would be too long is
// left, and the row itself searched.
#pragma once

#include "tiles.cuh"

namespace dflash_ray {
namespace {

constexpr int kSearchBins = 1024;
constexpr unsigned kCapacity = 2048;    // gathered tokens a row
constexpr int kTilesOfCounts = 64;  // sums of so many tiles' half masses are sure to stay below 2^32
static_assert(int64_t{kTilesOfCounts} * kTile * 65536 <= int64_t{1} << 31);
static_assert(kSearchBins == 4 * kThreads);

struct Search {
  long long above, wanted;  // top-p: mass above the reached bin, mass that is to be reached
  float maximum;            // scaled
  float low;                // top-k: no lower than this is the k-th largest
  int bin;                  // top-p: the bin in which the share is reached
  int is_drawable, is_settled;
};

struct ThresholdScratch {
  const Tile* tiles;
  unsigned* counters;
  Search* searches;           // [R]
  unsigned long long* bins;   // [R, kSearchBins]
  float* gathered;            // [R, kCapacity] logits
  int64_t* states;            // [R, kStateColumns]
};

// Which of the bins, from the first on, brings a sum to what is wanted; the last one at most.
struct Reached {
  int bin;
  long long above, total;  // of the bins before it and of all
};

// `wanted_of` makes the wanted sum of the total. All threads take part and get the same.
template <class Bins, class WantedOf>
DFLASH_DEVICE Reached reached_bin(const Bins& bins, const WantedOf& wanted_of, long long above) {
  DFLASH_SHARED(unsigned long long, fours, kThreads);
  DFLASH_SHARED(unsigned long long, groups, kWarp);
  DFLASH_SHARED(Reached, reached, 1);
  const int i = threadIdx.x;
  unsigned long long sum = 0;
  for (int j = 0; j < 4; ++j) sum += bins(4 * i + j);
  fours[i] = sum;
  __syncthreads();
  if (i < kWarp) {
    sum = 0;
    for (int j = 0; j < kThreads / kWarp; ++j) sum += fours[i * (kThreads / kWarp) + j];
    groups[i] = sum;
  }
  __syncthreads();
  if (i == 0) {
    long long total = 0;
    for (int g = 0; g < kWarp; ++g) total += static_cast<long long>(static_cast<unsigned long long>(groups[g]));
    const long long wanted = wanted_of(total);
    int at = 0;
    const auto skip = [&](const auto& sums, int first, int count) {
      at = first;
      while (at < first + count - 1) {
        const long long next = static_cast<long long>(static_cast<unsigned long long>(sums(at)));
        if (above + next >= wanted) break;
        above += next;
        ++at;
      }
    };
    skip([&](int g) -> unsigned long long { return groups[g]; }, 0, kWarp);
    skip([&](int f) -> unsigned long long { return fours[f]; }, at * (kThreads / kWarp), kThreads / kWarp);
    skip(bins, at * 4, 4);
    reached[0] = Reached{at, above, total};
  }
  __syncthreads();
  return reached[0];
}

// The largest key from which on the weights, added to `above`, come to `wanted`. `for_each` calls its argument for the
// values of this thread, `weight` tells a value's weight. There is a value, and all of them suffice.
template <class ForEach, class Weight>
DFLASH_DEVICE uint32_t reaching_key(const ForEach& for_each, const Weight& weight, float scale, long long above,
                                    long long wanted) {
  DFLASH_SHARED(unsigned long long, bins, kSearchBins);
  DFLASH_SHARED(unsigned, lows, kWarps);
  DFLASH_SHARED(unsigned, highs, kWarps);
  DFLASH_SHARED(unsigned, range, 2);
  unsigned low = ~0u, high = 0;
  for_each([&](float value) {
    const uint32_t key = key_of(value * scale);
    low = key < low ? key : low;
    high = key > high ? key : high;
  });
  low = block_reduce(low, lows, [](unsigned a, unsigned b) { return a < b ? a : b; });
  high = block_reduce(high, highs, [](unsigned a, unsigned b) { return a > b ? a : b; });
  if (threadIdx.x == 0) {
    range[0] = low;
    range[1] = high;
  }
  __syncthreads();
  low = range[0];
  high = range[1];
  for (;;) {
    int shift = 0;
    while ((high - low) >> shift >= unsigned{kSearchBins}) ++shift;
    for (int b = threadIdx.x; b < kSearchBins; b += kThreads) bins[b] = 0ull;
    __syncthreads();
    for_each([&](float value) {
      const uint32_t key = key_of(value * scale);
      if (key >= low && key <= high) DFLASH_SHARED_ADD(bins, (high - key) >> shift, weight(value));
    });
    __syncthreads();
    const auto reached = reached_bin([&](int b) -> unsigned long long { return bins[b]; },
                                     [&](long long) { return wanted; }, above);
    above = reached.above;
    high -= static_cast<unsigned>(reached.bin) << shift;
    if (shift == 0) return high;
    const unsigned width = 1u << shift;
    low = high - low >= width ? high - width + 1 : low;
  }
}

// Before all else: the largest value, min-p, and a bound for top-k.
DFLASH_KERNEL begin_search_kernel(PlanView plan, int tiles_of_row, ThresholdScratch scratch) {
  constexpr int kMost = 2 * kThreads;  // tiles that are compared; fewer give a bound as well
  DFLASH_SHARED(float, maxima, kMost);
  DFLASH_SHARED(float, bound, 1);
  const int64_t i = blockIdx.x, s = plan.row(i)[kRowSequence];
  const int64_t* sequence = plan.sequence(s);
  const float* parameters = plan.parameters(s);
  const Tile* tiles = scratch.tiles + i * tiles_of_row;
  const RowPeak peak = row_peak(tiles, tiles_of_row);
  const float scale = scale_of(plan, i);
  for (int b = threadIdx.x; b < kSearchBins; b += kThreads) scratch.bins[i * kSearchBins + b] = 0;
  const int count = tiles_of_row < kMost ? tiles_of_row : kMost;
  const bool has_bound = peak.is_drawable() && Round(0).concerns(sequence, parameters) && sequence[kTopK] <= count;
  if (has_bound) {
    for (int t = threadIdx.x; t < count; t += kThreads) maxima[t] = tiles[t].maximum;
    __syncthreads();
    for (int t = threadIdx.x; t < count; t += kThreads) {
      const float mine = maxima[t];
      int before = 0;
      for (int other = 0; other < count; ++other) {
        const float value = maxima[other];
        before += value > mine || (value == mine && other < t);
      }
      if (before == sequence[kTopK] - 1) bound[0] = mine * scale;
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  start_threshold(parameters, peak.maximum * scale, scratch.states + i * kStateColumns);
  Search& search = scratch.searches[i];
  search = Search{};
  search.maximum = peak.maximum * scale;
  search.low = has_bound ? float(bound[0]) : kMinusInf;
  search.is_drawable = peak.is_drawable() && search.maximum > kMinusInf && search.maximum < INFINITY;
}

// The bins of top-p: equal in width, from the largest value down to where masses end or nothing is kept.
struct MassBins {
  float high, low, steps;

  DFLASH_DEVICE MassBins(float maximum, float floor)
      : high(maximum), low(floor > maximum + kMassless ? floor : maximum + kMassless) {
    steps = high - low > 1e-30f ? (kSearchBins - 1) / (high - low) : 0.0f;
  }
  // Of a value from `low` on; never smaller for a smaller value, which is all that exactness asks for.
  DFLASH_DEVICE int of(float value) const {
    const int bin = static_cast<int>((high - value) * steps);
    return bin < kSearchBins ? bin : kSearchBins - 1;
  }
};

template <class T>
DFLASH_KERNEL mass_bins_kernel(LogitsView logits, PlanView plan, Spans spans, ThresholdScratch scratch) {
  DFLASH_SHARED(unsigned, lower, kSearchBins);  // halves of masses: shared memory adds 32 bits at once
  DFLASH_SHARED(unsigned, upper, kSearchBins);
  const int64_t i = spans.row(), s = plan.row(i)[kRowSequence];
  const float* parameters = plan.parameters(s);
  Search& search = scratch.searches[i];
  if (!Round(4).concerns(plan.sequence(s), parameters) || !search.is_drawable || search.is_settled) return;
  const Row<T> row = row_of<T>(logits, i);
  const Tile* tiles = scratch.tiles + i * spans.tiles;
  const float scale = scale_of(plan, i), maximum = search.maximum;
  const MassBins bins(maximum, floor_of(scratch.states, i));
  for (int b = threadIdx.x; b < kSearchBins; b += kThreads) {
    lower[b] = 0u;
    upper[b] = 0u;
  }
  __syncthreads();
  for_tiles(spans.first(), spans.last(), [&](int t) {
    if (tiles[t].maximum * scale < bins.low) return;
    LaneOfTile(row, t).for_values([&](int, float value) {
      const float scaled = value * scale;
      const unsigned long long mass = scaled >= bins.low ? mass_of(value, scale, maximum) : 0;
      if (mass == 0) return;
      const int bin = bins.of(scaled);
      DFLASH_SHARED_ADD(lower, bin, static_cast<unsigned>(mass & 0xFFFFu));
      DFLASH_SHARED_ADD(upper, bin, static_cast<unsigned>(mass >> 16));
    });
  });
  __syncthreads();
  unsigned long long* sums = scratch.bins + i * kSearchBins;
  for (int b = threadIdx.x; b < kSearchBins; b += kThreads) {
    const unsigned long long sum = (static_cast<unsigned long long>(upper[b]) << 16) + lower[b];
    if (sum) atomicAdd(sums + b, sum);
  }
  if (!is_last_of(spans.count, scratch.counters + i * kCounters + kBinnedBlocks)) return;
  const auto wanted_of = [&](long long total) { return static_cast<long long>(wanted_mass(parameters[kTopP], total)); };
  const auto reached = reached_bin([&](int b) -> unsigned long long { return fresh(sums[b]); }, wanted_of, 0);
  if (threadIdx.x != 0) return;
  search.above = reached.above;
  search.wanted = wanted_of(reached.total);
  search.bin = reached.bin;
}

// Gathers the tokens among which the threshold is, and finds it.
template <class T>
DFLASH_KERNEL_FITTING(2)
search_kernel(LogitsView logits, PlanView plan, Spans spans, ThresholdScratch scratch, bool is_top_k) {
  const int64_t i = spans.row(), s = plan.row(i)[kRowSequence];
  const int64_t* sequence = plan.sequence(s);
  const float* parameters = plan.parameters(s);
  Search& search = scratch.searches[i];
  if (!Round(is_top_k ? 0 : 4).concerns(sequence, parameters) || !search.is_drawable || search.is_settled) return;
  const Row<T> row = row_of<T>(logits, i);
  const Tile* tiles = scratch.tiles + i * spans.tiles;
  const float scale = scale_of(plan, i), maximum = search.maximum, floor = floor_of(scratch.states, i);
  int64_t* state = scratch.states + i * kStateColumns;
  const MassBins bins(maximum, floor);
  const float low = !is_top_k ? bins.low : search.low > floor ? search.low : floor;
  const int bin = search.bin;
  const auto is_wanted = [&](float value) {
    const float scaled = value * scale;
    return scaled >= low && (is_top_k || bins.of(scaled) == bin);
  };
  const auto for_tokens = [&](int first, int last, const auto& use) {
    for_tiles(first, last, [&](int t) {
      const float highest = tiles[t].maximum * scale;
      if (highest < low || (!is_top_k && bins.of(highest) > bin)) return;
      LaneOfTile(row, t).for_values([&](int index, float value) {
        use(index >= 0 && index < row.size && is_wanted(value), value);
      });
    });
  };
  unsigned* counters = scratch.counters + i * kCounters;
  unsigned* count = counters + (is_top_k ? kTopKTokens : kTopPTokens);
  float* gathered = scratch.gathered + i * kCapacity;
  for_tokens(spans.first(), spans.last(), [&](bool is_in, float value) {
    const unsigned members = ballot(is_in);
    if (members == 0) return;
    unsigned at = 0;
    if (lane_of_thread() == 0) at = atomicAdd(count, static_cast<unsigned>(__popc(members)));
    at = from_lane(at, 0) + __popc(members & ((1u << lane_of_thread()) - 1));
    if (is_in && at < kCapacity) gathered[at] = value;
  });
  if (!is_last_of(spans.count, counters + (is_top_k ? kTopKBlocks : kTopPBlocks))) return;
  const unsigned found = fresh(*count);
  const bool is_listed = found <= kCapacity;
  const auto for_each = [&](const auto& use) {
    if (is_listed) {
      for (unsigned n = threadIdx.x; n < found; n += kThreads) use(fresh(gathered[n]));
    } else {
      for_tokens(0, spans.tiles, [&](bool is_in, float value) {
        if (is_in) use(value);
      });
    }
  };
  DFLASH_SHARED(long long, masses, kWarps);
  DFLASH_SHARED(long long, total, 1);
  float kept = floor;
  // Top-k by counts; then top-p by masses, where all tokens that top-k keeps are at hand.
  for (bool counts = is_top_k;; counts = false) {
    const auto weight = [&](float value) -> unsigned long long {
      if (counts) return 1;
      return value * scale >= kept ? static_cast<unsigned long long>(mass_of(value, scale, maximum)) : 0;
    };
    long long above = 0, wanted = sequence[kTopK];
    if (!is_top_k) {
      above = search.above;
      wanted = search.wanted;
    } else if (!counts) {
      long long sum = 0;
      for_each([&](float value) { sum += static_cast<long long>(weight(value)); });
      sum = block_reduce(sum, masses, TakeSum());
      if (threadIdx.x == 0) total[0] = sum;
      __syncthreads();
      wanted = wanted_mass(parameters[kTopP], total[0]);
    }
    if (!counts || static_cast<int64_t>(found) >= wanted) {  // fewer tokens than wanted all stay
      const float reached = value_of_key(reaching_key(for_each, weight, scale, above, wanted));
      kept = reached > kept ? reached : kept;
    }
    if (threadIdx.x == 0) {
      state[kFloorKey] = key_of(kept);
      search.is_settled = !counts;
    }
    if (!counts || !is_listed || parameters[kTopP] >= 1) return;
  }
}

// Of a shard: rounds of the search that all shards take together.

DFLASH_KERNEL threshold_start_kernel(const double* maxima, PlanView plan, int64_t* states) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < plan.num_rows) {
    start_threshold(plan.parameters(plan.row(i)[kRowSequence]), maxima[i], states + i * kStateColumns);
  }
}

// The sum of 48-bit values over the lanes that have one.
DFLASH_DEVICE unsigned long long sum_of_lanes(bool has, unsigned long long value) {
  const unsigned low = warp_sum(has ? static_cast<unsigned>(value & 0xFFFFFFu) : 0u);
  return low + (static_cast<unsigned long long>(warp_sum(has ? static_cast<unsigned>(value >> 24) : 0u)) << 24);
}

// Neighbours mostly fall into one or two bins, which a warp counts as one; the others count by themselves.
template <class T>
DFLASH_KERNEL_FITTING(4)
threshold_histogram_kernel(LogitsView logits, PlanView plan, const double* maxima, const int64_t* states, int index,
                           int64_t* histograms) {
  constexpr int kCountedTogether = 2;
  DFLASH_SHARED(unsigned long long, bins, kBins);
  static_assert(kThreads == kBins);
  bins[threadIdx.x] = 0ull;
  __syncthreads();
  const int64_t i = blockIdx.x, s = plan.row(i)[kRowSequence];
  const Round round(index);
  if (round.concerns(plan.sequence(s), plan.parameters(s))) {
    const Row<T> row = row_of<T>(logits, i);
    const int64_t* state = states + i * kStateColumns;
    const float scale = plan.parameters(s)[kInvTemperature], maximum = static_cast<float>(maxima[i]);
    for_tiles(0, num_tiles(logits), [&](int t) {
      LaneOfTile(row, t).for_values([&](int at, float value) {
        const uint32_t key = key_of(value * scale);
        const bool counts = at >= 0 && at < row.size && round.has(key, state);
        const unsigned long long weight = !counts ? 0 : round.is_top_k ? 1 : mass_of(value, scale, maximum);
        const int bin = static_cast<int>(key >> round.shift & (kBins - 1));
        unsigned rest = ballot(weight != 0);
        for (int n = 0; n < kCountedTogether && rest != 0; ++n) {
          const int leader = __ffs(rest) - 1, same_bin = from_lane(bin, leader);
          const bool is_same = weight != 0 && bin == same_bin;
          rest &= ~ballot(is_same);
          const unsigned long long sum = sum_of_lanes(is_same, weight);
          if (lane_of_thread() == leader) DFLASH_SHARED_ADD(bins, bin, sum);
        }
        if (rest >> lane_of_thread() & 1) DFLASH_SHARED_ADD(bins, bin, weight);
      });
    });
  }
  __syncthreads();
  histograms[i * kBins + threadIdx.x] = static_cast<int64_t>(bins[threadIdx.x]);
}

DFLASH_KERNEL threshold_narrow_kernel(const int64_t* histograms, PlanView plan, int round, int64_t* states) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plan.num_rows) return;
  const int64_t s = plan.row(i)[kRowSequence];
  narrow_threshold(round, plan.sequence(s), plan.parameters(s), histograms + i * kBins, states + i * kStateColumns);
}

}  // namespace
}  // namespace dflash_ray
