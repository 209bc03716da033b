// A drafter's context rows on CPU, float32: from features to the keys and values of all layers, where the layers read them.

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "../operators.h"
#include "elementwise.h"
#include "products.h"
#include "team.h"

namespace dflash_ray {

void store_context_cpu(const at::Tensor& features, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                       const at::Tensor& norms, const at::Tensor& cos, const at::Tensor& sin,
                       const at::Tensor& positions, const at::Tensor& rows, at::Tensor& keys, at::Tensor& values,
                       double eps) {
  const Weight weight(packed);
  TORCH_CHECK(keys.dim() == 4 && keys.is_contiguous() && values.is_contiguous() && keys.sizes() == values.sizes(),
              "keys and values are contiguous [layers, rows, n_kv, d]");
  const int64_t layers = keys.size(0), pool = keys.size(1), heads = keys.size(2), head = keys.size(3);
  const int64_t stride = heads * head, columns = weight.out(), count = rows.numel();
  TORCH_CHECK(columns == 2 * layers * stride, "the weight has ", columns, " outputs, not ", 2 * layers * stride);
  TORCH_CHECK(features.is_contiguous() && features.scalar_type() == at::kFloat && features.dim() == 2 &&
                  features.size(0) == count && features.size(1) == weight.in(),
              "features are contiguous float32 [", count, ", ", weight.in(), "]");
  TORCH_CHECK(positions.numel() == count && positions.is_contiguous() && rows.is_contiguous(),
              "positions and rows are contiguous [", count, "]");
  TORCH_CHECK(norms.is_contiguous() && norms.numel() == layers * head && cos.is_contiguous() && sin.is_contiguous(),
              "norms are contiguous [layers, d], cos and sin [positions, d]");
  const int64_t *position = positions.const_data_ptr<int64_t>(), *place = rows.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < count; ++row) {
    TORCH_CHECK_INDEX(position[row] >= 0 && (position[row] + 1) * head <= cos.numel(), "position ", position[row]);
    TORCH_CHECK_INDEX(place[row] >= 0 && place[row] < pool, "row ", place[row], " of ", pool);
  }

  const int64_t line = InputRows::stride_of(weight.in());
  const at::Tensor lines = at::empty({count, line}, features.options());
  const InputRows from{lines.mutable_data_ptr<float>(), line};
  for (int64_t row = 0; row < count; ++row) {
    std::copy_n(features.const_data_ptr<float>() + row * weight.in(), weight.in(), from.at(row));
  }
  const at::Tensor projected = at::empty({count, columns}, features.options());
  float* const made = projected.mutable_data_ptr<float>();
  const float* const added = bias ? bias->const_data_ptr<float>() : nullptr;
  const Cut cut(count, weight);
  const auto multiply = [&](int64_t piece) {
    cut.multiply(piece, weight, from, [&](int64_t row, int64_t column, int64_t size, const float* sums) {
      float* to = made + row * columns + column;
      for (int64_t j = 0; j < size; ++j) to[j] = sums[j] + (added ? added[column + j] : 0.0f);
    });
  };
  const float *norm = norms.const_data_ptr<float>(), *cosines = cos.const_data_ptr<float>();
  const float* sines = sin.const_data_ptr<float>();
  float *key = keys.mutable_data_ptr<float>(), *value = values.mutable_data_ptr<float>();
  const auto turn_and_store = [&](int64_t row) {
    const int64_t turn = position[row] * head;
    for (int64_t layer = 0; layer < layers; ++layer) {
      float* own = made + row * columns + 2 * layer * stride;
      for (int64_t i = 0; i < heads; ++i) {
        turn_head(own + i * head, norm + layer * head, cosines + turn, sines + turn, head, static_cast<float>(eps));
      }
      const int64_t to = (layer * pool + place[row]) * stride;
      std::copy_n(own, stride, key + to);
      std::copy_n(own + stride, stride, value + to);
    }
  };
  run_phases({{cut.num_pieces(), multiply}, {count, turn_and_store}});
}

}  // namespace dflash_ray
