// Attention over the rows of a paged cache, read where they lie. Every row of a step is computed by itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../verify_core.cuh"
#include "vectors.h"

namespace dflash_ray {

struct HeadShape {
  int64_t heads, kv_heads, size;
  float scale, softcap;
};

// Lane l is lane l of `a` or, where bit kBit of l is set, of `b`, with the lane at distance kBit added.
template <int kBit, size_t... kLane>
inline Lanes join_halves(const Lanes& a, const Lanes& b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kBit) ? kLanes + kLane : kLane)...) +
         __builtin_shufflevector(a, b, ((kLane & kBit) ? kLanes + (kLane ^ kBit) : (kLane ^ kBit))...);
}

// Lane i of the result is the sum of totals[i]; every one of them is added up in the same order.
template <int kBit = kLanes / 2>
inline Lanes sums_of(Lanes* totals) {
  for (int i = 0; i < kBit; ++i) {
    totals[i] = join_halves<kBit>(totals[i], totals[i + kBit], std::make_index_sequence<kLanes>());
  }
  if constexpr (kBit > 1) return sums_of<kBit / 2>(totals);
  return totals[0];
}

// Scores of kLanes keys with one query; those from `count` on are not stored.
inline void score(const float* query, const float* const* key, int64_t count, int64_t size, float scale,
                  float* scores) {
  Lanes totals[kLanes]{};
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) {
    const Lanes part = load(query + at);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) totals[i] += part * load(key[i] + at);
  }
  Lanes sums = sums_of(totals);
  for (; at < size; ++at) {
    for (int i = 0; i < kLanes; ++i) sums[i] += query[at] * key[i][at];
  }
  sums *= scale;
  if (count >= kLanes) {
    store(scores, sums);
  } else {
    for (int i = 0; i < count; ++i) scores[i] = sums[i];
  }
}

// Scores [heads, count] of `heads` queries, one after the other, with the keys at `offsets`, each of which is read once.
inline void score_heads(const float* queries, int64_t heads, const float* keys, const int64_t* offsets, int64_t count,
                        int64_t size, float scale, float* scores) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const float* key[kLanes];
    for (int i = 0; i < kLanes; ++i) key[i] = keys + offsets[std::min(j + i, count - 1)];
    for (int64_t h = 0; h < heads; ++h) score(queries + h * size, key, count - j, size, scale, scores + h * count + j);
  }
}

// Scores to weights exp(score - highest); returns their sum.
inline float weigh(float* scores, int64_t count, float softcap) {
  if (softcap > 0) {
    for (int64_t j = 0; j < count; ++j) scores[j] = softcap * std::tanh(scores[j] / softcap);
  }
  Lanes best = Lanes{} + scores[0], totals{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) best = load(scores + j) > best ? load(scores + j) : best;
  float highest = largest(best);
  for (; j < count; ++j) highest = std::max(highest, scores[j]);
  for (j = 0; j < count; ++j) scores[j] = exp_of_nonpositive(scores[j] - highest);
  for (j = 0; j + kLanes <= count; j += kLanes) totals += load(scores + j);
  float total = sum(totals);
  for (; j < count; ++j) total += scores[j];
  return total;
}

constexpr int kValueVectors = kLanes == 16 ? 4 : 2;  // registers of a value row that are summed together

// Sums over j of weights[h * count + j] * values[offsets[j] ...] for kHeads heads, kVectors registers of them, times
// their scale. Every output is one chain over j.
template <int kHeads, int kVectors>
[[gnu::noinline]] void weighted_sum(const float* weights, const float* scales, const float* values,
                                    const int64_t* offsets, int64_t count, int64_t size, float* out) {
  Lanes totals[kHeads][kVectors]{};
  for (int64_t j = 0; j < count; ++j) {
    const float* value = values + offsets[j];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Lanes part = load(value + v * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) totals[h][v] += weights[h * count + j] * part;
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + h * size + v * kLanes, totals[h][v] * scales[h]);
  }
}

