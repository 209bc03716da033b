// What stands between the products of a forward pass, float32. Every row is computed by itself and in a fixed order.
#pragma once

#include <cmath>
#include <cstdint>

#include "../verify_core.cuh"
#include "vectors.h"

namespace dflash_ray {

inline void rms_norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
  const float scale = 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// A head [size] of q or k: normed where the family does so, and rotated.
inline void turn_head(float* head, const float* norm, const float* cos, const float* sin, int64_t size, float eps) {
  const int64_t half = size / 2;
  if (norm) rms_norm_row(head, norm, eps, size, head);
  for (int64_t i = 0; i < half; ++i) {
    const float left = head[i], right = head[half + i];
    head[i] = left * cos[i] - right * sin[i];
    head[half + i] = right * cos[half + i] + left * sin[half + i];
  }
}

// g / (1 + exp(-g)); for g < 0 through exp(g), so that the exponent is never positive.
inline float silu(float g) {
  const float e = exp_of_nonpositive(-std::fabs(g));
  return g * (g < 0 ? e : 1.0f) / (1.0f + e);
}

// g (1 + tanh(u)) / 2 = g / (1 + exp(-2 u)) with u = sqrt(2 / pi) (g + 0.044715 g^3).
inline float gelu_tanh(float g) {
  const float u = 1.5957691216f * g * (1.0f + 0.044715f * g * g);
  const float e = exp_of_nonpositive(-std::fabs(u));
  return g * (u < 0 ? e : 1.0f) / (1.0f + e);
}

enum class Activation : int64_t { kSilu, kGeluTanh };

inline void activate_and_multiply(Activation activation, const float* gate, const float* up, int64_t size, float* out) {
  if (activation == Activation::kSilu) {
    for (int64_t i = 0; i < size; ++i) out[i] = silu(gate[i]) * up[i];
  } else {
    for (int64_t i = 0; i < size; ++i) out[i] = gelu_tanh(gate[i]) * up[i];
  }
}

}  // namespace dflash_ray
