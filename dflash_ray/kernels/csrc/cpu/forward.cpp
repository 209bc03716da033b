// What stands between the matrix products of a forward pass on CPU, float32.
//
// At a few rows a pass costs the reading of the weights; what stands between the matrix products must cost next to
// nothing. Every row is computed by itself and in a fixed order, so its result does not depend on its neighbours.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../operators.h"
#include "../verify_core.cuh"
#include "vectors.h"

namespace dflash_ray {
namespace {

void rms_norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
  const float scale = 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

struct HeadShape {
  int64_t heads, kv_heads, size;
  float scale, softcap;
};

// Sum over j of weights[j] * values[offsets[j] ...], kVectors registers of it.
template <int kVectors>
void weighted_sum(const float* weights, const float* values, const int64_t* offsets, int64_t count, float* out) {
  Lanes total[kVectors]{};
  for (int64_t j = 0; j < count; ++j) {
    const float* value = values + offsets[j];
    for (int v = 0; v < kVectors; ++v) total[v] += weights[j] * load(value + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, total[v]);
}

void weighted_sum(const float* weights, const float* values, const int64_t* offsets, int64_t count, int64_t size,
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
void attend(const float* query, const float* keys, const float* values, const HeadShape& shape, const int64_t* offsets,
            int64_t count, std::vector<float>& scores, float* out) {
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

}  // namespace

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor rows = x.contiguous();
  at::Tensor out = at::empty_like(rows);
  const int64_t size = rows.size(-1), count = size ? rows.numel() / size : 0;
  const float* from = rows.const_data_ptr<float>();
  const float* by = weight.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rms_norm_row(from + i * size, by, eps, size, to + i * size);
  });
  return out;
}

at::Tensor silu_and_mul_cpu(const at::Tensor& gate_up) {
  const at::Tensor rows = gate_up.contiguous();
  const int64_t size = rows.size(-1) / 2, count = size ? rows.numel() / (2 * size) : 0;
  auto shape = rows.sizes().vec();
  shape.back() = size;
  at::Tensor out = at::empty(shape, rows.options());
  const float* from = rows.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, 16384 / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = from + 2 * row * size;
      for (int64_t i = 0; i < size; ++i) {
        // silu(g) = g / (1 + exp(-g)); for g < 0 through exp(g), so that the exponent is never positive.
        const float g = gate[i], e = exp_of_nonpositive(-std::fabs(g));
        to[row * size + i] = g * (g < 0 ? e : 1.0f) / (1.0f + e) * gate[size + i];
      }
    }
  });
  return out;
}

at::Tensor paged_attention_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               at::Tensor& key_cache, at::Tensor& value_cache, const at::Tensor& slots,
                               const at::Tensor& entry_lens, const at::Tensor& context_lens,
                               const at::Tensor& page_counts, const at::Tensor& pages, int64_t page_size, double scale,
                               int64_t window, double softcap, bool is_causal) {
  const at::Tensor queries = query.contiguous(), new_keys = key.contiguous(), new_values = value.contiguous();
  const HeadShape shape{queries.size(1), new_keys.size(1), queries.size(2), static_cast<float>(scale),
                        static_cast<float>(softcap)};
  const int64_t group = shape.heads / shape.kv_heads, stride = shape.kv_heads * shape.size, rows = queries.size(0);
  float* keys = key_cache.mutable_data_ptr<float>();
  float* values = value_cache.mutable_data_ptr<float>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(new_keys.const_data_ptr<float>() + row * stride, stride, keys + slot[row] * stride);
    std::copy_n(new_values.const_data_ptr<float>() + row * stride, stride, values + slot[row] * stride);
  }
  // Where every row of every entry lies in the cache, and which of them each row of the step sees.
  struct Row {
    int64_t first, count;  // into offsets
  };
  std::vector<int64_t> offsets;
  std::vector<Row> plan;
  plan.reserve(rows);
  const int64_t* page = pages.const_data_ptr<int64_t>();
  int64_t work = 0;
  for (int64_t entry = 0; entry < entry_lens.size(0); ++entry) {
    const int64_t context = context_lens.const_data_ptr<int64_t>()[entry];
    const int64_t length = entry_lens.const_data_ptr<int64_t>()[entry];
    const int64_t start = offsets.size();
    for (int64_t at = 0; at < context + length; ++at) {
      offsets.push_back((page[at / page_size] * page_size + at % page_size) * stride);
    }
    const int64_t total = context + length, reach = window > 0 ? window : total;
    for (int64_t at = context; at < total; ++at) {
      const int64_t first = std::max<int64_t>(0, at - reach + 1);
      const int64_t last = is_causal ? at + 1 : std::min(total, at + reach);
      plan.push_back({start + first, last - first});
      work += last - first;
    }
    page += page_counts.const_data_ptr<int64_t>()[entry];
  }
  at::Tensor out = at::empty({rows, shape.heads, shape.size}, queries.options());
  float* to = out.mutable_data_ptr<float>();
  const float* from = queries.const_data_ptr<float>();
  const int64_t items = rows * shape.kv_heads;
  const int64_t cost = std::max<int64_t>(1, work / std::max<int64_t>(rows, 1) * group * shape.size);
  at::parallel_for(0, items, std::max<int64_t>(1, 32768 / cost), [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t item = begin; item < end; ++item) {
      // Rows of one key head follow each other, so that its keys stay in the processor's cache.
      const int64_t row = item % rows, kv_head = item / rows;
      const int64_t at = (row * shape.heads + kv_head * group) * shape.size;
      attend(from + at, keys + kv_head * shape.size, values + kv_head * shape.size, shape,
             offsets.data() + plan[row].first, plan[row].count, scores, to + at);
    }
  });
  return out;
}

}  // namespace dflash_ray