template <int kHeads>
inline void weighted_sums(const float* weights, const float* scales, const float* values, const int64_t* offsets,
                          int64_t count, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + kValueVectors * kLanes <= size; i += kValueVectors * kLanes) {
    weighted_sum<kHeads, kValueVectors>(weights, scales, values + i, offsets, count, size, out + i);
  }
  for (; i + kLanes <= size; i += kLanes) {
    weighted_sum<kHeads, 1>(weights, scales, values + i, offsets, count, size, out + i);
  }
  for (; i < size; ++i) {
    for (int h = 0; h < kHeads; ++h) {
      float total = 0;
      for (int64_t j = 0; j < count; ++j) total += weights[h * count + j] * values[offsets[j] + i];
      out[h * size + i] = total * scales[h];
    }
  }
}

// Attention of one row's query heads that share a key head, over the cache rows at `offsets`.
inline void attend(const float* query, const float* keys, const float* values, const HeadShape& shape,
                   const int64_t* offsets, int64_t count, std::vector<float>& scores, float* out) {
  constexpr int64_t kHeadsAtOnce = 4;
  const int64_t group = shape.heads / shape.kv_heads, size = shape.size;
  scores.resize(kHeadsAtOnce * count);
  for (int64_t first = 0; first < group; first += kHeadsAtOnce) {
    const int64_t heads = std::min(kHeadsAtOnce, group - first);
    float scales[kHeadsAtOnce];
    score_heads(query + first * size, heads, keys, offsets, count, size, shape.scale, scores.data());
    for (int64_t h = 0; h < heads; ++h) scales[h] = 1.0f / weigh(scores.data() + h * count, count, shape.softcap);
    float* to = out + first * size;
    switch (heads) {
      case 1: weighted_sums<1>(scores.data(), scales, values, offsets, count, size, to); break;
      case 2: weighted_sums<2>(scores.data(), scales, values, offsets, count, size, to); break;
      case 3: weighted_sums<3>(scores.data(), scales, values, offsets, count, size, to); break;
      default: weighted_sums<4>(scores.data(), scales, values, offsets, count, size, to); break;
    }
  }
}

// Where every row of every entry lies in a cache with `stride` floats a row, and what each row of the step sees.
//
// What a row sees is a stretch of one list of offsets, in the order of positions. An entry has one list; a tree of drafts
// has one for each of its leaves, which all rows on the way to it share. So a row of a tree sees its context, its
// ancestors and itself in the order in which it would see them in a chain.
class CacheView {
 public:
  // `parents` [T] or empty, for chains alone: the row that a row follows, counted within its entry, -1 for an entry's
  // first. A parent comes before its children.
  CacheView(const at::Tensor& entry_lens, const at::Tensor& context_lens, const at::Tensor& page_counts,
            const at::Tensor& pages, const at::Tensor& parents, int64_t page_size, int64_t stride) {
    const int64_t* page = pages.const_data_ptr<int64_t>();
    const int64_t* parent = parents.numel() ? parents.const_data_ptr<int64_t>() : nullptr;
    for (int64_t entry = 0; entry < entry_lens.size(0); ++entry) {
      const int64_t context = context_lens.const_data_ptr<int64_t>()[entry];
      const int64_t total = context + entry_lens.const_data_ptr<int64_t>()[entry];
      const int64_t start = offsets_.size();
      for (int64_t at = 0; at < total; ++at) {
        offsets_.push_back((page[at / page_size] * page_size + at % page_size) * stride);
      }
      for (int64_t at = context; at < total; ++at) rows_.push_back({start, at, total});
      if (parent) branch(parent + rows_.size() - (total - context), start, context, total - context);
      page += page_counts.const_data_ptr<int64_t>()[entry];
    }
  }

  int64_t num_rows() const { return rows_.size(); }

