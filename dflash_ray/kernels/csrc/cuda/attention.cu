// Attention over pages: keys and values are read where they lie, once for up to 16 rows of an entry and all query heads
// that share a key head.
//
// What a row sees is cut at multiples of kSplit positions, whatever else is in the step. A block has a tile, a key head
// and a split, a warp one of the query heads. A split's sums start afresh; splits are joined in their order, by the
// block that goes through all of them where an entry has many rows, else by another kernel: the same operations either
// way. Within a split keys come in units at multiples of their number. What a row does not see has weight 0 and changes
// none of its bits. Rows of a tree follow different rows at the same positions, so a unit with rows of the entry's own
// is read once for each row of the tile, in the places that it has in a chain. Thus a row's result depends on what it
// sees alone, to the bit: not on its neighbours, on chunks of prompts or on branches.

#include "attention_backend.h"
#include "attention_tile.cuh"

namespace dflash_ray {
namespace {

constexpr int kBlockHeads = 8;  // query heads of a block at most, a warp each
constexpr int kPart = 2;        // floats before a part's sums: largest score, sum of weights
constexpr int kJoinWarps = 4;

template <class T>
DFLASH_KERNEL store_kernel(const T* rows, const int64_t* slots, int64_t width, T* cache) {
  const int64_t slot = slots[blockIdx.x];
  for (int64_t i = threadIdx.x; i < width; i += kThreads) cache[slot * width + i] = rows[blockIdx.x * width + i];
}

// Sums relative to their largest score, to which the next ones in order are joined.
struct Joint {
  float maximum = kMinusInf, total = 0;
  float kept = 0, added = 0;  // what the sums before and the sums that were taken are multiplied by

  DFLASH_DEVICE void take(float next_maximum, float next_total) {
    const float joint = larger(maximum, next_maximum);
    kept = weight_of(maximum, joint);
    added = weight_of(next_maximum, joint);
    total = fmaf(next_total, added, total * kept);
    maximum = joint;
  }
  DFLASH_DEVICE float join(float before, float next) const { return fmaf(next, added, before * kept); }
};

// A block's tile and what of it the block has to do.
struct Place {
  AttentionView::Span span;  // positions that a row of the tile sees, of the block's splits
  AttentionView::Span seen;  // by row `lane` of the tile
  const int64_t* tile;
  int64_t first_row;
  int kv_head, head, num_rows, split;  // `head` is the warp's; below 0 without one
  bool is_whole;                       // all splits are this block's

  DFLASH_DEVICE Place(const AttentionView& view, int slice_heads) {
    const int group = view.heads / view.kv_heads, slices = (group + slice_heads - 1) / slice_heads;
    int64_t at = blockIdx.x;
    split = static_cast<int>(at % view.num_splits);
    at /= view.num_splits;
    const int in_group = static_cast<int>(at % slices) * slice_heads + warp_of_thread();
    at /= slices;
    kv_head = static_cast<int>(at % view.kv_heads);
    head = in_group < group ? kv_head * group + in_group : -1;
    tile = view.tiles + at / view.kv_heads * kTileColumns;
    num_rows = static_cast<int>(tile[kTileNumRows]);
    is_whole = tile[kTileParts] == 1;
    first_row = tile[kTileEntryRow] + tile[kTileBefore];
    const int lane = lane_of_thread();
    if (lane < num_rows) seen = view.seen(first_row + lane);
    int begin = seen.end > seen.begin ? seen.begin : INT32_MAX, end = seen.end;
    for (int delta = 1; delta < kWarp; delta *= 2) {
      const int other_begin = from_lane(begin, lane ^ delta), other_end = from_lane(end, lane ^ delta);
      begin = other_begin < begin ? other_begin : begin;
      end = other_end > end ? other_end : end;
    }
    const int from = is_whole ? 0 : split * kSplit, to = is_whole ? (split == 0 ? end : 0) : from + kSplit;
    span.begin = begin > from ? begin : from;
    span.end = end < to ? end : to;
  }
};

// Keys that are scored together: from position `first` on, for all rows of a tile or for one row of a tree.
struct Pass {
  int first, row;  // row below 0: all

  template <int kKeys>
  DFLASH_DEVICE static Pass at(int first, const AttentionView& view, const Place& place) {
    const bool branches = view.paths && place.tile[kTileIsTree] && first + kKeys > place.tile[kTileContext];
    return {first, branches ? 0 : -1};
  }
  template <int kKeys>
  DFLASH_DEVICE Pass next(const AttentionView& view, const Place& place) const {
    if (row >= 0 && row + 1 < place.num_rows) return {first, row + 1};
    return at<kKeys>(first + kKeys, view, place);
  }

