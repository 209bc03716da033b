// The CUDA backend of the verification operators; the launchers are in verify.cu.
#pragma once

#include <memory>

#include "../verify_core.cuh"

namespace dflash_ray {

// The stream that torch works on, a cudaStream_t.
void* current_stream();

// Memory of torch's allocator on the current device, at least one byte, aligned for any type. It may be given back while
// kernels that use it wait in the stream.
std::shared_ptr<char> scratch_memory(int64_t bytes);

struct CudaBackend {
  static void prepare(const LogitsView& logits, const PlanView& plan, double* stats);
  static void threshold_start(const double* maxima, const PlanView& plan, int64_t* states);
  static void threshold_histogram(const LogitsView& logits, const PlanView& plan, const double* maxima,
                                  const int64_t* states, int round, int64_t* histograms);
  static void threshold_narrow(const int64_t* histograms, const PlanView& plan, int round, int64_t* states);
  static void greedy(const LogitsView& logits, const PlanView& plan, bool adjusts, double* partials);
  static void coupled(const LogitsView& logits, const PlanView& plan, const int64_t* states, bool adjusts,
                      double* partials);
  static void rejection(const LogitsView& logits, const PlanView& plan, const double* maxima, const int64_t* states,
                        const DraftView& drafts, double* partials);
  static void unsharded(const LogitsView& logits, const PlanView& plan, const DraftView& drafts, bool adjusts,
                        const Limits& limits, int64_t width, double* partials);
  static void combine(const PartialsView& partials, const PlanView& plan, const DraftView& drafts, int64_t depth,
                      int64_t* outcomes);
  static void commit(const int64_t* outcomes, int64_t width, const PlanView& plan, char* features, int64_t row_bytes,
                     int64_t* commits);
  static void logprobs(const LogitsView& logits, const int64_t* chosen, int64_t num_top, double* out);
  static void noise(const int64_t* seeds, const int64_t* positions, const int64_t* ids, int64_t count, int64_t width,
                    int purpose, double* out);
};

}  // namespace dflash_ray
