// What stands between the products of a decoder layer on a GPU: three launches of one block a row.
//
// Sums go over the same threads in the same order whatever the number of rows, so that a row does not depend on what
// else is in the pass. Values are rounded to their type where they are stored and nowhere else.

#include "backend.h"
#include "layer_backend.h"
#include "simt.cuh"

namespace dflash_ray {
namespace {

constexpr int kMostHeads = 512;  // of q and k in a rank

template <class T>
DFLASH_DEVICE float rounded(float value) {
  T stored;
  from_float(value, stored);
  return to_float(stored);
}

// 1 / sqrt(mean of squares + eps) of what the threads have summed; for all threads.
DFLASH_DEVICE float inverse_root(float squares, int64_t width, float eps) {
  DFLASH_SHARED(float, sums, kWarps);
  DFLASH_SHARED(float, total, 1);
  const float sum = block_reduce(squares, sums, TakeSum());
  if (threadIdx.x == 0) total[0] = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
  __syncthreads();
  const float inverse = total[0];
  __syncthreads();
  return inverse;
}

// hidden += scale * delta, normed first where `after` is given; out = hidden normed.
template <class T>
DFLASH_KERNEL add_norm_kernel(RowsView view, const T* delta, const float* after, const float* weight, float eps,
                              float scale, T* out) {
  const int64_t width = view.width, row = blockIdx.x;
  T* hidden = static_cast<T*>(view.data) + row * width;
  const T* added = delta ? delta + row * width : nullptr;
  float unit = 1.0f;
  if (after) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < width; i += kThreads) squares += to_float(added[i]) * to_float(added[i]);
    unit = inverse_root(squares, width, eps);
  }
  float squares = 0;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    float value = to_float(hidden[i]);
    if (added) {
      const float part = to_float(added[i]);
      value += scale * (after ? rounded<T>(part * unit * after[i]) : part);
      from_float(value, hidden[i]);
      value = to_float(hidden[i]);
    }
    squares += value * value;
  }
  const float inverse = inverse_root(squares, width, eps);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    from_float(to_float(hidden[i]) * inverse * weight[i], out[row * width + i]);
  }
}

// Norms of q and k heads, their turns, and the store of keys and values. Queries stay where they are.
template <class T>
DFLASH_KERNEL turn_and_store_kernel(HeadsView view) {
  DFLASH_SHARED(float, inverses, kMostHeads);
  const int64_t row = blockIdx.x, size = view.head_dim, half = size / 2, turned = view.heads + view.kv_heads;
  T* line = static_cast<T*>(view.rows.data) + row * view.rows.width;
  if (view.q_norm) {
    for (int64_t head = threadIdx.x / kWarp; head < turned; head += kWarps) {
      float squares = 0;
      for (int64_t i = threadIdx.x % kWarp; i < size; i += kWarp) {
        squares += to_float(line[head * size + i]) * to_float(line[head * size + i]);
      }
      for (int delta = kWarp / 2; delta > 0; delta /= 2) squares += shuffle_down(squares, delta);
      if (threadIdx.x % kWarp == 0) inverses[head] = 1.0f / sqrtf(squares / static_cast<float>(size) + view.eps);
    }
    __syncthreads();
  }
  const float *cos = view.cos + row * size, *sin = view.sin + row * size;
  const int64_t stored = view.slots[row] * view.kv_heads * size;
  T* keys = static_cast<T*>(view.keys) + stored;
  for (int64_t pair = threadIdx.x; pair < turned * half; pair += kThreads) {
    const int64_t head = pair / half, i = pair % half;
    float left = to_float(line[head * size + i]), right = to_float(line[head * size + half + i]);
    if (view.q_norm) {
      const float* norm = head < view.heads ? view.q_norm : view.k_norm;
      left = left * inverses[head] * norm[i], right = right * inverses[head] * norm[half + i];
    }
    T* to = head < view.heads ? line + head * size : keys + (head - view.heads) * size;
    from_float(left * cos[i] - right * sin[i], to[i]);
    from_float(right * cos[half + i] + left * sin[half + i], to[half + i]);
  }
  const T* from = line + turned * size;
  T* values = static_cast<T*>(view.values) + stored;
  for (int64_t i = threadIdx.x; i < view.kv_heads * size; i += kThreads) values[i] = from[i];
}

