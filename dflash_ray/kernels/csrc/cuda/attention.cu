// Attention over pages: keys and values are read where they lie.
//
// What a row sees is cut at multiples of kSplit positions, whatever else is in the step: one block for a row, up to four
// query heads that share a key head, and a split. Another kernel joins a row's splits in their order. A row's result
// depends on what it sees alone, to the bit.

#include "attention_backend.h"
#include "simt.cuh"

namespace dflash_ray {
namespace {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kHeads = 4;        // of a block
constexpr int kMostLanes = 8;    // values of a head that a lane holds
constexpr int kPart = 2;         // floats before a part's sums: largest score, sum of weights
static_assert(kSplit % (kWarp * kAttentionWarps) == 0);
static_assert(kWarp * kMostLanes == kMostHeadSize);

DFLASH_FN float larger(float a, float b) { return a > b ? a : b; }

// exp(score - maximum), 0 for what is not seen.
DFLASH_FN float weight_of(float score, float maximum) {
  return score == kMinusInf ? 0.0f : exp_of_nonpositive(score - maximum);
}

constexpr int kLoaded = 4;

// The next values of a head of which `left` are left; 0 behind its end. One load where they lie together.
template <class T>
DFLASH_DEVICE void load_some(const T* from, int left, float (&values)[kLoaded]) {
  struct alignas(kLoaded * sizeof(T)) Quad {
    T values[kLoaded];
  };
  if (left >= kLoaded && reinterpret_cast<uintptr_t>(from) % sizeof(Quad) == 0) {
    const Quad quad = *reinterpret_cast<const Quad*>(from);
    for (int j = 0; j < kLoaded; ++j) values[j] = to_float(quad.values[j]);
    return;
  }
  for (int j = 0; j < kLoaded; ++j) values[j] = j < left ? to_float(from[j]) : 0.0f;
}

// The largest and the sum of a value of each lane, to all lanes, joined in one order.
DFLASH_DEVICE float warp_maximum(float value) { return from_lane(warp_reduce(value, TakeMaximum()), 0); }
DFLASH_DEVICE float warp_total(float value) { return from_lane(warp_reduce(value, TakeSum()), 0); }

// What one warp, or one split, has seen: the sums are relative to `maximum`. Lane l holds values l, l + 32, ... of a head.
struct Sums {
  float maximum = kMinusInf, total = 0;
  float values[kMostLanes] = {};
};

// The blocks of a row: its slices of heads and its splits.
struct BlockPlace {
  int64_t line;
  int kv_head, first_head, num_heads;
  int64_t split;

