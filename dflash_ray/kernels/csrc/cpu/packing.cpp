// Finds the smallest form of a weight that gives back every float, and lays the weight out in it.

#include <ATen/ATen.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "../operators.h"
#include "team.h"
#include "weight_memory.h"
#include "weights.h"

namespace dflash_ray {
namespace {

float rounded_to_half(float value) { return static_cast<float>(c10::Half(value)); }

constexpr float kSmallestScale = 1e-20f;  // it is divided by powers of two up to 2^24, which must be exact

// kBlockDepth values of one output as scale and offset, and their small integers.
struct Block {
  float scale = 0, offset = 0;
  int8_t q[kBlockDepth];
};

// Whether every value is offset + scale * q, rounded once, with q in low .. high.
bool fits(const float* values, float scale, float offset, float low, float high, Block& block) {
  if (!(std::fabs(scale) > kSmallestScale)) return false;
  block.scale = scale, block.offset = offset;
  for (int64_t i = 0; i < kBlockDepth; ++i) {
    const float q = std::nearbyint((values[i] - offset) / scale);
    if (!(q >= low && q <= high) || std::fma(scale, q, offset) != values[i]) return false;
    block.q[i] = static_cast<int8_t>(q);
  }
  return true;
}

bool find_int4(const float* values, Block& block) {
  const auto [low, high] = std::minmax_element(values, values + kBlockDepth);
  if (!std::isfinite(*low) || !std::isfinite(*high)) return false;
  if (*low == *high) {
    block.scale = 0, block.offset = *low;
    std::fill_n(block.q, kBlockDepth, 0);
    return true;
  }
  // Most blocks use all 16 steps; the lowest value may be any of them.
  for (int steps = 15; steps >= 1; --steps) {
    const float exact = (*high - *low) / static_cast<float>(steps);
    for (const float scale : {rounded_to_half(exact), exact}) {
      for (int lowest = 0; lowest <= 15 - steps; ++lowest) {
        const float offset = lowest ? rounded_to_half(std::fma(-scale, static_cast<float>(lowest), *low)) : *low;
        if (fits(values, scale, offset, 0, 15, block)) return true;
      }
    }
  }
  return false;
}

bool find_int8(const float* values, Block& block) {
  float largest = 0;
  for (int64_t i = 0; i < kBlockDepth; ++i) largest = std::max(largest, std::fabs(values[i]));
  if (largest == 0) {
    std::fill_n(block.q, kBlockDepth, 0);
    block.scale = block.offset = 0;
    return true;
  }
  const float scale = rounded_to_half(largest / 127);
  return fits(values, scale, 0, -127, 127, block) || fits(values, largest / 127, 0, -127, 127, block);
}

bool is_bfloat16(const float* values, int64_t count) {
  uint32_t lost = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    lost |= bits & 0xffff;
  }
  return lost == 0;
}

// Where a panel's parts lie; see Weight.
void put(std::byte* panel, int64_t word, int64_t column, int32_t bits) {
  std::memcpy(panel + (word * kPanel + column) * 4, &bits, 4);
}

void put(std::byte* panel, int64_t word, int64_t column, float value) {
  std::memcpy(panel + (word * kPanel + column) * 4, &value, 4);
}

void put_block(std::byte* panel, int64_t index, int64_t column, const Block& block, Form form) {
  const bool is_int4 = form == Form::kInt4;
  const int64_t a_word = is_int4 ? 8 : 4, scales = is_int4 ? 2 : 1;
  int64_t word = index * (scales + kBlockDepth / a_word);
  put(panel, word++, column, block.scale);
  if (is_int4) put(panel, word++, column, block.offset);
  for (int64_t first = 0; first < kBlockDepth; first += a_word, ++word) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < a_word; ++i) {
      const int stored = block.q[first + i] + (is_int4 || i == 3 ? 0 : 128);
      bits |= (static_cast<uint32_t>(stored) & (is_int4 ? 0xfu : 0xffu)) << (i * 32 / a_word);
    }
    put(panel, word, column, static_cast<int32_t>(bits));
  }
}

