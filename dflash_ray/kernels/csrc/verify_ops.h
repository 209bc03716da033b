// The verification operators as torch sees them: checks, outputs, and one call into the device's backend.
//
// Shapes and meaning are those of kernels/ops.py. A backend is a struct of static functions over raw views; it launches
// and returns, and no operator waits for the device.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>

#include "verify_core.cuh"

namespace dflash_ray {

using at::Tensor;

#define DFLASH_PLAN const Tensor &rows, const Tensor &ints, const Tensor &floats, const Tensor &ids, const Tensor &values

inline PlanView plan_view(DFLASH_PLAN) {
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.dim() == 2 && rows.size(1) == kRowColumns && rows.is_contiguous(),
              "rows must be a contiguous int64 [R, ", int{kRowColumns}, "]");
  TORCH_CHECK(ints.scalar_type() == at::kLong && ints.dim() == 2 && ints.size(1) == kIntColumns && ints.is_contiguous(),
              "ints must be a contiguous int64 [S, ", int{kIntColumns}, "]");
  TORCH_CHECK(floats.scalar_type() == at::kFloat && floats.dim() == 2 && floats.size(0) == ints.size(0) &&
                  floats.size(1) == kFloatColumns && floats.is_contiguous(),
              "floats must be a contiguous float32 [S, ", int{kFloatColumns}, "]");
  TORCH_CHECK(ids.scalar_type() == at::kLong && values.scalar_type() == at::kFloat && ids.numel() == values.numel() &&
                  ids.is_contiguous() && values.is_contiguous(),
              "ids int64 and values float32 must be contiguous and of one length");
  return {rows.const_data_ptr<int64_t>(), ints.const_data_ptr<int64_t>(), floats.const_data_ptr<float>(),
          ids.const_data_ptr<int64_t>(),  values.const_data_ptr<float>(), rows.size(0), ints.size(0)};
}

inline LogitsView logits_view(const Tensor& logits, int64_t start, const Tensor& rows) {
  TORCH_CHECK(logits.dim() == 2 && (logits.size(1) == 0 || logits.stride(1) == 1), "logits must be [R, Vs], rows dense");
  TORCH_CHECK(logits.size(0) == rows.size(0), "logits have ", logits.size(0), " rows, the plan ", rows.size(0));
  const auto type = logits.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "logits must be float32, bfloat16 or float16, not ", type);
  const Kind kind = type == at::kFloat ? Kind::kFloat32 : type == at::kHalf ? Kind::kFloat16 : Kind::kBfloat16;
  return {logits.data_ptr(), kind, logits.size(0), logits.size(1), logits.stride(0), start};
}

inline DraftView draft_view(const Tensor& draft_ids, const Tensor& draft_probs) {
  TORCH_CHECK(draft_ids.scalar_type() == at::kLong && draft_probs.scalar_type() == at::kFloat &&
                  draft_ids.sizes() == draft_probs.sizes() && draft_ids.is_contiguous() && draft_probs.is_contiguous(),
              "draft_ids int64 and draft_probs float32 must be contiguous [R, K]");
  return {draft_ids.const_data_ptr<int64_t>(), draft_probs.const_data_ptr<float>(), draft_ids.size(1)};
}

// Makes a tensor's device the current one; CPU tensors need nothing.
struct NoGuard {
  explicit NoGuard(const Tensor&) {}
};

