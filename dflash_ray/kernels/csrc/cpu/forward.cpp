// Norm and attention of a forward pass on CPU as operators of their own, float32.

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "../operators.h"
#include "attention.h"
#include "elementwise.h"
#include "team.h"

namespace dflash_ray {

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor rows = x.contiguous();
  at::Tensor out = at::empty_like(rows);
  const int64_t size = rows.size(-1), count = size ? rows.numel() / size : 0;
  const float* from = rows.const_data_ptr<float>();
  const float* by = weight.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  in_ranges(count, std::max<int64_t>(1, 32768 / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rms_norm_row(from + i * size, by, eps, size, to + i * size);
  });
  return out;
}

at::Tensor paged_attention_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               at::Tensor& key_cache, at::Tensor& value_cache, const at::Tensor& slots,
                               const at::Tensor& entry_lens, const at::Tensor& context_lens,
                               const at::Tensor& page_counts, const at::Tensor& pages, int64_t page_size, double scale,
                               int64_t window, double softcap, bool is_causal,
                               const std::optional<at::Tensor>& parents) {
  const at::Tensor queries = query.contiguous(), new_keys = key.contiguous(), new_values = value.contiguous();
  const HeadShape shape{queries.size(1), new_keys.size(1), queries.size(2), static_cast<float>(scale),
                        static_cast<float>(softcap)};
  const int64_t stride = shape.kv_heads * shape.size, rows = queries.size(0);
  float* keys = key_cache.mutable_data_ptr<float>();
  float* values = value_cache.mutable_data_ptr<float>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(new_keys.const_data_ptr<float>() + row * stride, stride, keys + slot[row] * stride);
    std::copy_n(new_values.const_data_ptr<float>() + row * stride, stride, values + slot[row] * stride);
  }
  const at::Tensor tree = parents.value_or(entry_lens.slice(0, 0, 0));
  TORCH_CHECK(tree.numel() == 0 || (is_causal && tree.numel() == rows), "rows of a tree have a parent each");
  const CacheView view(entry_lens, context_lens, page_counts, pages, tree, page_size, stride);
  at::Tensor out = at::empty({rows, shape.heads, shape.size}, queries.options());
  float* to = out.mutable_data_ptr<float>();
  const float* from = queries.const_data_ptr<float>();
  const AttentionWork work(view, shape, window, is_causal, keys, values);
  const int64_t width = shape.heads * shape.size;
  for_pieces(work.num_pieces(), [&](int64_t piece) { work.run(piece, from, width, to, width); });
  return out;
}

void move_rows_cpu(at::TensorList caches, const at::Tensor& from, const at::Tensor& to) {
  const int64_t* source = from.const_data_ptr<int64_t>();
  const int64_t* target = to.const_data_ptr<int64_t>();
  for (const at::Tensor& cache : caches) {
    TORCH_CHECK(cache.is_contiguous(), "a cache is contiguous");
    char* rows = static_cast<char*>(cache.data_ptr());
    const int64_t bytes = cache.stride(0) * cache.element_size();
    for (int64_t i = 0; i < from.numel(); ++i) std::memmove(rows + target[i] * bytes, rows + source[i] * bytes, bytes);
  }
}

}  // namespace dflash_ray
