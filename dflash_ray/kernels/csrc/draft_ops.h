// The operators that choose a drafter's candidates as torch sees them. Shapes and meaning: kernels/draft_ops.py.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "draft_core.h"

namespace dflash_ray {

template <class Backend, class Guard>
struct DraftOps {
  static at::Tensor top_candidates(const at::Tensor& logits, int64_t count) {
    const Guard guard(logits);
    TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == at::kFloat && logits.is_contiguous(),
                "logits are contiguous float32 [R, V]");
    TORCH_CHECK(count > 0 && count <= kMostCandidates && count <= logits.size(1) && logits.size(1) <= INT32_MAX,
                count, " candidates of ", logits.size(1), " tokens, ", kMostCandidates, " at most");
    at::Tensor out = at::empty({logits.size(0), count}, logits.options().dtype(at::kLong));
    Backend::top_candidates({logits.const_data_ptr<float>(), logits.size(0), logits.size(1), count},
                            out.template mutable_data_ptr<int64_t>());
    return out;
  }

  static std::tuple<at::Tensor, at::Tensor> walk(const at::Tensor& scores, const at::Tensor& ids,
                                                 const at::Tensor& inverse_temperatures, const at::Tensor& seeds,
                                                 const at::Tensor& firsts) {
    const Guard guard(scores);
    TORCH_CHECK(ids.dim() == 3 && ids.scalar_type() == at::kLong && ids.is_contiguous() &&
                    ids.size(1) <= kMostSlots && ids.size(2) > 0 && ids.size(2) <= kMostCandidates,
                "ids are contiguous int64 [N, S, k]");
    const int64_t blocks = ids.size(0), slots = ids.size(1), candidates = ids.size(2);
    TORCH_CHECK(scores.scalar_type() == at::kFloat && scores.is_contiguous() && scores.dim() == 4 &&
                    scores.numel() == ids.numel() * candidates && scores.size(3) == candidates,
                "scores are contiguous float32 [N, S, k, k]");
    const auto is_column = [&](const at::Tensor& column, at::ScalarType type) {
      return column.scalar_type() == type && column.is_contiguous() && column.numel() == blocks;
    };
    TORCH_CHECK(is_column(inverse_temperatures, at::kDouble) && is_column(seeds, at::kLong) && is_column(firsts, at::kLong),
                "inverse_temperatures float64, seeds and first positions int64 are contiguous [N]");
    at::Tensor ordered = at::empty_like(ids), log_probs = at::empty(ids.sizes(), scores.options());
    const WalkView view{scores.const_data_ptr<float>(),
                        ids.const_data_ptr<int64_t>(),
                        inverse_temperatures.const_data_ptr<double>(),
                        seeds.const_data_ptr<int64_t>(),
                        firsts.const_data_ptr<int64_t>(),
                        blocks,
                        slots,
                        candidates};
    Backend::walk(view, ordered.template mutable_data_ptr<int64_t>(), log_probs.template mutable_data_ptr<float>());
    return {ordered, log_probs};
  }

  static void register_in(torch::Library& library) {
    library.impl("top_candidates", &top_candidates);
    library.impl("walk_candidates", &walk);
  }
};

inline void define_draft_ops(torch::Library& library) {
  library.def("top_candidates(Tensor logits, int count) -> Tensor");
  library.def(
      "walk_candidates(Tensor scores, Tensor ids, Tensor inverse_temperatures, Tensor seeds, Tensor firsts) -> (Tensor, Tensor)");
}

}  // namespace dflash_ray
