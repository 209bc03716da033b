// From the rows of a DFlash 2 drafter's blocks to its drafts on CPU, float32: final norm, head, candidates, the selector's
// scores and its walk, in one list of phases.
//
// Only rows of the score table that the walk comes to are computed, unless all are wanted.

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../operators.h"
#include "../verify_ops.h"
#include "candidates.h"
#include "elementwise.h"
#include "products.h"
#include "team.h"

namespace dflash_ray {
namespace {

// The weights as the operator gets them; shapes: kernels/draft_ops.py.
enum ChoiceWeight { kFinalNorm, kHead, kProjection, kPredecessors, kSuccessors, kTokens, kNumChoiceWeights };

// The last steps of a head, and the selector's scores.
struct Selector {
  const float *logits, *projected;  // of a row [vocabulary] and [rank]
  const float *predecessors, *successors;  // [vocabulary, rank]
  int64_t vocabulary, rank, candidates;

  // Scores [candidates] of a slot's candidates `found` after token `previous`; `weighted` [rank] is scratch.
  void score(int64_t row, int64_t previous, const int64_t* found, float* weighted, float* scores) const {
    const float *own = projected + row * rank, *before = predecessors + previous * rank;
    for (int64_t i = 0; i < rank; ++i) weighted[i] = before[i] * own[i];
    for (int64_t i = 0; i < candidates; ++i) {
      scores[i] = logits[row * vocabulary + found[i]] + dot(weighted, successors + found[i] * rank, rank);
    }
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> choose_drafts_cpu(
    const at::Tensor& hidden, at::TensorList weights, const at::Tensor& anchors, const at::Tensor& inverse_temperatures,
    const at::Tensor& seeds, const at::Tensor& firsts, at::IntArrayRef sizes, at::ArrayRef<double> scalars,
    bool wants_scores) {
  TORCH_CHECK(sizes.size() == 3 && scalars.size() == 3 && weights.size() == kNumChoiceWeights,
              "3 sizes, 3 scalars and ", int{kNumChoiceWeights}, " weights describe a choice");
  const int64_t block = sizes[0], slots = sizes[1], candidates = sizes[2], blocks = anchors.numel();
  const float eps = static_cast<float>(scalars[0]), factor = static_cast<float>(scalars[1]);
  const float softcap = static_cast<float>(scalars[2]);
  const Weight head(weights[kHead]), projection(weights[kProjection]);
  const int64_t width = head.in(), vocabulary = head.out(), rank = projection.out(), rows = blocks * slots;
  TORCH_CHECK(hidden.is_contiguous() && hidden.scalar_type() == at::kFloat && hidden.numel() == blocks * block * width,
              "rows are contiguous float32 [", blocks, ", ", block, ", ", width, "]");
  TORCH_CHECK(slots > 0 && slots < block && slots <= kMostSlots, slots, " slots in blocks of ", block);
  TORCH_CHECK(candidates > 0 && candidates <= std::min(kMostCandidates, vocabulary), candidates, " candidates of ",
              vocabulary, " tokens, ", kMostCandidates, " at most");
  TORCH_CHECK(projection.in() == width && weights[kFinalNorm].numel() == width &&
                  weights[kPredecessors].numel() == vocabulary * rank &&
                  weights[kSuccessors].numel() == vocabulary * rank && weights[kPredecessors].is_contiguous() &&
                  weights[kSuccessors].is_contiguous(),
              "the selector's weights do not belong to a head [", vocabulary, ", ", width, "]");
  const at::Tensor& tokens = weights[kTokens];
  TORCH_CHECK(tokens.numel() == 0 || tokens.numel() == vocabulary, "a head of ", vocabulary, " tokens has ",
              tokens.numel(), " ids");
  TORCH_CHECK(inverse_temperatures.numel() == blocks && seeds.numel() == blocks && firsts.numel() == blocks,
              "inverse_temperatures, seeds and first positions are [", blocks, "]");

  const int64_t* ids = tokens.numel() ? tokens.const_data_ptr<int64_t>() : nullptr;
  const int64_t* anchor = anchors.const_data_ptr<int64_t>();
  for (int64_t i = 0; !ids && i < blocks; ++i) {
    TORCH_CHECK_INDEX(anchor[i] >= 0 && anchor[i] < vocabulary, "anchor ", anchor[i], " of ", vocabulary, " tokens");
  }

  const std::vector<int64_t> shape{blocks, slots, candidates};
  const at::TensorOptions longs = anchors.options();
  const at::Tensor ordered = at::empty(shape, longs), found = at::empty(shape, longs), named = at::empty(shape, longs);
  const at::Tensor log_probs = at::empty(shape, hidden.options());
  const at::Tensor scores = at::empty({wants_scores ? rows : 0, candidates, candidates}, hidden.options());
  const at::Tensor logits = at::empty({rows, vocabulary}, hidden.options());
  const at::Tensor projected = at::empty({rows, rank}, hidden.options());
  const int64_t stride = InputRows::stride_of(width);
  const at::Tensor lines = at::empty({rows, stride}, hidden.options());

  const InputRows normed{lines.mutable_data_ptr<float>(), stride};
  const float *from = hidden.const_data_ptr<float>(), *norm = weights[kFinalNorm].const_data_ptr<float>();
  const auto norm_row = [=](int64_t row) {
    rms_norm_row(from + (row / slots * block + 1 + row % slots) * width, norm, eps, width, normed.at(row));
  };
  float *to_logits = logits.mutable_data_ptr<float>(), *to_projected = projected.mutable_data_ptr<float>();
  const Cut head_cut(rows, head), projection_cut(rows, projection);
  const auto multiply = [&](int64_t piece) {
    if (piece < projection_cut.num_pieces()) {
      return projection_cut.multiply(piece, projection, normed, [&](int64_t row, int64_t column, int64_t count,
                                                                    const float* sums) {
        std::copy_n(sums, count, to_projected + row * rank + column);
      });
    }
    head_cut.multiply(piece - projection_cut.num_pieces(), head, normed, [&](int64_t row, int64_t column, int64_t count,
                                                                             const float* sums) {
      float* line = to_logits + row * vocabulary + column;
      for (int64_t j = 0; j < count; ++j) line[j] = factor * sums[j];
      if (softcap > 0) {
        for (int64_t j = 0; j < count; ++j) line[j] = softcap * std::tanh(line[j] / softcap);
      }
    });
  };
  int64_t *numbers = found.mutable_data_ptr<int64_t>(), *names = named.mutable_data_ptr<int64_t>();
  const auto take_top = [=](int64_t row) {
    std::vector<uint64_t> best;
    best.reserve(candidates);
    int64_t* of_row = numbers + row * candidates;
    top_of_row(to_logits + row * vocabulary, vocabulary, candidates, best, of_row);
    for (int64_t i = 0; i < candidates; ++i) names[row * candidates + i] = ids ? ids[of_row[i]] : of_row[i];
  };
  const Selector selector{to_logits,
                          to_projected,
                          weights[kPredecessors].const_data_ptr<float>(),
                          weights[kSuccessors].const_data_ptr<float>(),
                          vocabulary,
                          rank,
                          candidates};
  const int64_t *seed = seeds.const_data_ptr<int64_t>(), *first = firsts.const_data_ptr<int64_t>();
  const double* factors = inverse_temperatures.const_data_ptr<double>();
  float *table = wants_scores ? scores.mutable_data_ptr<float>() : nullptr, *chances = log_probs.mutable_data_ptr<float>();
  int64_t* choices = ordered.mutable_data_ptr<int64_t>();
  const auto walk = [=](int64_t at) {
    std::vector<float> weighted(rank), line(candidates);
    // Tokens are numbered like the head's rows; an anchor without one counts as the row before it.
    const int64_t before = ids ? std::upper_bound(ids, ids + vocabulary, anchor[at]) - ids - 1 : anchor[at];
    const int64_t from_anchor = std::max<int64_t>(before, 0);
    int64_t chosen = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t row = at * slots + slot, *own = numbers + row * candidates, *last = own - candidates;
      for (int64_t i = 0; table && i < candidates; ++i) {
        float* to = table + (row * candidates + i) * candidates;
        selector.score(row, slot ? last[i] : from_anchor, own, weighted.data(), to);
      }
      selector.score(row, slot ? last[chosen] : from_anchor, own, weighted.data(), line.data());
      const int64_t position = first[at] + slot;
      const WalkView view{line.data(), names + row * candidates, factors + at, seed + at, &position, 1, 1, candidates};
      chosen = walk_slot(view, 0, 0, 0, choices + row * candidates, chances + row * candidates);
    }
  };
  run_phases({{rows, norm_row},
              {projection_cut.num_pieces() + head_cut.num_pieces(), multiply},
              {rows, take_top},
              {blocks, walk}});
  return {ordered, log_probs, named, scores.view({wants_scores ? blocks : 0, slots, candidates, candidates})};
}

}  // namespace dflash_ray
