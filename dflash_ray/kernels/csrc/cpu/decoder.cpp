// Whole decoder layers on CPU, float32: one list of phases that the team walks without coming back in between.
//
// A layer, for T rows: norm; one product for q, k and v; norms of q and k, rotary embedding and the store into the cache;
// attention; output product, added to the rows; norm; products for gate and up with the activation; down product, added.
// Layers of a DFlash 2 drafter have a convolution on both sides of attention and MLP.

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "../operators.h"
#include "attention.h"
#include "convolution.h"
#include "elementwise.h"
#include "products.h"
#include "team.h"

namespace dflash_ray {
namespace {

constexpr int64_t kRowsAtOnce = 4;  // of the phases that go row by row

// One layer's weights as the operators get them; those that a family does not have are empty.
enum WeightIndex {
  kInputNorm,
  kQkv,
  kQkvBias,
  kQNorm,
  kKNorm,
  kOutput,
  kOutputBias,
  kAfterAttentionNorm,
  kMlpNorm,
  kGate,
  kUp,
  kDown,
  kAfterMlpNorm,
  kAttentionConv,
  kAttentionConvBase,
  kMlpConv,
  kMlpConvBase,
  kNumWeights,
};

// The tensors of a step as the operators get them; shapes: kernels/ops.py.
enum StepIndex { kCos, kSin, kSlots, kEntryLens, kContextLens, kPageCounts, kPages, kParents, kNumStepTensors };

struct DecoderShape {
  int64_t heads, kv_heads, head_dim, page_size, block, taps, group;
  Activation activation;
  float eps, scale, softcap, residual_scale;

  DecoderShape(at::IntArrayRef sizes, at::ArrayRef<double> scalars) {
    TORCH_CHECK(sizes.size() == 8 && scalars.size() == 4, "8 sizes and 4 scalars describe the layers");
    heads = sizes[0], kv_heads = sizes[1], head_dim = sizes[2], page_size = sizes[3];
    activation = static_cast<Activation>(sizes[4]);
    block = sizes[5], taps = sizes[6], group = sizes[7];
    eps = static_cast<float>(scalars[0]), scale = static_cast<float>(scalars[1]);
    softcap = static_cast<float>(scalars[2]), residual_scale = static_cast<float>(scalars[3]);
  }
};

struct DecoderStep {
  const float *cos, *sin;  // [T, head_dim]
  const int64_t* slots;
  CacheView view;

  DecoderStep(at::TensorList step, const DecoderShape& shape)
      : cos(step[kCos].const_data_ptr<float>()),
        sin(step[kSin].const_data_ptr<float>()),
        slots(step[kSlots].const_data_ptr<int64_t>()),
        view(step[kEntryLens], step[kContextLens], step[kPageCounts], step[kPages], step[kParents], shape.page_size,
             shape.kv_heads * shape.head_dim) {}
};

void check_step(at::TensorList step, const DecoderShape& shape, int64_t rows) {
  TORCH_CHECK(step.size() == kNumStepTensors, "a step has ", int{kNumStepTensors}, " tensors, not ", step.size());
  for (const StepIndex table : {kCos, kSin}) {
    TORCH_CHECK(step[table].is_contiguous() && step[table].numel() == rows * shape.head_dim,
                "cos and sin are contiguous [", rows, ", ", shape.head_dim, "]");
  }
  TORCH_CHECK(step[kSlots].numel() == rows, "a step of ", rows, " rows has ", step[kSlots].numel(), " slots");
}

const float* floats(const at::Tensor& tensor) { return tensor.numel() ? tensor.const_data_ptr<float>() : nullptr; }

// Collects the phases of layers over `rows` rows, and what lies between them.
class Walk {
 public:
  Walk(const at::Tensor& hidden, const DecoderShape& shape)
      : shape_(shape), hidden_(static_cast<float*>(hidden.data_ptr())), rows_(hidden.size(0)), width_(hidden.size(1)) {
    TORCH_CHECK(hidden.is_contiguous() && hidden.scalar_type() == at::kFloat, "rows are contiguous float32");
    normed_ = input_rows(hidden, width_);
  }

