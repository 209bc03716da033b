// y = x W^T + b on CPU, float32, for any number of rows.

#include <ATen/ATen.h>

#include <algorithm>

#include "../operators.h"
#include "products.h"
#include "team.h"

namespace dflash_ray {

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                             int64_t out_features) {
  const at::Tensor input = x.contiguous();
  const Weight weight(packed);
  const int64_t in = weight.in(), rows = input.numel() / std::max<int64_t>(in, 1);
  TORCH_CHECK(input.size(-1) == in, "x has ", input.size(-1), " features, the weight ", in);
  TORCH_CHECK(weight.out() == out_features, "the weight has ", weight.out(), " outputs, not ", out_features);
  auto shape = input.sizes().vec();
  shape.back() = out_features;
  at::Tensor output = at::empty(shape, input.options());
  const int64_t stride = InputRows::stride_of(in);
  const at::Tensor lines = at::empty({rows, stride}, input.options());
  const InputRows from{lines.mutable_data_ptr<float>(), stride};
  for (int64_t row = 0; row < rows; ++row) std::copy_n(input.const_data_ptr<float>() + row * in, in, from.at(row));
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  float* to = output.mutable_data_ptr<float>();
  const Cut cut(rows, weight);
  for_pieces(cut.num_pieces(), [&](int64_t piece) {
    cut.multiply(piece, weight, from, [&](int64_t row, int64_t column, int64_t count, const float* sums) {
      float* line = to + row * out_features + column;
      for (int64_t j = 0; j < count; ++j) line[j] = sums[j] + (added ? added[column + j] : 0.0f);
    });
  });
  return output;
}

}  // namespace dflash_ray