  DFLASH_DEVICE BlockPlace(const AttentionView& view, int64_t num_splits) {
    const int group = view.heads / view.kv_heads, slices = (group + kHeads - 1) / kHeads;
    int64_t at = blockIdx.x;
    split = at % num_splits;
    at /= num_splits;
    const int slice = static_cast<int>(at % slices);
    at /= slices;
    kv_head = static_cast<int>(at % view.kv_heads);
    line = at / view.kv_heads;
    first_head = kv_head * group + slice * kHeads;
    const int left = group - slice * kHeads;
    num_heads = left < kHeads ? left : kHeads;
  }
};

template <class T>
DFLASH_KERNEL store_kernel(const T* rows, const int64_t* slots, int64_t width, T* cache) {
  const int64_t slot = slots[blockIdx.x];
  for (int64_t i = threadIdx.x; i < width; i += kThreads) cache[slot * width + i] = rows[blockIdx.x * width + i];
}

template <class T>
DFLASH_KERNEL_FITTING(2) attend_kernel(AttentionView view, int64_t num_splits, float* parts) {
  DFLASH_SHARED(float, query, kHeads * kMostHeadSize);
  DFLASH_SHARED(float, joined, kAttentionWarps * kHeads * (kPart + kMostHeadSize));
  const BlockPlace place(view, num_splits);
  const int lane = lane_of_thread(), warp = warp_of_thread(), size = view.size;
  const int64_t split_begin = place.split * kSplit, split_end = split_begin + kSplit;
  const int64_t seen_begin = view.begin(place.line), seen_end = view.end(place.line);
  if (split_end <= seen_begin || split_begin >= seen_end) return;  // nothing of it is seen, nor read when joined
  const T* queries =
      static_cast<const T*>(view.query) + view.row(place.line) * view.query_stride + place.first_head * size;
  for (int i = threadIdx.x; i < kHeads * kMostHeadSize; i += kAttentionThreads) {
    const int h = i / kMostHeadSize, j = i % kMostHeadSize;
    query[i] = h < place.num_heads && j < size ? to_float(queries[h * size + j]) : 0.0f;
  }
  __syncthreads();
  const T* keys = static_cast<const T*>(view.keys) + static_cast<int64_t>(place.kv_head) * size;
  const T* values = static_cast<const T*>(view.values) + static_cast<int64_t>(place.kv_head) * size;
  const int64_t stride = static_cast<int64_t>(view.kv_heads) * size;
  Sums sums[kHeads];
  for (int64_t first = split_begin + warp * kWarp; first < split_end; first += kAttentionThreads) {
    if (first >= seen_end || first + kWarp <= seen_begin) continue;
    const int64_t position = first + lane;
    const bool is_seen = position >= seen_begin && position < seen_end;
    const int64_t at = is_seen ? view.cache_row(place.line, position) * stride : 0;
    float scores[kHeads] = {}, weights[kHeads];
    for (int i = 0; is_seen && i < size; i += kLoaded) {
      float key[kLoaded];
      load_some(keys + at + i, size - i, key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int j = 0; j < kLoaded; ++j) scores[h] = fmaf(query[h * kMostHeadSize + i + j], key[j], scores[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float score = scores[h] * view.scale;
      if (view.softcap > 0) score = view.softcap * tanhf(score / view.softcap);
      if (!is_seen) score = kMinusInf;
      const float maximum = larger(sums[h].maximum, warp_maximum(score));
      const float weight = weight_of(score, maximum), kept = weight_of(sums[h].maximum, maximum);
      sums[h].total = fmaf(sums[h].total, kept, warp_total(weight));
      sums[h].maximum = maximum;
#pragma unroll
      for (int j = 0; j < kMostLanes; ++j) sums[h].values[j] *= kept;
      weights[h] = weight;
    }
    for (int other = 0; other < kWarp; ++other) {
      if (first + other < seen_begin || first + other >= seen_end) continue;
      const T* value = values + from_lane(at, other);
      float weight[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) weight[h] = from_lane(weights[h], other);
#pragma unroll
      for (int j = 0; j < kMostLanes; ++j) {
        const int i = j * kWarp + lane;
        if (i >= size) continue;
        const float v = to_float(value[i]);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) sums[h].values[j] = fmaf(weight[h], v, sums[h].values[j]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int to = (warp * kHeads + h) * (kPart + kMostHeadSize);
    if (lane == 0) {
      joined[to] = sums[h].maximum;
      joined[to + 1] = sums[h].total;
    }
#pragma unroll
    for (int j = 0; j < kMostLanes; ++j) joined[to + kPart + j * kWarp + lane] = sums[h].values[j];
  }
  __syncthreads();
  // The warps' sums, in their order.
  for (int h = 0; h < place.num_heads; ++h) {
    float* part = parts + ((place.line * view.heads + place.first_head + h) * num_splits + place.split) * (kPart + size);
    float maximum = kMinusInf, total = 0;
    for (int w = 0; w < kAttentionWarps; ++w) {
      maximum = larger(maximum, joined[(w * kHeads + h) * (kPart + kMostHeadSize)]);
    }
    for (int i = threadIdx.x; i < size; i += kAttentionThreads) {
      float sum = 0;
      for (int w = 0; w < kAttentionWarps; ++w) {
        const int from = (w * kHeads + h) * (kPart + kMostHeadSize);
        sum = fmaf(joined[from + kPart + i], weight_of(joined[from], maximum), sum);
      }
      part[kPart + i] = sum;
    }
    if (threadIdx.x != 0) continue;
    for (int w = 0; w < kAttentionWarps; ++w) {
      const int from = (w * kHeads + h) * (kPart + kMostHeadSize);
      total = fmaf(joined[from + 1], weight_of(joined[from], maximum), total);
    }
    part[0] = maximum;
    part[1] = total;
  }
}

// One block a line and head.
template <class T>
DFLASH_KERNEL join_kernel(AttentionView view, int64_t num_splits, const float* parts, T* out) {
  const int64_t line = blockIdx.x / view.heads, head = blockIdx.x % view.heads;
  const int64_t first = view.begin(line) / kSplit, last = (view.end(line) - 1) / kSplit;
  const int size = view.size;
  const float* mine = parts + static_cast<int64_t>(blockIdx.x) * num_splits * (kPart + size);
  float maximum = kMinusInf, total = 0;
  for (int64_t s = first; s <= last; ++s) maximum = larger(maximum, mine[s * (kPart + size)]);
  for (int64_t s = first; s <= last; ++s) {
    const float* part = mine + s * (kPart + size);
    total = fmaf(part[1], weight_of(part[0], maximum), total);
  }
  for (int i = threadIdx.x; i < size; i += kAttentionThreads) {
    float sum = 0;
    for (int64_t s = first; s <= last; ++s) {
      const float* part = mine + s * (kPart + size);
      sum = fmaf(part[kPart + i], weight_of(part[0], maximum), sum);
    }
    from_float(sum / total, out[(view.row(line) * view.heads + head) * size + i]);
  }
}

template <class T>
void attend_pages(const AttentionView& view, const void* key, const void* value, void* out) {
  const int64_t width = static_cast<int64_t>(view.kv_heads) * view.size;
  void *keys = const_cast<void*>(view.keys), *values = const_cast<void*>(view.values);
  if (key) {
    DFLASH_LAUNCH(store_kernel, view.num_rows, static_cast<const T*>(key), view.slots, width, static_cast<T*>(keys));
    DFLASH_LAUNCH(store_kernel, view.num_rows, static_cast<const T*>(value), view.slots, width, static_cast<T*>(values));
  }
  const int64_t group = view.heads / view.kv_heads, slices = (group + kHeads - 1) / kHeads;
  const int64_t lines_and_heads = view.num_lines * view.heads;
  if (lines_and_heads == 0) return;
  const auto memory = scratch_memory(lines_and_heads * view.num_splits * (kPart + view.size) * sizeof(float));
  float* parts = reinterpret_cast<float*>(memory.get());
  DFLASH_LAUNCH_WITH(kAttentionThreads, attend_kernel<T>, view.num_lines * view.kv_heads * slices * view.num_splits,
                     view, view.num_splits, parts);
  DFLASH_LAUNCH_WITH(kAttentionThreads, join_kernel<T>, lines_and_heads, view, view.num_splits, parts,
                     static_cast<T*>(out));
}

}  // namespace

void CudaAttention::attend(const AttentionView& view, const void* key, const void* value, void* out) {
  if (view.num_rows == 0) return;
  if (view.kind == Kind::kFloat32) attend_pages<float>(view, key, value, out);
  if (view.kind == Kind::kBfloat16) attend_pages<Bfloat16>(view, key, value, out);
  if (view.kind == Kind::kFloat16) attend_pages<Float16>(view, key, value, out);
}

}  // namespace dflash_ray
