// Signatures of all operators, by device. Shapes and meaning: kernels/ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace dflash_ray {

at::Tensor pack_linear_cpu(const at::Tensor& weight);

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                             int64_t out_features);

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps);

at::Tensor paged_attention_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               at::Tensor& key_cache, at::Tensor& value_cache, const at::Tensor& slots,
                               const at::Tensor& entry_lens, const at::Tensor& context_lens,
                               const at::Tensor& page_counts, const at::Tensor& pages, int64_t page_size, double scale,
                               int64_t window, double softcap, bool is_causal,
                               const std::optional<at::Tensor>& parents);

void move_rows_cpu(at::TensorList caches, const at::Tensor& from, const at::Tensor& to);

void decoder_layers_cpu(at::Tensor& hidden, at::TensorList weights, at::TensorList keys, at::TensorList values,
                        at::TensorList step, at::IntArrayRef sizes, at::ArrayRef<double> scalars,
                        at::IntArrayRef windows, at::IntArrayRef is_causal);

at::Tensor decoder_attention_cpu(const at::Tensor& hidden, at::TensorList weights, at::Tensor& keys, at::Tensor& values,
                                 at::TensorList step, at::IntArrayRef sizes, at::ArrayRef<double> scalars,
                                 int64_t window);

at::Tensor decoder_mlp_cpu(const at::Tensor& hidden, at::TensorList weights, at::IntArrayRef sizes,
                           at::ArrayRef<double> scalars);

void store_context_cpu(const at::Tensor& features, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                       const at::Tensor& norms, const at::Tensor& cos, const at::Tensor& sin,
                       const at::Tensor& positions, const at::Tensor& rows, at::Tensor& keys, at::Tensor& values,
                       double eps);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> choose_drafts_cpu(
    const at::Tensor& hidden, at::TensorList weights, const at::Tensor& anchors, const at::Tensor& inverse_temperatures,
    const at::Tensor& seeds, const at::Tensor& firsts, at::IntArrayRef sizes, at::ArrayRef<double> scalars,
    bool wants_scores);

// Implements the operators of verify_ops.h for the library's device.
void register_verify_cpu(torch::Library& library);

// The same for those of draft_ops.h.
void register_drafts_cpu(torch::Library& library);

}  // namespace dflash_ray
