// The operators between a decoder layer's products as torch sees them, on devices where a layer is several operators.
//
// Shapes and meaning are those of kernels/layer_ops.py. Nothing waits for the device.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "cuda/layer_backend.h"

namespace dflash_ray {

template <class Backend, class Guard>
struct LayerOps {
  static at::Tensor add_norm(at::Tensor& hidden, const std::optional<at::Tensor>& delta,
                             const std::optional<at::Tensor>& after, const at::Tensor& weight, double eps,
                             double scale) {
    const Guard guard(hidden);
    const RowsView rows = rows_view(hidden);
    TORCH_CHECK(!after || delta, "there is nothing to norm before it is added");
    TORCH_CHECK(!delta || (delta->sizes() == hidden.sizes() && delta->scalar_type() == hidden.scalar_type() &&
                           delta->is_contiguous()),
                "what is added has the shape and the type of the rows, contiguous");
    at::Tensor out = at::empty_like(hidden);
    Backend::add_norm(rows, delta ? delta->const_data_ptr() : nullptr, after ? floats(*after, rows.width) : nullptr,
                      floats(weight, rows.width), static_cast<float>(eps), static_cast<float>(scale),
                      out.mutable_data_ptr());
    return out;
  }

  static void turn_and_store(at::Tensor& qkv, const std::optional<at::Tensor>& q_norm,
                             const std::optional<at::Tensor>& k_norm, const at::Tensor& cos, const at::Tensor& sin,
                             const at::Tensor& slots, at::Tensor& keys, at::Tensor& values, double eps) {
    const Guard guard(qkv);
    HeadsView heads;
    heads.rows = rows_view(qkv);
    TORCH_CHECK(keys.dim() == 3 && keys.sizes() == values.sizes() && keys.is_contiguous() && values.is_contiguous() &&
                    keys.scalar_type() == qkv.scalar_type() && values.scalar_type() == qkv.scalar_type(),
                "caches are contiguous [rows, n_kv, d] of the type of q, k and v");
    heads.kv_heads = keys.size(1), heads.head_dim = keys.size(2);
    heads.heads = heads.rows.width / heads.head_dim - 2 * heads.kv_heads;
    TORCH_CHECK(heads.heads > 0 && heads.rows.width % heads.head_dim == 0 && heads.head_dim % 2 == 0 &&
                    heads.heads + heads.kv_heads <= 512,
                "rows of ", heads.rows.width, " values are no heads of ", heads.head_dim, " (512 at most)");
    TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "queries and keys are normed together");
    heads.q_norm = q_norm ? floats(*q_norm, heads.head_dim) : nullptr;
    heads.k_norm = k_norm ? floats(*k_norm, heads.head_dim) : nullptr;
    heads.cos = floats(cos, heads.rows.num_rows * heads.head_dim);
    heads.sin = floats(sin, heads.rows.num_rows * heads.head_dim);
    TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous() && slots.numel() == heads.rows.num_rows,
                "slots are int64 [T]");
    heads.slots = slots.const_data_ptr<int64_t>();
    heads.keys = keys.mutable_data_ptr(), heads.values = values.mutable_data_ptr();
    heads.eps = static_cast<float>(eps);
    Backend::turn_and_store(heads);
  }

  static at::Tensor activate(const at::Tensor& gate_up, bool is_gelu) {
    const Guard guard(gate_up);
    const RowsView rows = rows_view(gate_up);
    TORCH_CHECK(rows.width % 2 == 0, "gates and ups are of one number");
    at::Tensor out = at::empty({rows.num_rows, rows.width / 2}, gate_up.options());
    Backend::activate(rows, is_gelu, out.mutable_data_ptr());
    return out;
  }

  static at::Tensor convolve(const at::Tensor& x, const at::Tensor& coefficients, const at::Tensor& base, int64_t side,
                             int64_t block) {
    const Guard guard(x);
    ConvolutionView view;
    view.rows = rows_view(x);
    TORCH_CHECK(base.dim() == 3 && base.size(0) == 2 && base.size(2) == view.rows.width && (side == 0 || side == 1),
                "a base is [2, taps, ", view.rows.width, "], for side 0 or 1");
    view.taps = base.size(1), view.side = side, view.block = block;
    view.base = floats(base, base.numel());
    TORCH_CHECK(block > 0 && view.rows.num_rows % block == 0, view.rows.num_rows, " rows are no blocks of ", block);
    const int64_t groups = coefficients.size(-1) / std::max<int64_t>(1, 2 * view.taps);
    TORCH_CHECK(coefficients.dim() == 2 && coefficients.is_contiguous() &&
                    coefficients.scalar_type() == x.scalar_type() && coefficients.size(0) == view.rows.num_rows && groups > 0 &&
                    coefficients.size(1) == 2 * view.taps * groups && view.rows.width % groups == 0,
                "coefficients are contiguous [T, 2 taps groups] of the type of the rows");
    view.group = view.rows.width / groups;
    view.coefficients = coefficients.const_data_ptr();
    at::Tensor out = at::empty_like(x);
    Backend::convolve(view, out.mutable_data_ptr());
    return out;
  }

  static void register_in(torch::Library& library) {
    library.impl("convolve", &convolve);
    library.impl("add_norm", &add_norm);
    library.impl("turn_and_store", &turn_and_store);
    library.impl("activate", &activate);
  }

 private:
  static RowsView rows_view(const at::Tensor& rows) {
    TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "rows are contiguous [T, n]");
    const auto type = rows.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                "rows are float32, bfloat16 or float16, not ", type);
    const Kind kind = type == at::kFloat ? Kind::kFloat32 : type == at::kHalf ? Kind::kFloat16 : Kind::kBfloat16;
    return {const_cast<void*>(rows.const_data_ptr()), kind, rows.size(0), rows.size(1)};
  }

  static const float* floats(const at::Tensor& values, int64_t count) {
    TORCH_CHECK(values.scalar_type() == at::kFloat && values.is_contiguous() && values.numel() == count,
                "norms and turns are contiguous float32, of ", count, " values and not ", values.numel());
    return values.const_data_ptr<float>();
  }
};

inline void define_layer_ops(torch::Library& library) {
  library.def(
      "add_norm(Tensor(a!) hidden, Tensor? delta, Tensor? after, Tensor weight, float eps, float scale) -> Tensor");
  library.def(
      "turn_and_store(Tensor(a!) qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor slots, "
      "Tensor(b!) keys, Tensor(c!) values, float eps) -> ()");
  library.def("convolve(Tensor x, Tensor coefficients, Tensor base, int side, int block) -> Tensor");
  library.def("activate(Tensor gate_up, bool is_gelu) -> Tensor");
}

}  // namespace dflash_ray
