// The CUDA backend of the operators between a decoder layer's products; the launchers are in layer.cu.
#pragma once

#include "../scalars.h"

namespace dflash_ray {

// Rows [num_rows, width] of values of a kind, contiguous.
struct RowsView {
  void* data;
  Kind kind;
  int64_t num_rows, width;
};

// Rows of q, k and v heads of size `head_dim`, and where keys and values go: rows slots[i] of caches
// [..., kv_heads, head_dim] of the same kind. Norms are null where a family has none.
struct HeadsView {
  RowsView rows;
  int64_t heads, kv_heads, head_dim;
  const float *q_norm, *k_norm;
  const float *cos, *sin;  // [num_rows, head_dim]
  const int64_t* slots;
  void *keys, *values;
  float eps;
};

// A convolution along blocks of `block` rows, before a sublayer (side 0) or after it; base [2, taps, width] and, for each
// row, coefficients [2, taps, width / group] of the rows' kind.
struct ConvolutionView {
  RowsView rows;
  int64_t block, taps, group, side;
  const float* base;
  const void* coefficients;
};

struct LayerCudaBackend {
  static void add_norm(const RowsView& hidden, const void* delta, const float* after, const float* weight, float eps,
                       float scale, void* out);
  static void turn_and_store(const HeadsView& heads);
  static void activate(const RowsView& gate_up, bool is_gelu, void* out);
  static void convolve(const ConvolutionView& view, void* out);
};

}  // namespace dflash_ray
