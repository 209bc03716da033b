// Attention over pages as torch sees it. Shapes and meaning: kernels/attention.py.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "attention_core.h"

namespace dflash_ray {

template <class Backend, class Guard>
struct AttentionOps {
  static at::Tensor attend(const at::Tensor& query, const std::optional<at::Tensor>& key,
                           const std::optional<at::Tensor>& value, at::Tensor& keys, at::Tensor& values,
                           const at::Tensor& slots, const at::Tensor& row_plan, const at::Tensor& tiles,
                           const at::Tensor& pages, const std::optional<at::Tensor>& paths, int64_t page_size,
                           int64_t num_splits, int64_t num_parts, double scale, int64_t window, double softcap,
                           bool is_causal) {
    const Guard guard(query);
    const auto type = query.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                "queries must be float32, bfloat16 or float16, not ", type);
    TORCH_CHECK(key.has_value() == value.has_value(), "keys and values are stored together");
    const at::Tensor k = key ? key->contiguous() : at::Tensor(), v = value ? value->contiguous() : at::Tensor();
    const auto has_shape = [&](const at::Tensor& each) {
      return each.dim() == 3 && each.scalar_type() == type && each.size(2) == query.size(2);
    };
    TORCH_CHECK(has_shape(query) && has_shape(keys) && has_shape(values) && (!key || (has_shape(k) && has_shape(v))),
                "queries, keys, values and caches must be of one type, [rows, heads, size]");
    // Queries may lie beside their keys and values.
    const bool is_dense = query.stride(2) == 1 && query.stride(1) == query.size(2);
    const at::Tensor q = is_dense ? query : query.contiguous();
    const int64_t rows = q.size(0), heads = q.size(1), kv_heads = keys.size(1), size = q.size(2);
    TORCH_CHECK(keys.is_contiguous() && values.is_contiguous() && keys.sizes() == values.sizes() &&
                    (!key || (k.sizes() == v.sizes() && k.size(0) == rows && k.size(1) == kv_heads)),
                "keys, values and caches must be contiguous and of one number of heads");
    TORCH_CHECK(heads % kv_heads == 0 && size <= kMostHeadSize, "heads of ", size, " values, ", heads, " on ", kv_heads);
    const auto is_table = [](const at::Tensor& each, int64_t columns) {
      return each.scalar_type() == at::kLong && each.is_contiguous() && each.dim() == 2 && each.size(1) == columns;
    };
    TORCH_CHECK(is_table(row_plan, kRowAttentionColumns) && row_plan.size(0) == rows && is_table(tiles, kTileColumns),
                "a plan is contiguous int64, [T, ", int{kRowAttentionColumns}, "] and [N, ", int{kTileColumns}, "]");
    TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous() && slots.numel() == rows &&
                    pages.scalar_type() == at::kLong && pages.is_contiguous(),
                "slots [T] and pages must be contiguous int64");
    TORCH_CHECK(!paths || (is_table(*paths, paths->size(1)) && paths->size(0) == rows),
                "paths must be a contiguous int64 [T, depth]");
    at::Tensor out = at::empty({rows, heads, size}, q.options());
    const Kind kind = type == at::kFloat ? Kind::kFloat32 : type == at::kHalf ? Kind::kFloat16 : Kind::kBfloat16;
    const AttentionView view{q.const_data_ptr(),
                             keys.data_ptr(),
                             values.data_ptr(),
                             slots.const_data_ptr<int64_t>(),
                             row_plan.const_data_ptr<int64_t>(),
                             tiles.const_data_ptr<int64_t>(),
                             pages.const_data_ptr<int64_t>(),
                             paths ? paths->const_data_ptr<int64_t>() : nullptr,
                             q.stride(0),
                             rows,
                             tiles.size(0),
                             paths ? paths->size(1) : 0,
                             page_size,
                             num_splits,
                             num_parts,
                             static_cast<int>(heads),
                             static_cast<int>(kv_heads),
                             static_cast<int>(size),
                             static_cast<int>(window),
                             is_causal,
                             static_cast<float>(scale),
                             static_cast<float>(softcap),
                             kind};
    Backend::attend(view, key ? k.const_data_ptr() : nullptr, value ? v.const_data_ptr() : nullptr,
                    out.mutable_data_ptr());
    return out;
  }
};

inline void define_attention_ops(torch::Library& library) {
  library.def(
      "attend_pages(Tensor query, Tensor? key, Tensor? value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
      "Tensor rows, Tensor tiles, Tensor pages, Tensor? paths, int page_size, int num_splits, int num_parts, "
      "float scale, int window, float softcap, bool is_causal) -> Tensor");
}

}  // namespace dflash_ray
