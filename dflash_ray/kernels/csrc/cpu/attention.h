// Attention over the rows of a paged cache, read where they lie. Every row of a step is computed by itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../verify_core.cuh"
#include "vectors.h"

namespace dflash_ray {

struct HeadShape {
  int64_t heads, kv_heads, size;
  float scale, softcap;
};

// Sum over j of weights[j] * values[offsets[j] ...], kVectors registers of it.
template <int kVectors>
inline void weighted_sum(const float* weights, const float* values, const int64_t* offsets, int64_t count, float* out) {
  Lanes total[kVectors]{};
  for (int64_t j = 0; j < count; ++j) {
    const float* value = values + offsets[j];
    for (int v = 0; v < kVectors; ++v) total[v] += weights[j] * load(value + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, total[v]);
}

inline void weighted_sum(const float* weights, const float* values, const int64_t* offsets, int64_t count, int64_t size,
                         float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) weighted_sum<4>(weights, values + i, offsets, count, out + i);
  for (; i + kLanes <= size; i += kLanes) weighted_sum<1>(weights, values + i, offsets, count, out + i);
  for (; i < size; ++i) {
    float total = 0;
    for (int64_t j = 0; j < count; ++j) total += weights[j] * values[offsets[j] + i];
    out[i] = total;
  }
}

// Attention of one row's query heads that share a key head, over the cache rows at `offsets`.
inline void attend(const float* query, const float* keys, const float* values, const HeadShape& shape,
                   const int64_t* offsets, int64_t count, std::vector<float>& scores, float* out) {
  const int64_t group = shape.heads / shape.kv_heads, size = shape.size;
  scores.resize(group * count);
  for (int64_t j = 0; j < count; ++j) {
    const float* key = keys + offsets[j];
    for (int64_t g = 0; g < group; ++g) scores[g * count + j] = dot(query + g * size, key, size) * shape.scale;
  }
  for (int64_t g = 0; g < group; ++g) {
    float* row = scores.data() + g * count;
    if (shape.softcap > 0) {
      for (int64_t j = 0; j < count; ++j) row[j] = shape.softcap * std::tanh(row[j] / shape.softcap);
    }
    const float highest = *std::max_element(row, row + count);
    for (int64_t j = 0; j < count; ++j) row[j] = exp_of_nonpositive(row[j] - highest);
    float total = 0;
    for (int64_t j = 0; j < count; ++j) total += row[j];
    weighted_sum(row, values, offsets, count, size, out + g * size);
    const float inverse = 1.0f / total;
    for (int64_t i = 0; i < size; ++i) out[g * size + i] *= inverse;
  }
}

// Where every row of every entry lies in a cache with `stride` floats a row, and what each row of the step sees.
class CacheView {
 public:
  CacheView(const at::Tensor& entry_lens, const at::Tensor& context_lens, const at::Tensor& page_counts,
            const at::Tensor& pages, int64_t page_size, int64_t stride) {
    const int64_t* page = pages.const_data_ptr<int64_t>();
    for (int64_t entry = 0; entry < entry_lens.size(0); ++entry) {
      const int64_t context = context_lens.const_data_ptr<int64_t>()[entry];
      const int64_t total = context + entry_lens.const_data_ptr<int64_t>()[entry];
      const int64_t start = offsets_.size();
      for (int64_t at = 0; at < total; ++at) {
        offsets_.push_back((page[at / page_size] * page_size + at % page_size) * stride);
      }
      for (int64_t at = context; at < total; ++at) rows_.push_back({start, at, total});
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
    int64_t start, at, total;  // first offset of the entry, the row's position, the entry's end
  };

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

  // Queries of row i begin at queries + i * query_stride; out [rows, heads, size].
  void run(int64_t piece, const float* queries, int64_t query_stride, float* out) const {
    static thread_local std::vector<float> scores;
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t item = piece * items_a_piece; item < std::min(items, (piece + 1) * items_a_piece); ++item) {
      // Rows of one key head follow each other, so that its keys stay in the processor's cache.
      const int64_t row = item % view.num_rows(), kv_head = item / view.num_rows();
      const auto [first, count] = view.seen(row, window, is_causal);
      attend(queries + row * query_stride + kv_head * group * shape.size, keys + kv_head * shape.size,
             values + kv_head * shape.size, shape, first, count, scores,
             out + (row * shape.heads + kv_head * group) * shape.size);
    }
  }
};

}  // namespace dflash_ray