// One output's values into column `column` of a panel; false where they don't have the form.
bool put_output(std::byte* panel, int64_t column, const float* values, int64_t in, Form form) {
  switch (form) {
    case Form::kFloat32:
      for (int64_t k = 0; k < in; ++k) put(panel, k, column, values[k]);
      return true;
    case Form::kBfloat16:
      if (!is_bfloat16(values, in)) return false;
      for (int64_t k = 0; k < in; k += 2) {
        uint32_t first, second = 0;
        std::memcpy(&first, values + k, 4);
        if (k + 1 < in) std::memcpy(&second, values + k + 1, 4);
        put(panel, k / 2, column, static_cast<int32_t>(first >> 16 | second));
      }
      return true;
    case Form::kInt8:
    case Form::kInt4:
      if (in % kBlockDepth) return false;
      for (int64_t index = 0; index < in / kBlockDepth; ++index) {
        Block block;
        const float* from = values + index * kBlockDepth;
        if (!(form == Form::kInt4 ? find_int4(from, block) : find_int8(from, block))) return false;
        put_block(panel, index, column, block, form);
      }
      return true;
  }
  return false;
}

// Whether a panel, unpacked as the products do it, holds the values [outputs, in] that it was made of.
bool gives_back(const Weight& weight, int64_t panel, const float* values) {
  alignas(64) float buffer[kBlockDepth * kPanel];
  const int64_t outputs = std::min(kPanel, weight.out() - panel * kPanel);
  for (int64_t k = 0; k < weight.in(); k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, weight.in() - k);
    const float* slice = weight.slice(panel, k, depth, buffer);
    for (int64_t i = 0; i < outputs; ++i) {
      for (int64_t j = 0; j < depth; ++j) {
        if (slice[j * kPanel + i] != values[i * weight.in() + k + j]) return weight.form() == Form::kFloat32;
      }
    }
  }
  return true;
}

at::Tensor packed_as(const at::Tensor& weight, Form form) {
  const int64_t out = weight.size(0), in = weight.size(1), panels = (out + kPanel - 1) / kPanel;
  const float* from = weight.const_data_ptr<float>();
  // A weight of another form tells so in its first rows: no need to take room for all of it.
  std::vector<std::byte> trial(Weight::panel_bytes(form, in));
  for (int64_t row = 0; row < std::min(out, kPanel); ++row) {
    if (!put_output(trial.data(), row, from + row * in, in, form)) return {};
  }
  const int64_t bytes = sizeof(WeightHeader) + panels * Weight::panel_bytes(form, in);
  at::Tensor packed = at::zeros({bytes}, weight.options().dtype(at::kByte));
  auto* to = static_cast<std::byte*>(packed.mutable_data_ptr());
  const WeightHeader header{form, out, in, {}};
  std::memcpy(to, &header, sizeof header);
  std::vector<char> is_whole(panels, 1);
  const Weight view(packed);
  for_pieces(panels, [&](int64_t panel) {
    std::byte* at = to + sizeof(WeightHeader) + panel * Weight::panel_bytes(form, in);
    for (int64_t row = panel * kPanel; row < std::min(out, (panel + 1) * kPanel) && is_whole[panel]; ++row) {
      is_whole[panel] = put_output(at, row - panel * kPanel, from + row * in, in, form);
    }
    if (is_whole[panel]) is_whole[panel] = gives_back(view, panel, from + panel * kPanel * in);
  });
  return std::find(is_whole.begin(), is_whole.end(), 0) == is_whole.end() ? packed : at::Tensor();
}

}  // namespace

at::Tensor pack_linear_cpu(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kFloat, "a weight is float32 [out, in]");
  const at::Tensor rows = weight.contiguous();
  at::Tensor packed;
  for (const Form form : {Form::kInt4, Form::kInt8, Form::kBfloat16, Form::kFloat32}) {
    packed = packed_as(rows, form);
    if (packed.defined()) break;
  }
  // Only the form that is kept takes memory that weights share.
  static auto* const memory = new WeightMemory;  // never destroyed: weights may outlive what a process destroys at its end
  at::Tensor kept = memory->take(packed.numel());
  std::memcpy(kept.mutable_data_ptr(), packed.const_data_ptr(), packed.numel());
  return kept;
}

}  // namespace dflash_ray
