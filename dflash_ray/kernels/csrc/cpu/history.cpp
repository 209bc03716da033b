// Token counts of live sequences, kept as the verification operators read them. The operator is `count_history` in
// kernels/verify_ops.py.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../verify_core.cuh"

namespace dflash_ray {
namespace {

struct NewToken {
  int64_t token;
  int64_t place;  // in the history as it was
  float times;
};

// As std::lower_bound, without branches that nobody could predict: searches that follow each other overlap.
int64_t lower_bound(const int64_t* ids, int64_t length, int64_t token) {
  const int64_t* base = ids;
  for (int64_t left = length; left > 0;) {
    const int64_t half = (left + 1) / 2;
    base = base[half - 1] < token ? base + half : base;
    left -= half;
  }
  return base - ids;
}

// Counts a sequence's new tokens: those of its history at once, the others in one pass from the back.
void count_tokens(int64_t* history, float* values, int64_t& length, const int64_t* tokens, int64_t count,
                  std::vector<NewToken>& fresh) {
  fresh.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = lower_bound(history, length, tokens[i]);
    if (place < length && history[place] == tokens[i]) {
      values[place] += 1.0f;
      continue;
    }
    const auto at = std::lower_bound(fresh.begin(), fresh.end(), tokens[i],
                                     [](const NewToken& one, int64_t token) { return one.token < token; });
    if (at != fresh.end() && at->token == tokens[i]) {
      at->times += 1.0f;
    } else {
      fresh.insert(at, {tokens[i], place, 1.0f});
    }
  }
  int64_t end = length;
  for (int64_t left = static_cast<int64_t>(fresh.size()); left > 0; --left) {
    const NewToken& one = fresh[left - 1];
    std::copy_backward(history + one.place, history + end, history + end + left);
    std::copy_backward(values + one.place, values + end, values + end + left);
    end = one.place;
    history[end + left - 1] = one.token;
    values[end + left - 1] = one.times;
  }
  length += static_cast<int64_t>(fresh.size());
}

void count_history_cpu(at::Tensor& ids, at::Tensor& values, at::Tensor& ints, const at::Tensor& slots,
                       const at::Tensor& counts, const at::Tensor& tokens) {
  const auto is_column = [](const at::Tensor& tensor, at::ScalarType type) {
    return tensor.scalar_type() == type && tensor.is_contiguous();
  };
  TORCH_CHECK(is_column(ids, at::kLong) && is_column(values, at::kFloat) && ids.numel() == values.numel(),
              "ids int64 and values float32 must be contiguous and of one size");
  TORCH_CHECK(is_column(ints, at::kLong) && ints.dim() == 2 && ints.size(1) == kIntColumns,
              "ints must be a contiguous int64 [N, ", int{kIntColumns}, "]");
  TORCH_CHECK(is_column(slots, at::kLong) && is_column(counts, at::kLong) && slots.numel() == counts.numel() &&
                  is_column(tokens, at::kLong),
              "slots and counts must be contiguous int64 [n], tokens contiguous int64");
  std::vector<NewToken> fresh;
  int64_t first = 0;
  for (int64_t i = 0; i < slots.numel(); ++i) {
    const int64_t slot = slots.const_data_ptr<int64_t>()[i], count = counts.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(slot >= 0 && slot < ints.size(0), "slot ", slot, " is not one of ", ints.size(0));
    TORCH_CHECK(count >= 0 && first + count <= tokens.numel(), "counts ask for more than ", tokens.numel(), " tokens");
    int64_t* const sequence = ints.mutable_data_ptr<int64_t>() + slot * kIntColumns;
    const int64_t at = sequence[kHistoryAt];
    TORCH_CHECK(at >= 0 && at + sequence[kHistoryLen] + count <= ids.numel(),
                "there is no room behind the history of slot ", slot);
    count_tokens(ids.mutable_data_ptr<int64_t>() + at, values.mutable_data_ptr<float>() + at, sequence[kHistoryLen],
                 tokens.const_data_ptr<int64_t>() + first, count, fresh);
    first += count;
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dflash_ray, library) {
  library.def(
      "count_history(Tensor(a!) ids, Tensor(b!) values, Tensor(c!) ints, Tensor slots, Tensor counts, Tensor tokens) -> ()");
}

TORCH_LIBRARY_IMPL(dflash_ray, CPU, library) { library.impl("count_history", &count_history_cpu); }

}  // namespace dflash_ray