  // The cache row of the key that this thread helps to load, below 0 for none.
  template <int kKeys>
  DFLASH_DEVICE int64_t cache_row(const AttentionView& view, const Place& place) const {
    const int position = first + static_cast<int>(threadIdx.x) / (static_cast<int>(blockDim.x) / kKeys);
    const int end = row < 0 ? place.span.end : view.seen(place.first_row + row).end;
    if (position < place.span.begin || position >= end) return -1;
    const int64_t own = position - place.tile[kTileContext];
    const unsigned page_size = static_cast<unsigned>(view.page_size), at = static_cast<unsigned>(position);
    if (own < 0) return view.pages[place.tile[kTilePageAt] + at / page_size] * view.page_size + at % page_size;
    const int64_t chosen = row < 0 ? own : view.paths[(place.first_row + row) * view.depth + own];
    return view.slots[place.tile[kTileEntryRow] + chosen];
  }
};

template <class T, int kSize>
DFLASH_KERNEL attend_kernel(AttentionView view, int slice_heads, float* parts) {
  using U = Unit<T, kSize>;
  DFLASH_SHARED(T, keys, U::kPlaces);
  DFLASH_SHARED(T, values, U::kPlaces);
  const Place place(view, slice_heads);
  if (place.num_rows == 0 || place.span.begin >= place.span.end) return;
  const int lane = lane_of_thread(), size = view.size, head = place.head < 0 ? 0 : place.head;
  const int row_of[2] = {lane / 4, lane / 4 + 8};
  int begin[2], end[2];
  const T* query[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    begin[i] = from_lane(place.seen.begin, row_of[i]);
    end[i] = from_lane(place.seen.end, row_of[i]);
    const int64_t row = place.first_row + (row_of[i] < place.num_rows ? row_of[i] : 0);  // what else sees nothing
    query[i] = static_cast<const T*>(view.query) + row * view.query_stride + static_cast<int64_t>(head) * size;
  }
  const Queries<T, kSize> queries(query[0], query[1], size);
  const T* all_keys = static_cast<const T*>(view.keys) + static_cast<int64_t>(place.kv_head) * size;
  const T* all_values = static_cast<const T*>(view.values) + static_cast<int64_t>(place.kv_head) * size;
  const int64_t stride = static_cast<int64_t>(view.kv_heads) * size;

  Joint joint[2];
  float maximum[2] = {kMinusInf, kMinusInf}, total[2] = {}, sums[kSize / 8][4] = {};
  bool is_first = true;
  Pass pass = Pass::at<U::kKeys>(place.span.begin / U::kKeys * U::kKeys, view, place);
  int64_t at = pass.cache_row<U::kKeys>(view, place);
  load_row<T, kSize>(keys, at < 0 ? nullptr : all_keys + at * stride, size);
  while (pass.first < place.span.end) {
    wait_for_copies();
    __syncthreads();
    load_row<T, kSize>(values, at < 0 ? nullptr : all_values + at * stride, size);
    float scores[U::kColumns][4] = {};
    queries.score(keys, scores);
    wait_for_copies();
    __syncthreads();
    const Pass next = pass.next<U::kKeys>(view, place);
    if (next.first < place.span.end) {
      at = next.cache_row<U::kKeys>(view, place);
      load_row<T, kSize>(keys, at < 0 ? nullptr : all_keys + at * stride, size);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool takes_part = pass.row < 0 || pass.row == row_of[i];
      float largest = maximum[i];
#pragma unroll
      for (int n = 0; n < U::kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int position = pass.first + n * 8 + lane % 4 * 2 + j;
          float& score = scores[n][2 * i + j];
          score *= view.scale;
          if (view.softcap > 0) score = view.softcap * tanhf(score / view.softcap);
          if (!takes_part || position < begin[i] || position >= end[i]) score = kMinusInf;
          largest = larger(largest, score);
        }
      }
      largest = quad_maximum(largest);
      const float kept = weight_of(maximum[i], largest);
      float added = 0;
#pragma unroll
      for (int n = 0; n < U::kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[n][2 * i + j];
          score = weight_of(score, largest);
          added += score;
        }
      }
      total[i] = fmaf(total[i], kept, added);
      maximum[i] = largest;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        sums[n][2 * i] *= kept;
        sums[n][2 * i + 1] *= kept;
      }
    }
    Queries<T, kSize>::add(scores, values, sums);
    const bool ends_split = next.first >= place.span.end || next.first / kSplit != pass.first / kSplit;
    pass = next;
    if (!ends_split) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      joint[i].take(maximum[i], quad_sum(total[i]));
      maximum[i] = kMinusInf, total[i] = 0;
      const bool is_mine = place.head >= 0 && row_of[i] < place.num_rows;
      const int64_t row = place.first_row + (is_mine ? row_of[i] : 0);
      float* part = parts + (view.first_part(row, head) + (place.is_whole ? 0 : place.split)) * (kPart + size);
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = n * 8 + lane % 4 * 2 + j;
          if (is_mine && column < size) {
            float& sum = part[kPart + column];
            sum = joint[i].join(is_first ? 0.0f : sum, sums[n][2 * i + j]);
          }
          sums[n][2 * i + j] = 0;
        }
      }
      if (is_mine && lane % 4 == 0) {
        part[0] = joint[i].maximum;
        part[1] = joint[i].total;
      }
    }
    is_first = false;
  }
}

