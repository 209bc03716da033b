// Rows of logits in tiles of 512 tokens, a warp a tile. A first read notes each tile's largest token; what follows looks
// again at the tiles that may matter.
#pragma once

#include "../scalars.h"
#include "simt.cuh"

namespace dflash_ray {
namespace {

constexpr int kGroup = 4;       // tokens that share a counter
constexpr int kLaneGroups = 4;  // of a tile, that a lane holds
constexpr int kTile = kWarp * kLaneGroups * kGroup;

// A tile's largest value, NaN where the row is bad, and where in the row it comes first; -1 where all are -inf.
struct alignas(8) Tile {
  float maximum;
  int32_t at;
};

// Blocks of a row that are done, and tokens that were gathered: 0 after the first read.
enum Counter { kDrawnBlocks, kTopKBlocks, kTopKTokens, kBinnedBlocks, kTopPBlocks, kTopPTokens, kCounters };

template <class T>
DFLASH_DEVICE Row<T> row_of(const LogitsView& logits, int64_t i) {
  return {static_cast<T*>(logits.data) + i * logits.stride, logits.size, logits.start};
}

// Tiles begin at multiples of their size in the vocabulary, so that a shard's first one may be shorter.
DFLASH_FN int num_tiles(const LogitsView& logits) {
  return logits.size == 0 ? 0 : static_cast<int>((logits.start % kTile + logits.size + kTile - 1) / kTile);
}

// Four tokens of one counter; outside the row they are -inf. One load where they lie together.
template <class T>
DFLASH_DEVICE void load_group(const Row<T>& row, int64_t index, float (&values)[kGroup]) {
  struct alignas(kGroup * sizeof(T)) Quad {
    T values[kGroup];
  };
  const T* from = row.data + index;
  if (index >= 0 && index + kGroup <= row.size && reinterpret_cast<uintptr_t>(from) % sizeof(Quad) == 0) {
    const Quad quad = *reinterpret_cast<const Quad*>(from);
    for (int j = 0; j < kGroup; ++j) values[j] = to_float(quad.values[j]);
    return;
  }
  for (int j = 0; j < kGroup; ++j) {
    values[j] = index + j >= 0 && index + j < row.size ? to_float(from[j]) : kMinusInf;
  }
}

// A lane's share of a tile.
struct LaneOfTile {
  float values[kLaneGroups][kGroup];
  int first;  // index in the row of the first value, below 0 in front of it

  template <class T>
  DFLASH_DEVICE LaneOfTile(const Row<T>& row, int tile)
      : first(tile * kTile - static_cast<int>(row.start % kTile) + lane_of_thread() * kGroup) {
#pragma unroll
    for (int g = 0; g < kLaneGroups; ++g) load_group(row, index(g), values[g]);
  }

  DFLASH_DEVICE int index(int group) const { return first + group * kWarp * kGroup; }

  // Calls use(index, value) for all values, -inf outside the row, in step with the other lanes.
  template <class Use>
  DFLASH_DEVICE void for_values(const Use& use) const {
#pragma unroll
    for (int g = 0; g < kLaneGroups; ++g) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) use(index(g) + j, values[g][j]);
    }
  }
};

struct TakeTile {
  DFLASH_DEVICE Tile operator()(Tile a, const Tile& b) const {
    const bool is_better = b.maximum > a.maximum || (b.maximum == a.maximum && b.at >= 0 && (a.at < 0 || b.at < a.at));
    return is_better ? b : a;
  }
};

DFLASH_DEVICE Tile shuffle_down(Tile tile, int delta) {
  return {__shfl_down_sync(kFullWarp, tile.maximum, delta), __shfl_down_sync(kFullWarp, tile.at, delta)};
}

// The first read.
template <class T>
DFLASH_KERNEL peek_kernel(LogitsView logits, Tile* tiles, unsigned* counters) {
  const int64_t count = num_tiles(logits), warps = blockDim.x / kWarp;
  const int64_t at = blockIdx.x * warps + warp_of_thread();
  if (at >= logits.num_rows * count) return;
  const int64_t i = at / count;
  const int t = static_cast<int>(at % count);
  const Row<T> row = row_of<T>(logits, i);
  Tile tile{kMinusInf, -1};
  bool is_bad = false;
  LaneOfTile(row, t).for_values([&](int index, float value) {
    if (value > tile.maximum) tile = {value, index};
    is_bad |= value != value || value == INFINITY;
  });
  is_bad = ballot(is_bad) != 0;
  tile = warp_reduce(tile, TakeTile());
  if (lane_of_thread() == 0) tiles[at] = is_bad ? Tile{NAN, -1} : tile;
  if (t == 0 && lane_of_thread() < kCounters) counters[i * kCounters + lane_of_thread()] = 0;
}

// A row's largest value and whether it is bad, to all threads of the block.
struct RowPeak {
  float maximum;
  bool is_bad;

  DFLASH_DEVICE bool is_drawable() const { return !is_bad && maximum > kMinusInf; }
};

DFLASH_DEVICE RowPeak row_peak(const Tile* tiles, int count) {
  DFLASH_SHARED(float, maxima, kWarps);
  DFLASH_SHARED(int, flags, kWarps);
  DFLASH_SHARED(float, peak, 1);
  DFLASH_SHARED(int, is_bad, 1);
  float maximum = kMinusInf;
  int bad = 0;
  for (int t = threadIdx.x; t < count; t += kThreads) {
    const float value = tiles[t].maximum;
    maximum = value > maximum ? value : maximum;
    bad |= value != value;
  }
  maximum = block_reduce(maximum, maxima, TakeMaximum());
  bad = block_reduce(bad, flags, TakeSum());
  if (threadIdx.x == 0) {
    peak[0] = maximum;
    is_bad[0] = bad;
  }
  __syncthreads();
  return {peak[0], is_bad[0] != 0};
}

// How a row's tiles are shared out among blocks.
struct Spans {
  unsigned count, tiles;  // of a row

  DFLASH_DEVICE int64_t row() const { return blockIdx.x / count; }
  DFLASH_DEVICE unsigned at() const { return blockIdx.x % count; }
  DFLASH_DEVICE int first() const { return static_cast<int>(at() * tiles / count); }
  DFLASH_DEVICE int last() const { return static_cast<int>((at() + 1) * tiles / count); }
};

// Calls use(tile) for the tiles of this warp.
template <class Use>
DFLASH_DEVICE void for_tiles(int first, int last, const Use& use) {
  for (int t = first + warp_of_thread(); t < last; t += kWarps) use(t);
}

DFLASH_DEVICE float scale_of(const PlanView& plan, int64_t row) {
  const float* parameters = plan.parameters(plan.row(row)[kRowSequence]);
  return is_greedy(parameters) ? 1.0f : parameters[kInvTemperature];
}

DFLASH_DEVICE float floor_of(const int64_t* states, int64_t row) {
  return states ? value_of_key(static_cast<uint32_t>(states[row * kStateColumns + kFloorKey])) : kMinusInf;
}

}  // namespace
}  // namespace dflash_ray
