// y = x W^T + b on CPU, float32, for any number of rows.
//
// W lies in panels of kPanel outputs, [panels, in, kPanel], so that a pass over it is one linear stream from memory; a
// tile of kTile rows of x keeps its sums in registers. Every output is the same chain of fused multiply-adds over the
// inputs, whatever the number of rows: a row's result does not depend on what else is in the batch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "../operators.h"
#include "vectors.h"

namespace dflash_ray {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
// Two registers a row for its sums; the rest, of 32 or 16, hold a panel's slice and an input.
constexpr int64_t kTile = kLanes == 16 ? 8 : 6;

// Not inlined: within the loop over panels GCC spills the sums, which costs a third of the speed.
template <int kRows>
[[gnu::noinline]] void multiply(const float* x, const float* panel, int64_t in, float* sums) {
  Lanes left[kRows]{}, right[kRows]{};
  for (int64_t k = 0; k < in; ++k) {
    const Lanes first = load(panel + k * kPanel), second = load(panel + k * kPanel + kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      left[row] += x[row * in + k] * first;
      right[row] += x[row * in + k] * second;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    store(sums + row * kPanel, left[row]);
    store(sums + row * kPanel + kLanes, right[row]);
  }
}

void multiply(int64_t rows, const float* x, const float* panel, int64_t in, float* sums) {
  switch (rows) {
    case 1: return multiply<1>(x, panel, in, sums);
    case 2: return multiply<2>(x, panel, in, sums);
    case 3: return multiply<3>(x, panel, in, sums);
    case 4: return multiply<4>(x, panel, in, sums);
    case 5: return multiply<5>(x, panel, in, sums);
    case 6: return multiply<6>(x, panel, in, sums);
    case 7: return multiply<7>(x, panel, in, sums);
    default: return multiply<8>(x, panel, in, sums);
  }
}

}  // namespace

at::Tensor pack_linear_cpu(const at::Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1), panels = (out + kPanel - 1) / kPanel;
  at::Tensor padded = at::zeros({panels * kPanel, in}, weight.options());
  padded.narrow(0, 0, out).copy_(weight);
  return padded.view({panels, kPanel, in}).transpose(1, 2).contiguous();
}

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                             int64_t out_features) {
  const at::Tensor input = x.contiguous();
  const int64_t in = packed.size(1), rows = input.numel() / std::max<int64_t>(in, 1);
  TORCH_CHECK(input.size(-1) == in, "x has ", input.size(-1), " features, the weight ", in);
  auto shape = input.sizes().vec();
  shape.back() = out_features;
  at::Tensor output = at::empty(shape, input.options());
  const float* from = input.const_data_ptr<float>();
  const float* weights = packed.const_data_ptr<float>();
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  float* to = output.mutable_data_ptr<float>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    float sums[8 * kPanel];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel, width = std::min(kPanel, out_features - column);
      for (int64_t row = 0; row < rows; row += kTile) {
        const int64_t count = std::min(kTile, rows - row);
        multiply(count, from + row * in, weights + column * in, in, sums);
        for (int64_t i = 0; i < count; ++i) {
          float* line = to + (row + i) * out_features + column;
          for (int64_t j = 0; j < width; ++j) line[j] = sums[i * kPanel + j] + (added ? added[column + j] : 0.0f);
        }
      }
    }
  });
  return output;
}

}  // namespace dflash_ray