template <class Backend, class Guard>
struct VerifyOps {
  static Tensor prepare(const Tensor& logits, int64_t start, DFLASH_PLAN) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    Tensor stats = at::empty({plan.num_rows, 2}, logits.options().dtype(at::kDouble));
    Backend::prepare(logits_view(logits, start, rows), plan, stats.template mutable_data_ptr<double>());
    return stats;
  }

  static Tensor threshold_start(const Tensor& maxima, DFLASH_PLAN) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    check_maxima(maxima, plan);
    Tensor state = at::empty({plan.num_rows, kStateColumns}, rows.options());
    Backend::threshold_start(maxima.const_data_ptr<double>(), plan, state.template mutable_data_ptr<int64_t>());
    return state;
  }

  static Tensor threshold_histogram(const Tensor& logits, int64_t start, DFLASH_PLAN, const Tensor& maxima,
                                    const Tensor& state, int64_t round) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    check_maxima(maxima, plan);
    check_state(state, plan);
    Tensor histogram = at::empty({plan.num_rows, kBins}, rows.options());
    Backend::threshold_histogram(logits_view(logits, start, rows), plan, maxima.const_data_ptr<double>(),
                                 state.const_data_ptr<int64_t>(), static_cast<int>(round),
                                 histogram.template mutable_data_ptr<int64_t>());
    return histogram;
  }

  static void threshold_narrow(const Tensor& state, const Tensor& histogram, DFLASH_PLAN, int64_t round) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    check_state(state, plan);
    TORCH_CHECK(histogram.scalar_type() == at::kLong && histogram.is_contiguous() &&
                    histogram.numel() == plan.num_rows * kBins,
                "histogram must be a contiguous int64 [R, 256]");
    Backend::threshold_narrow(histogram.const_data_ptr<int64_t>(), plan, static_cast<int>(round),
                              state.data_ptr<int64_t>());
  }

  static Tensor greedy(const Tensor& logits, int64_t start, DFLASH_PLAN, bool adjusts) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    Tensor partials = at::empty({plan.num_rows, kPlainPartials}, logits.options().dtype(at::kDouble));
    Backend::greedy(logits_view(logits, start, rows), plan, adjusts, partials.template mutable_data_ptr<double>());
    return partials;
  }

  static Tensor coupled(const Tensor& logits, int64_t start, DFLASH_PLAN, const std::optional<Tensor>& state,
                        bool adjusts) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    Tensor partials = at::empty({plan.num_rows, kPlainPartials}, logits.options().dtype(at::kDouble));
    Backend::coupled(logits_view(logits, start, rows), plan, state_or_null(state, plan), adjusts,
                     partials.template mutable_data_ptr<double>());
    return partials;
  }

  static Tensor rejection(const Tensor& logits, int64_t start, DFLASH_PLAN, const Tensor& maxima,
                          const std::optional<Tensor>& state, const Tensor& draft_ids, const Tensor& draft_probs) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    check_maxima(maxima, plan);
    TORCH_CHECK(draft_ids.dim() == 2 && draft_ids.size(0) == plan.num_rows, "draft_ids must be [R, K]");
    const DraftView drafts = draft_view(draft_ids, draft_probs);
    Tensor partials = at::empty({plan.num_rows, kDraftMass + drafts.width}, maxima.options());
    Backend::rejection(logits_view(logits, start, rows), plan, maxima.const_data_ptr<double>(),
                       state_or_null(state, plan), drafts, partials.template mutable_data_ptr<double>());
    return partials;
  }

  static Tensor unsharded(const Tensor& logits, int64_t start, DFLASH_PLAN, const Tensor& draft_ids,
                          const Tensor& draft_probs, bool adjusts, bool has_min_p, bool has_top_k, bool has_top_p) {
    const DraftView drafts = draft_view(draft_ids, draft_probs);
    const int64_t width = drafts.width > 0 ? kDraftMass + drafts.width : int64_t{kPlainPartials};
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    TORCH_CHECK(drafts.width == 0 || draft_ids.size(0) == plan.num_rows, "draft_ids must be [R, K]");
    Tensor partials = at::empty({plan.num_rows, width}, logits.options().dtype(at::kDouble));
    Backend::unsharded(logits_view(logits, start, rows), plan, drafts, adjusts, {has_min_p, has_top_k, has_top_p}, width,
                       partials.template mutable_data_ptr<double>());
    return partials;
  }

  static Tensor combine(const Tensor& partials, DFLASH_PLAN, const Tensor& draft_ids, const Tensor& draft_probs,
                        int64_t depth) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    TORCH_CHECK(partials.dim() == 3 && partials.scalar_type() == at::kDouble && partials.is_contiguous() &&
                    partials.size(1) == plan.num_rows && partials.size(2) >= kPlainPartials,
                "partials must be a contiguous float64 [N, R, C]");
    const PartialsView view{partials.const_data_ptr<double>(), partials.size(0), partials.size(1), partials.size(2)};
    const DraftView drafts = draft_view(draft_ids, draft_probs);
    TORCH_CHECK(drafts.width == 0 || (draft_ids.size(0) == plan.num_rows && view.width == kDraftMass + drafts.width),
                "partials of verify_rejection and the same drafts belong together");
    Tensor outcome = at::empty({plan.num_sequences, kOutcomeHead + 2 * depth}, rows.options());
    Backend::combine(view, plan, drafts, depth, outcome.template mutable_data_ptr<int64_t>());
    return outcome;
  }

  static Tensor commit(const Tensor& outcome, DFLASH_PLAN, const std::optional<Tensor>& features) {
    const Guard guard(rows);
    const PlanView plan = plan_view(rows, ints, floats, ids, values);
    TORCH_CHECK(outcome.dim() == 2 && outcome.scalar_type() == at::kLong && outcome.is_contiguous() &&
                    outcome.size(0) == plan.num_sequences,
                "outcome must be a contiguous int64 [S, 2 + 2 depth]");
    TORCH_CHECK(!features || (features->dim() == 2 && features->is_contiguous()), "features must be contiguous [F, H]");
    Tensor commits = at::empty({plan.num_sequences, kCommitColumns}, outcome.options());
    const int64_t row_bytes = features ? features->size(1) * features->element_size() : 0;
    Backend::commit(outcome.const_data_ptr<int64_t>(), outcome.size(1), plan,
                    features ? static_cast<char*>(features->data_ptr()) : nullptr, row_bytes,
                    commits.template mutable_data_ptr<int64_t>());
    return commits;
  }

  static Tensor logprobs(const Tensor& logits, int64_t start, const Tensor& chosen, int64_t num_top) {
    const Guard guard(logits);
    TORCH_CHECK(chosen.scalar_type() == at::kLong && chosen.is_contiguous(), "chosen must be a contiguous int64 [Q]");
    Tensor out = at::empty({logits.size(0), 3 + 2 * num_top}, logits.options().dtype(at::kDouble));
    Backend::logprobs(logits_view(logits, start, chosen), chosen.const_data_ptr<int64_t>(), num_top,
                      out.template mutable_data_ptr<double>());
    return out;
  }

  static Tensor noise(const Tensor& seeds, const Tensor& positions, const Tensor& ids, int64_t purpose) {
    const Guard guard(ids);
    TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.is_contiguous() &&
                    seeds.scalar_type() == at::kLong && seeds.is_contiguous() && seeds.numel() == ids.size(0) &&
                    positions.scalar_type() == at::kLong && positions.is_contiguous() &&
                    positions.numel() == ids.size(0),
                "seeds [N], positions [N] and ids [N, K] must be contiguous int64");
    Tensor out = at::empty(ids.sizes(), ids.options().dtype(at::kDouble));
    Backend::noise(seeds.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>(),
                   ids.size(0), ids.size(1), static_cast<int>(purpose), out.template mutable_data_ptr<double>());
    return out;
  }

  static void register_in(torch::Library& library) {
    library.impl("verify_prepare", &prepare);
    library.impl("threshold_start", &threshold_start);
    library.impl("threshold_histogram", &threshold_histogram);
    library.impl("threshold_narrow", &threshold_narrow);
    library.impl("verify_greedy", &greedy);
    library.impl("verify_coupled", &coupled);
    library.impl("verify_rejection", &rejection);
    library.impl("verify_unsharded", &unsharded);
    library.impl("verify_combine", &combine);
    library.impl("commit", &commit);
    library.impl("token_logprobs", &logprobs);
    library.impl("gumbel_noise", &noise);
  }

 private:
  static void check_maxima(const Tensor& maxima, const PlanView& plan) {
    TORCH_CHECK(maxima.scalar_type() == at::kDouble && maxima.is_contiguous() && maxima.numel() == plan.num_rows,
                "maxima must be a contiguous float64 [R]");
  }

  static void check_state(const Tensor& state, const PlanView& plan) {
    TORCH_CHECK(state.scalar_type() == at::kLong && state.is_contiguous() &&
                    state.numel() == plan.num_rows * kStateColumns,
                "state must be a contiguous int64 [R, ", int{kStateColumns}, "]");
  }

  static const int64_t* state_or_null(const std::optional<Tensor>& state, const PlanView& plan) {
    if (!state) return nullptr;
    check_state(*state, plan);
    return state->const_data_ptr<int64_t>();
  }
};