  // Cache rows that a row of the step sees: `count` of them from `first` on.
  struct Seen {
    const int64_t* first;
    int64_t count;
  };

  Seen seen(int64_t row, int64_t window, bool is_causal) const {
    const auto& [start, at, total] = rows_[row];
    const int64_t reach = window > 0 ? window : total, first = std::max<int64_t>(0, at - reach + 1);
    const int64_t last = is_causal ? at + 1 : std::min(total, at + reach);
    return {offsets_.data() + start + first, last - first};
  }

  // Rows seen on average, without a window.
  int64_t mean_count() const {
    int64_t sum = 0;
    for (const RowPlace& row : rows_) sum += row.at + 1;
    return rows_.empty() ? 0 : sum / num_rows();
  }

 private:
  struct RowPlace {
    int64_t start, at, total;  // first offset of its list, the row's position, the list's end
  };

  // Gives the rows of the last entry, of which `start` is the list, lists of their own where they are no chain.
  void branch(const int64_t* parent, int64_t start, int64_t context, int64_t count) {
    RowPlace* rows = rows_.data() + rows_.size() - count;
    std::vector<bool> has_list(count), is_parent(count);
    bool is_chain = true;
    for (int64_t i = 0; i < count; ++i) {
      is_chain &= parent[i] == i - 1;
      rows[i].at = context;
      if (parent[i] >= 0) rows[i].at = rows[parent[i]].at + 1, is_parent[parent[i]] = true;
    }
    for (int64_t leaf = 0; leaf < count && !is_chain; ++leaf) {
      if (is_parent[leaf]) continue;
      const int64_t own = offsets_.size(), length = rows[leaf].at + 1;
      offsets_.resize(own + length);
      std::copy_n(offsets_.data() + start, context, offsets_.data() + own);
      for (int64_t i = leaf; i >= 0; i = parent[i]) {
        offsets_[own + rows[i].at] = offsets_[start + context + i];
        if (!has_list[i]) rows[i].start = own, rows[i].total = length;
        has_list[i] = true;
      }
    }
  }

  std::vector<int64_t> offsets_;
  std::vector<RowPlace> rows_;
};

// The attention of a step as pieces of (key head, row) pairs, some microseconds each.
struct AttentionWork {
  const CacheView& view;
  HeadShape shape;
  int64_t window;
  bool is_causal;
  const float *keys, *values;
  int64_t items, items_a_piece;

  AttentionWork(const CacheView& view, const HeadShape& shape, int64_t window, bool is_causal, const float* keys,
                const float* values)
      : view(view), shape(shape), window(window), is_causal(is_causal), keys(keys), values(values) {
    const int64_t count = window > 0 ? std::min(window, view.mean_count()) : view.mean_count();
    const int64_t cost = std::max<int64_t>(1, count * shape.heads / shape.kv_heads * shape.size);
    items = view.num_rows() * shape.kv_heads;
    items_a_piece = std::max<int64_t>(1, 32768 / cost);
  }

  int64_t num_pieces() const { return (items + items_a_piece - 1) / items_a_piece; }

  // Queries [heads, size] of row i begin at queries + i * query_stride, its results at out + i * out_stride.
  void run(int64_t piece, const float* queries, int64_t query_stride, float* out, int64_t out_stride) const {
    static thread_local std::vector<float> scores;
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t item = piece * items_a_piece; item < std::min(items, (piece + 1) * items_a_piece); ++item) {
      // Rows of one key head follow each other, so that its keys stay in the processor's cache.
      const int64_t row = item % view.num_rows(), kv_head = item / view.num_rows();
      const auto [first, count] = view.seen(row, window, is_causal);
      attend(queries + row * query_stride + kv_head * group * shape.size, keys + kv_head * shape.size,
             values + kv_head * shape.size, shape, first, count, scores,
             out + row * out_stride + kv_head * group * shape.size);
    }
  }
};

}  // namespace dflash_ray