// A warp a row and head.
template <class T>
DFLASH_KERNEL join_kernel(AttentionView view, const float* parts, T* out) {
  constexpr int kMostLanes = kMostHeadSize / kWarp;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kJoinWarps + warp_of_thread();
  if (at >= view.num_rows * view.heads) return;
  const int64_t row = at / view.heads, head = at % view.heads;
  const int lane = lane_of_thread(), size = view.size;
  const AttentionView::Span seen = view.seen(row);
  const int64_t num_parts = view.parts_of(row);
  const float* mine = parts + view.first_part(row, head) * (kPart + size);
  const int first = num_parts > 1 ? seen.begin / kSplit : 0, last = num_parts > 1 ? (seen.end - 1) / kSplit : 0;
  Joint joint;
  float sums[kMostLanes] = {};
  for (int split = first; num_parts > 0 && split <= last; ++split) {
    const float* part = mine + split * (kPart + size);
    joint.take(part[0], part[1]);
#pragma unroll
    for (int j = 0; j < kMostLanes; ++j) {
      const int i = j * kWarp + lane;
      if (i < size) sums[j] = joint.join(sums[j], part[kPart + i]);
    }
  }
#pragma unroll
  for (int j = 0; j < kMostLanes; ++j) {
    const int i = j * kWarp + lane;
    if (i < size) from_float(num_parts > 0 ? sums[j] / joint.total : 0.0f, out[at * size + i]);
  }
}

template <class T, int kSize>
void attend_tiles(const AttentionView& view, float* parts) {
  const int group = view.heads / view.kv_heads, slices = (group + kBlockHeads - 1) / kBlockHeads;
  const int slice_heads = (group + slices - 1) / slices;
  DFLASH_LAUNCH_WITH(kWarp * slice_heads, (attend_kernel<T, kSize>),
                     view.num_tiles * view.kv_heads * slices * view.num_splits, view, slice_heads, parts);
}

template <class T>
void attend_pages(const AttentionView& view, const void* key, const void* value, void* out) {
  const int64_t width = static_cast<int64_t>(view.kv_heads) * view.size;
  void *keys = const_cast<void*>(view.keys), *values = const_cast<void*>(view.values);
  if (key) {
    DFLASH_LAUNCH(store_kernel, view.num_rows, static_cast<const T*>(key), view.slots, width, static_cast<T*>(keys));
    DFLASH_LAUNCH(store_kernel, view.num_rows, static_cast<const T*>(value), view.slots, width, static_cast<T*>(values));
  }
  const auto memory = scratch_memory(view.num_parts * view.heads * (kPart + view.size) * sizeof(float));
  float* parts = reinterpret_cast<float*>(memory.get());
  if (view.num_tiles > 0 && view.num_splits > 0) {
    if (view.size <= 64) attend_tiles<T, 64>(view, parts);
    if (view.size > 64 && view.size <= 128) attend_tiles<T, 128>(view, parts);
    if (view.size > 128) attend_tiles<T, 256>(view, parts);
  }
  DFLASH_LAUNCH_WITH(kWarp * kJoinWarps, join_kernel<T>, (view.num_rows * view.heads + kJoinWarps - 1) / kJoinWarps, view,
                     parts, static_cast<T*>(out));
}

}  // namespace

void CudaAttention::attend(const AttentionView& view, const void* key, const void* value, void* out) {
  if (view.num_rows == 0) return;
  if (view.kind == Kind::kFloat32) attend_pages<float>(view, key, value, out);
  if (view.kind == Kind::kBfloat16) attend_pages<Bfloat16>(view, key, value, out);
  if (view.kind == Kind::kFloat16) attend_pages<Float16>(view, key, value, out);
}

}  // namespace dflash_ray
