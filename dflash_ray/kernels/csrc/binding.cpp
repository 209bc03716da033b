// Operators as torch knows them. `register_fake` for tracing is in kernels/ops.py.

#include <torch/library.h>

#include "attention_ops.h"
#include "draft_ops.h"
#include "layer_ops.h"
#include "operators.h"
#include "verify_ops.h"

TORCH_LIBRARY(dflash_ray, library) {
  library.def("pack_linear(Tensor weight) -> Tensor");
  library.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slots, Tensor entry_lens, Tensor context_lens, Tensor page_counts, Tensor pages, int page_size, "
      "float scale, int window, float softcap, bool is_causal, Tensor? parents) -> Tensor");
  library.def("move_rows(Tensor(a!)[] caches, Tensor source, Tensor target) -> ()");
  library.def(
      "decoder_layers(Tensor(a!) hidden, Tensor[] weights, Tensor(b!)[] keys, Tensor(c!)[] values, Tensor[] step, "
      "int[] sizes, float[] scalars, int[] windows, int[] is_causal) -> ()");
  library.def(
      "decoder_attention(Tensor hidden, Tensor[] weights, Tensor(a!) keys, Tensor(b!) values, Tensor[] step, "
      "int[] sizes, float[] scalars, int window) -> Tensor");
  library.def("decoder_mlp(Tensor hidden, Tensor[] weights, int[] sizes, float[] scalars) -> Tensor");
  library.def(
      "store_context(Tensor features, Tensor packed, Tensor? bias, Tensor norms, Tensor cos, Tensor sin, "
      "Tensor positions, Tensor rows, Tensor(a!) keys, Tensor(b!) values, float eps) -> ()");
  library.def(
      "choose_drafts(Tensor hidden, Tensor[] weights, Tensor anchors, Tensor inverse_temperatures, Tensor seeds, "
      "Tensor firsts, int[] sizes, float[] scalars, bool wants_scores) -> (Tensor, Tensor, Tensor, Tensor)");
  dflash_ray::define_layer_ops(library);
  dflash_ray::define_verify_ops(library);
  dflash_ray::define_attention_ops(library);
  dflash_ray::define_draft_ops(library);
}

TORCH_LIBRARY_IMPL(dflash_ray, CPU, library) {
  library.impl("pack_linear", &dflash_ray::pack_linear_cpu);
  library.impl("packed_linear", &dflash_ray::packed_linear_cpu);
  library.impl("rms_norm", &dflash_ray::rms_norm_cpu);
  library.impl("paged_attention", &dflash_ray::paged_attention_cpu);
  library.impl("move_rows", &dflash_ray::move_rows_cpu);
  library.impl("decoder_layers", &dflash_ray::decoder_layers_cpu);
  library.impl("decoder_attention", &dflash_ray::decoder_attention_cpu);
  library.impl("decoder_mlp", &dflash_ray::decoder_mlp_cpu);
  library.impl("store_context", &dflash_ray::store_context_cpu);
  library.impl("choose_drafts", &dflash_ray::choose_drafts_cpu);
  dflash_ray::register_verify_cpu(library);
  dflash_ray::register_drafts_cpu(library);
}