  // Adds the attention of a layer to the rows, or leaves it in `partial` [T, H].
  void attention(const at::Tensor& like, at::TensorList weights, float* keys, float* values, int64_t window,
                 bool is_causal, const DecoderStep& step, float* partial) {
    const int64_t head = shape_.head_dim, stride = shape_.kv_heads * head;
    const int64_t q_size = shape_.heads * head, qkv_size = q_size + 2 * stride;
    if (!qkv_) qkv_ = room(like, qkv_size), attended_ = input_rows(like, q_size);
    norm(hidden_, weights[kInputNorm]);
    const auto around = convolution(like, weights[kAttentionConv], weights[kAttentionConvBase]);
    product(Weight(weights[kQkv]), input(like, around), [this, qkv_size, bias = floats(weights[kQkvBias])](
                                                int64_t row, int64_t column, int64_t count, const float* sums) {
      float* line = qkv_ + row * qkv_size + column;
      for (int64_t j = 0; j < count; ++j) line[j] = sums[j] + (bias ? bias[column + j] : 0.0f);
    });
    const float *q_norm = floats(weights[kQNorm]), *k_norm = floats(weights[kKNorm]);
    by_rows([=, this, &step](int64_t row) {
      float* line = qkv_ + row * qkv_size;
      const float *cos = step.cos + row * head, *sin = step.sin + row * head;
      for (int64_t i = 0; i < shape_.heads; ++i) turn_head(line + i * head, q_norm, cos, sin, head, shape_.eps);
      for (int64_t i = 0; i < shape_.kv_heads; ++i) turn_head(line + q_size + i * head, k_norm, cos, sin, head, shape_.eps);
      std::copy_n(line + q_size, stride, keys + step.slots[row] * stride);
      std::copy_n(line + q_size + stride, stride, values + step.slots[row] * stride);
    });
    const HeadShape heads{shape_.heads, shape_.kv_heads, head, shape_.scale, shape_.softcap};
    const AttentionWork work(step.view, heads, window, is_causal, keys, values);
    phases_.push_back({work.num_pieces(), [=, this](int64_t piece) {
      work.run(piece, qkv_, qkv_size, attended_.data, attended_.stride);
    }});
    add(Weight(weights[kOutput]), attended_, weights[kOutputBias], weights[kAfterAttentionNorm], around, like, partial);
  }

  // Adds the MLP of a layer to the rows, or leaves it in `partial` [T, H].
  void mlp(const at::Tensor& like, at::TensorList weights, float* partial) {
    const Weight gate(weights[kGate]), up(weights[kUp]);
    const int64_t size = gate.out();
    if (!activated_.data) activated_ = input_rows(like, size);
    norm(hidden_, weights[kMlpNorm]);
    const auto around = convolution(like, weights[kMlpConv], weights[kMlpConvBase]);
    const InputRows read = input(like, around);
    const Cut cut(rows_, gate);
    phases_.push_back({cut.num_pieces(), [=, this](int64_t piece) {
      alignas(64) float gates[kRowsAPiece * kPanel], ups[kRowsAPiece * kPanel];
      cut.each(piece, [&](int64_t panel, int64_t panels, int64_t first, int64_t count) {
        multiply_panels(gate, panel, panels, read.at(first), read.stride, count, gates);
        multiply_panels(up, panel, panels, read.at(first), read.stride, count, ups);
        for (int64_t i = 0; i < panels * count; ++i) {
          float* activated = gates + i * kPanel;
          // Whole panels are activated, so that a value does not depend on where its panel ends.
          activate_and_multiply(shape_.activation, activated, ups + i * kPanel, kPanel, activated);
          const int64_t column = (panel + i / count) * kPanel;
          std::copy_n(activated, std::min(kPanel, size - column), activated_.at(first + i % count) + column);
        }
      });
    }});
    add(Weight(weights[kDown]), activated_, {}, weights[kAfterMlpNorm], around, like, partial);
  }

  void run() { run_phases(phases_); }

 private:
  // [T, columns], free until the walk ends.
  float* room(const at::Tensor& like, int64_t columns) {
    rooms_.push_back(at::empty({rows_, columns}, like.options()));
    return rooms_.back().mutable_data_ptr<float>();
  }

  InputRows input_rows(const at::Tensor& like, int64_t columns) {
    const int64_t stride = InputRows::stride_of(columns);
    return {room(like, stride), stride};
  }

  template <class Work>
  void by_rows(const Work& work) {
    phases_.push_back({(rows_ + kRowsAtOnce - 1) / kRowsAtOnce, [work, rows = rows_](int64_t piece) {
      for (int64_t row = piece * kRowsAtOnce; row < std::min(rows, (piece + 1) * kRowsAtOnce); ++row) work(row);
    }});
  }

  void norm(const float* x, const at::Tensor& weight) {
    by_rows([=, this, by = floats(weight)](int64_t row) {
      rms_norm_row(x + row * width_, by, shape_.eps, width_, normed_.at(row));
    });
  }

  // What stands around a sublayer whose rows are normed, or nothing.
  std::optional<Convolution> convolution(const at::Tensor& like, const at::Tensor& projection, const at::Tensor& base) {
    if (!projection.numel()) return std::nullopt;
    TORCH_CHECK(shape_.block > 0 && shape_.group > 0 && rows_ % shape_.block == 0 && width_ % shape_.group == 0,
                rows_, " rows of ", width_, " are no blocks of ", shape_.block, " in groups of ", shape_.group);
    const int64_t size = 2 * shape_.taps * (width_ / shape_.group);
    const Weight weight(projection);
    TORCH_CHECK(weight.out() == size && base.numel() == 2 * shape_.taps * width_, "a convolution of ", shape_.taps,
                " taps has ", size, " coefficients a slot, not ", weight.out());
    if (!coefficients_) coefficients_ = room(like, size);
    product(weight, normed_, [this, size](int64_t row, int64_t column, int64_t count, const float* sums) {
      std::copy_n(sums, count, coefficients_ + row * size + column);
    });
    return Convolution{shape_.block, shape_.taps, shape_.group, width_, floats(base), coefficients_};
  }