#undef DFLASH_PLAN

#define DFLASH_PLAN_SCHEMA "Tensor rows, Tensor ints, Tensor floats, Tensor ids, Tensor values"
#define DFLASH_ROWS_SCHEMA "(Tensor logits, int vocab_start, " DFLASH_PLAN_SCHEMA
#define DFLASH_ADJUSTED_SCHEMA "(Tensor(a!) logits, int vocab_start, " DFLASH_PLAN_SCHEMA

inline void define_verify_ops(torch::Library& library) {
  library.def("verify_prepare" DFLASH_ADJUSTED_SCHEMA ") -> Tensor");
  library.def("threshold_start(Tensor maxima, " DFLASH_PLAN_SCHEMA ") -> Tensor");
  library.def("threshold_histogram" DFLASH_ROWS_SCHEMA ", Tensor maxima, Tensor state, int round) -> Tensor");
  library.def("threshold_narrow(Tensor(a!) state, Tensor histogram, " DFLASH_PLAN_SCHEMA ", int round) -> ()");
  library.def("verify_greedy" DFLASH_ADJUSTED_SCHEMA ", bool adjusts) -> Tensor");
  library.def("verify_coupled" DFLASH_ADJUSTED_SCHEMA ", Tensor? state, bool adjusts) -> Tensor");
  library.def("verify_rejection" DFLASH_ROWS_SCHEMA
              ", Tensor maxima, Tensor? state, Tensor draft_ids, Tensor draft_probs) -> Tensor");
  library.def("verify_unsharded" DFLASH_ADJUSTED_SCHEMA
              ", Tensor draft_ids, Tensor draft_probs, bool adjusts, bool has_min_p, "
              "bool has_top_k, bool has_top_p) -> Tensor");
  library.def("verify_combine(Tensor partials, " DFLASH_PLAN_SCHEMA
              ", Tensor draft_ids, Tensor draft_probs, int depth) -> Tensor");
  library.def("commit(Tensor outcome, " DFLASH_PLAN_SCHEMA ", Tensor(a!)? features) -> Tensor");
  library.def("token_logprobs(Tensor logits, int vocab_start, Tensor chosen, int num_top) -> Tensor");
  library.def("gumbel_noise(Tensor seeds, Tensor positions, Tensor ids, int purpose) -> Tensor");
}

#undef DFLASH_PLAN_SCHEMA
#undef DFLASH_ROWS_SCHEMA
#undef DFLASH_ADJUSTED_SCHEMA

}  // namespace dflash_ray