DFLASH_DEVICE float activated(float gate, bool is_gelu) {
  if (!is_gelu) return gate / (1.0f + expf(-gate));
  // GELU in its tanh form is g / (1 + exp(-u)).
  const float u = 1.5957691216f * gate * (1.0f + 0.044715f * gate * gate);
  return gate / (1.0f + expf(-u));
}

template <class T>
DFLASH_KERNEL activate_kernel(RowsView view, bool is_gelu, T* out) {
  const int64_t width = view.width / 2, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= view.num_rows * width) return;
  const int64_t row = i / width, column = i % width;
  const T* line = static_cast<const T*>(view.data) + row * view.width;
  from_float(rounded<T>(activated(to_float(line[column]), is_gelu)) * to_float(line[width + column]), out[i]);
}

// A row and those of its block before it, each times its tap's coefficients (models/dflash2.py).
template <class T>
DFLASH_KERNEL convolve_kernel(ConvolutionView view, T* out) {
  const int64_t width = view.rows.width, row = blockIdx.x, groups = width / view.group, first = view.side * view.taps;
  const T* x = static_cast<const T*>(view.rows.data) + row * width;
  const T* shared = static_cast<const T*>(view.coefficients) + (2 * view.taps * row + first) * groups;
  const int64_t before = row % view.block, taps = view.taps < before + 1 ? view.taps : before + 1;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    float sum = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float coefficient = view.base[(first + tap) * width + i] + to_float(shared[tap * groups + i / view.group]);
      sum += coefficient * to_float(x[i - tap * width]);
    }
    from_float(sum, out[row * width + i]);
  }
}

// Calls launch(T()) with the type of the values.
template <class Launch>
void by_kind(Kind kind, const Launch& launch) {
  if (kind == Kind::kFloat32) launch(float());
  if (kind == Kind::kBfloat16) launch(Bfloat16());
  if (kind == Kind::kFloat16) launch(Float16());
}

}  // namespace

// A launch of no blocks is an error, so empty steps launch nothing.
void LayerCudaBackend::add_norm(const RowsView& hidden, const void* delta, const float* after, const float* weight,
                                float eps, float scale, void* out) {
  if (!hidden.num_rows) return;
  by_kind(hidden.kind, [&](auto value) {
    using T = decltype(value);
    DFLASH_LAUNCH(add_norm_kernel<T>, hidden.num_rows, hidden, static_cast<const T*>(delta), after, weight, eps, scale,
                  static_cast<T*>(out));
  });
}

void LayerCudaBackend::turn_and_store(const HeadsView& heads) {
  if (!heads.rows.num_rows) return;
  by_kind(heads.rows.kind, [&](auto value) {
    DFLASH_LAUNCH(turn_and_store_kernel<decltype(value)>, heads.rows.num_rows, heads);
  });
}

void LayerCudaBackend::activate(const RowsView& gate_up, bool is_gelu, void* out) {
  const int64_t blocks = (gate_up.num_rows * gate_up.width / 2 + kThreads - 1) / kThreads;
  if (!blocks) return;
  by_kind(gate_up.kind, [&](auto value) {
    using T = decltype(value);
    DFLASH_LAUNCH(activate_kernel<T>, blocks, gate_up, is_gelu, static_cast<T*>(out));
  });
}

void LayerCudaBackend::convolve(const ConvolutionView& view, void* out) {
  if (!view.rows.num_rows) return;
  by_kind(view.rows.kind, [&](auto value) {
    using T = decltype(value);
    DFLASH_LAUNCH(convolve_kernel<T>, view.rows.num_rows, view, static_cast<T*>(out));
  });
}

}  // namespace dflash_ray