  // The normed rows as the sublayer reads them.
  InputRows input(const at::Tensor& like, const std::optional<Convolution>& around) {
    if (!around) return normed_;
    if (!convolved_.data) convolved_ = input_rows(like, width_);
    by_rows([=, this, conv = *around](int64_t row) {
      conv.run(Side::kBefore, row, normed_.data, normed_.stride, convolved_.at(row));
    });
    return convolved_;
  }

  template <class Put>
  void product(const Weight& weight, const InputRows& x, const Put& put) {
    const Cut cut(rows_, weight);
    phases_.push_back({cut.num_pieces(), [=](int64_t piece) { cut.multiply(piece, weight, x, put); }});
  }

  // The product that ends a sublayer: to `partial` where other ranks have the rest of the sum, else normed or convolved if
  // the family does so, and added to the rows.
  void add(const Weight& weight, const InputRows& x, const at::Tensor& bias, const at::Tensor& after,
           const std::optional<Convolution>& around, const at::Tensor& like, float* partial) {
    const float* added = bias.defined() && !partial ? floats(bias) : nullptr;
    const float* by = partial ? nullptr : floats(after);
    if (partial || by || around) {
      float* to = partial ? partial : sublayer_ ? sublayer_ : sublayer_ = room(like, width_);
      product(weight, x, [=, this](int64_t row, int64_t column, int64_t count, const float* sums) {
        float* line = to + row * width_ + column;
        for (int64_t j = 0; j < count; ++j) line[j] = sums[j] + (added ? added[column + j] : 0.0f);
      });
    } else {
      product(weight, x, [=, this](int64_t row, int64_t column, int64_t count, const float* sums) {
        float* line = hidden_ + row * width_ + column;
        for (int64_t j = 0; j < count; ++j) {
          line[j] += shape_.residual_scale * (sums[j] + (added ? added[column + j] : 0.0f));
        }
      });
    }
    if (around) {
      by_rows([=, this, conv = *around](int64_t row) {
        float *line = convolved_.at(row), *to = hidden_ + row * width_;
        conv.run(Side::kAfter, row, sublayer_, width_, line);
        for (int64_t i = 0; i < width_; ++i) to[i] += shape_.residual_scale * line[i];
      });
    }
    if (!by) return;
    by_rows([=, this](int64_t row) {
      float *line = sublayer_ + row * width_, *to = hidden_ + row * width_;
      rms_norm_row(line, by, shape_.eps, width_, line);
      for (int64_t i = 0; i < width_; ++i) to[i] += shape_.residual_scale * line[i];
    });
  }

  const DecoderShape shape_;
  float* hidden_;
  const int64_t rows_, width_;
  std::vector<Phase> phases_;
  std::vector<at::Tensor> rooms_;
  InputRows normed_, attended_, activated_, convolved_;
  float *qkv_ = nullptr, *sublayer_ = nullptr, *coefficients_ = nullptr;
};

}  // namespace

void decoder_layers_cpu(at::Tensor& hidden, at::TensorList weights, at::TensorList keys, at::TensorList values,
                        at::TensorList step, at::IntArrayRef sizes, at::ArrayRef<double> scalars,
                        at::IntArrayRef windows, at::IntArrayRef is_causal) {
  const DecoderShape shape(sizes, scalars);
  const size_t layers = windows.size();
  TORCH_CHECK(weights.size() == layers * kNumWeights && keys.size() == layers && values.size() == layers &&
                  is_causal.size() == layers,
              layers, " layers have ", layers * kNumWeights, " weights, not ", weights.size());
  check_step(step, shape, hidden.size(0));
  const DecoderStep place(step, shape);
  Walk walk(hidden, shape);
  for (size_t i = 0; i < layers; ++i) {
    const at::TensorList own = weights.slice(i * kNumWeights, kNumWeights);
    walk.attention(hidden, own, keys[i].mutable_data_ptr<float>(), values[i].mutable_data_ptr<float>(), windows[i],
                   is_causal[i], place, nullptr);
    walk.mlp(hidden, own, nullptr);
  }
  walk.run();
}

at::Tensor decoder_attention_cpu(const at::Tensor& hidden, at::TensorList weights, at::Tensor& keys, at::Tensor& values,
                                 at::TensorList step, at::IntArrayRef sizes, at::ArrayRef<double> scalars,
                                 int64_t window) {
  const DecoderShape shape(sizes, scalars);
  check_step(step, shape, hidden.size(0));
  const DecoderStep place(step, shape);
  at::Tensor partial = at::empty_like(hidden);
  Walk walk(hidden, shape);
  walk.attention(hidden, weights, keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>(), window, true, place,
                 partial.mutable_data_ptr<float>());
  walk.run();
  return partial;
}

at::Tensor decoder_mlp_cpu(const at::Tensor& hidden, at::TensorList weights, at::IntArrayRef sizes,
                           at::ArrayRef<double> scalars) {
  at::Tensor partial = at::empty_like(hidden);
  Walk walk(hidden, DecoderShape(sizes, scalars));
  walk.mlp(hidden, weights, partial.mutable_data_ptr<float>());
  walk.run();
  return partial;
}

}  // namespace dflash_ray
