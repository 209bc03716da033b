// Verification on a GPU. Kernels over logits are in tiles.cuh, drawing.cuh and thresholds.cuh; here is the rest, and the
// launches.
//
// Launch shapes depend on shapes alone, memory comes from torch's allocator and nobody waits, so that a step can be
// captured in a graph.

#include "backend.h"
#include "drawing.cuh"
#include "thresholds.cuh"

namespace dflash_ray {
namespace {

template <class T>
struct alignas(16) Loaded {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

// Calls use(index, value) for every value of a row: this thread's share, in ascending order.
template <class T, class Use>
DFLASH_DEVICE void for_values(const Row<T>& row, const Use& use) {
  constexpr int64_t kCount = Loaded<T>::kCount;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row.data) % 16 / sizeof(T));
  const int64_t skipped = misaligned ? kCount - misaligned : 0;
  const int64_t head = skipped < row.size ? skipped : row.size;
  const int64_t loads = (row.size - head) / kCount;
  if (threadIdx.x < head) use(threadIdx.x, row.at(threadIdx.x));
  for (int64_t v = threadIdx.x; v < loads; v += kThreads) {
    const Loaded<T> loaded = *reinterpret_cast<const Loaded<T>*>(row.data + head + v * kCount);
    for (int j = 0; j < kCount; ++j) use(head + v * kCount + j, to_float(loaded.values[j]));
  }
  const int64_t tail = head + loads * kCount + threadIdx.x;
  if (tail < row.size) use(tail, row.at(tail));
}

// Penalties, bias and bans of a row by the whole block. Tokens of one kind are different, so that threads do not meet.
template <class T>
DFLASH_DEVICE void adjust(const PlanView& plan, int64_t i, Row<T>& row) {
  const int64_t s = plan.row(i)[kRowSequence];
  const int64_t* sequence = plan.sequence(s);
  if (!Penalties(plan.parameters(s)).are_off()) {
    for (int64_t e = threadIdx.x; e < sequence[kHistoryLen]; e += kThreads) penalise_history(plan, i, e, row);
    __syncthreads();
    if (threadIdx.x == 0) penalise_path(plan, i, row);
    __syncthreads();
  }
  for (int64_t e = threadIdx.x; e < sequence[kBiasLen]; e += kThreads) add_bias(plan, sequence, e, row);
  __syncthreads();
  if (plan.row(i)[kRowPosition] < sequence[kBanBelow]) {
    for (int64_t e = threadIdx.x; e < sequence[kBannedLen]; e += kThreads) ban(plan, sequence, e, row);
  }
  __syncthreads();
}

template <class T>
DFLASH_KERNEL adjust_kernel(LogitsView logits, PlanView plan) {
  Row<T> row = row_of<T>(logits, blockIdx.x);
  adjust(plan, blockIdx.x, row);
}

DFLASH_KERNEL stats_kernel(PlanView plan, const Tile* tiles, int tiles_of_row, double* stats) {
  const RowPeak peak = row_peak(tiles + blockIdx.x * tiles_of_row, tiles_of_row);
  if (threadIdx.x != 0) return;
  stats[2 * blockIdx.x] = peak.maximum * scale_of(plan, blockIdx.x);
  stats[2 * blockIdx.x + 1] = peak.is_bad;
}

DFLASH_KERNEL combine_kernel(PartialsView partials, PlanView plan, DraftView drafts, int64_t depth, int64_t* outcomes) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s < plan.num_sequences) walk(plan, drafts, partials, s, depth, outcomes + s * (kOutcomeHead + 2 * depth));
}

// One block a sequence. Accepted rows ascend, so no row is overwritten before it is read; a thread keeps its columns.
DFLASH_KERNEL commit_kernel(const int64_t* outcomes, int64_t width, PlanView plan, char* features, int64_t row_bytes,
                            int64_t* commits) {
  const int64_t s = blockIdx.x, depth = (width - kOutcomeHead) / 2;
  const int64_t* outcome = outcomes + s * width;
  if (threadIdx.x == 0) commit_sequence(plan, s, outcome, commits + s * kCommitColumns);
  const int64_t first = plan.sequence(s)[kFeatureRow];
  if (features == nullptr || first < 0) return;
  for (int64_t j = 0; j < outcome[kNumAccepted]; ++j) {
    const int64_t from = outcome[kOutcomeHead + depth + j], to = j + 1;
    if (from == to) continue;
    const uint16_t* source = reinterpret_cast<const uint16_t*>(features + (first + from) * row_bytes);
    uint16_t* target = reinterpret_cast<uint16_t*>(features + (first + to) * row_bytes);
    for (int64_t k = threadIdx.x; k < row_bytes / 2; k += kThreads) target[k] = source[k];
  }
}

template <class T>
DFLASH_KERNEL logprobs_kernel(LogitsView logits, const int64_t* chosen, int64_t num_top, double* out) {
  DFLASH_SHARED(float, maxima, kWarps);
  DFLASH_SHARED(double, sums, kWarps);
  DFLASH_SHARED(Best, bests, kWarps);
  DFLASH_SHARED(float, maximum_of_block, 1);
  DFLASH_SHARED(Best, last, 1);
  const Row<T> row = row_of<T>(logits, blockIdx.x);
  double* line = out + blockIdx.x * (3 + 2 * num_top);
  float maximum = kMinusInf;
  for_values(row, [&](int64_t, float value) { maximum = value > maximum ? value : maximum; });
  maximum = block_reduce(maximum, maxima, TakeMaximum());
  if (threadIdx.x == 0) maximum_of_block[0] = maximum;
  __syncthreads();
  maximum = maximum_of_block[0];
  double sum = 0;
  if (maximum > kMinusInf) for_values(row, [&](int64_t, float value) { sum += exp_of_nonpositive(value - maximum); });
  sum = block_reduce(sum, sums, TakeSum());
  if (threadIdx.x == 0) {
    line[0] = maximum;
    line[1] = sum;
    line[2] = row.has(chosen[blockIdx.x]) ? row.get(chosen[blockIdx.x]) : kMinusInf;
    last[0] = Best{INFINITY, -1};
  }
  for (int64_t n = 0; n < num_top; ++n) {
    __syncthreads();
    const Best after = last[0];
    Best next;
    for_values(row, [&](int64_t index, float value) {
      const int64_t token = row.start + index;
      const bool is_after = value < after.score || (value == after.score && token > after.token);
      if (is_after && value > next.score) next = {value, token};
    });
    next = block_reduce(next, bests, TakeBest());
    __syncthreads();
    if (threadIdx.x == 0) {
      line[3 + 2 * n] = next.score;
      line[4 + 2 * n] = static_cast<double>(next.token);
      last[0] = next;
    }
  }
}

DFLASH_KERNEL noise_kernel(const int64_t* seeds, const int64_t* positions, const int64_t* ids, int64_t count,
                           int64_t width, int purpose, double* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count * width) out[i] = gumbel(seeds[i / width], positions[i / width], ids[i], purpose);
}

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Enough blocks to keep the largest GPUs busy, by number of streaming multiprocessors.
constexpr int64_t kWantedBlocks = 4 * 132;

Spans spans_of(int64_t num_rows, int tiles) {
  const int64_t wanted = (kWantedBlocks + num_rows - 1) / num_rows, most = (tiles + 1) / 2;
  const int64_t least = (tiles + kTilesOfCounts - 1) / kTilesOfCounts;
  const int64_t count = wanted < most ? wanted : most, enough = least > 1 ? least : 1;
  return {static_cast<unsigned>(count > enough ? count : enough), static_cast<unsigned>(tiles)};
}

// A launch of no blocks is an error, so empty steps launch nothing.
#define DFLASH_LAUNCH_LOGITS(threads, kernel, logits, blocks, ...)                                              \
  do {                                                                                                          \
    if ((blocks) == 0) break;                                                                                   \
    if ((logits).kind == Kind::kFloat32) DFLASH_LAUNCH_WITH(threads, kernel<float>, blocks, __VA_ARGS__);       \
    if ((logits).kind == Kind::kBfloat16) DFLASH_LAUNCH_WITH(threads, kernel<Bfloat16>, blocks, __VA_ARGS__);   \
    if ((logits).kind == Kind::kFloat16) DFLASH_LAUNCH_WITH(threads, kernel<Float16>, blocks, __VA_ARGS__);     \
  } while (false)

// What is noted of a step's rows between launches, in memory that goes back to torch's allocator at the end.
class Notes {
 public:
  Notes(const LogitsView& logits, bool searches)
      : num_rows_(logits.num_rows),
        tiles_of_row_(num_tiles(logits)),
        spans_(spans_of(num_rows_ + (num_rows_ == 0), tiles_of_row_)) {
    // Twice: for the size, then for the places.
    for (int pass = 0; pass < 2; ++pass) {
      at_ = 0;
      place(tiles, num_rows_ * tiles_of_row_);
      place(counters, num_rows_ * kCounters);
      place(parts, num_rows_ * spans_.count);
      place(search.searches, searches ? num_rows_ : 0);
      place(search.bins, searches ? num_rows_ * kSearchBins : 0);
      place(search.gathered, searches ? num_rows_ * kCapacity : 0);
      place(search.states, searches ? num_rows_ * kStateColumns : 0);
      if (pass == 0) memory_ = scratch_memory(at_);
    }
    search.tiles = tiles;
    search.counters = counters;
  }

  void peek(const LogitsView& logits) const {
    const int64_t warps = num_rows_ * tiles_of_row_;
    const int threads = warps < kWarps * kWantedBlocks ? 2 * kWarp : kThreads;  // small blocks reach more of the GPU
    const int64_t blocks = (warps * kWarp + threads - 1) / threads;
    DFLASH_LAUNCH_LOGITS(threads, peek_kernel, logits, blocks, logits, tiles, counters);
  }

  void draw(const LogitsView& logits, const PlanView& plan, const double* maxima, const int64_t* states,
            const DraftView& drafts, int64_t width, bool is_greedy, double* partials) const {
    const Spans spans = is_greedy ? Spans{1, spans_.tiles} : spans_;
    DFLASH_LAUNCH_LOGITS(kThreads, draw_kernel, logits, num_rows_ * spans.count, logits, plan, spans, tiles, counters,
                         parts, maxima, states, drafts, width, partials);
  }

  // The lowest kept values, as a state.
  const int64_t* threshold(const LogitsView& logits, const PlanView& plan, const Limits& limits) const {
    const int64_t blocks = num_rows_ * spans_.count;
    if (num_rows_) DFLASH_LAUNCH(begin_search_kernel, num_rows_, plan, tiles_of_row_, search);
    if (limits.has_top_k) {
      DFLASH_LAUNCH_LOGITS(kThreads, search_kernel, logits, blocks, logits, plan, spans_, search, true);
    }
    if (limits.has_top_p) {
      DFLASH_LAUNCH_LOGITS(kThreads, mass_bins_kernel, logits, blocks, logits, plan, spans_, search);
      DFLASH_LAUNCH_LOGITS(kThreads, search_kernel, logits, blocks, logits, plan, spans_, search, false);
    }
    return search.states;
  }

  void stats(const PlanView& plan, double* out) const {
    if (num_rows_) DFLASH_LAUNCH(stats_kernel, num_rows_, plan, tiles, tiles_of_row_, out);
  }

 private:
  template <class T>
  void place(T*& to, int64_t count) {
    constexpr int64_t kAlignment = 16;
    to = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory_.get()) + at_);
    at_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }

  int64_t num_rows_, at_ = 0;
  int tiles_of_row_;
  Spans spans_;
  std::shared_ptr<char> memory_;
  Tile* tiles = nullptr;
  unsigned* counters = nullptr;
  Part* parts = nullptr;
  ThresholdScratch search{};
};

void adjust_rows(const LogitsView& logits, const PlanView& plan) {
  DFLASH_LAUNCH_LOGITS(kThreads, adjust_kernel, logits, logits.num_rows, logits, plan);
}

}  // namespace

void CudaBackend::prepare(const LogitsView& logits, const PlanView& plan, double* stats) {
  const Notes notes(logits, false);
  adjust_rows(logits, plan);
  notes.peek(logits);
  notes.stats(plan, stats);
}

void CudaBackend::threshold_start(const double* maxima, const PlanView& plan, int64_t* states) {
  if (plan.num_rows) DFLASH_LAUNCH(threshold_start_kernel, blocks_for(plan.num_rows), maxima, plan, states);
}

void CudaBackend::threshold_histogram(const LogitsView& logits, const PlanView& plan, const double* maxima,
                                      const int64_t* states, int round, int64_t* histograms) {
  DFLASH_LAUNCH_LOGITS(kThreads, threshold_histogram_kernel, logits, logits.num_rows, logits, plan, maxima, states,
                       round, histograms);
}

void CudaBackend::threshold_narrow(const int64_t* histograms, const PlanView& plan, int round, int64_t* states) {
  if (plan.num_rows) DFLASH_LAUNCH(threshold_narrow_kernel, blocks_for(plan.num_rows), histograms, plan, round, states);
}

void CudaBackend::greedy(const LogitsView& logits, const PlanView& plan, bool adjusts, double* partials) {
  const Notes notes(logits, false);
  if (adjusts) adjust_rows(logits, plan);
  notes.peek(logits);
  notes.draw(logits, plan, nullptr, nullptr, {}, kPlainPartials, true, partials);
}

void CudaBackend::coupled(const LogitsView& logits, const PlanView& plan, const int64_t* states, bool adjusts,
                          double* partials) {
  const Notes notes(logits, false);
  if (adjusts) adjust_rows(logits, plan);
  notes.peek(logits);
  notes.draw(logits, plan, nullptr, states, {}, kPlainPartials, false, partials);
}

void CudaBackend::rejection(const LogitsView& logits, const PlanView& plan, const double* maxima, const int64_t* states,
                            const DraftView& drafts, double* partials) {
  const Notes notes(logits, false);
  notes.peek(logits);
  notes.draw(logits, plan, maxima, states, drafts, kDraftMass + drafts.width, false, partials);
}

void CudaBackend::unsharded(const LogitsView& logits, const PlanView& plan, const DraftView& drafts, bool adjusts,
                            const Limits& limits, int64_t width, double* partials) {
  const bool searches = limits.has_min_p || limits.has_top_k || limits.has_top_p;
  const Notes notes(logits, searches);
  if (adjusts) adjust_rows(logits, plan);
  notes.peek(logits);
  const int64_t* states = searches ? notes.threshold(logits, plan, limits) : nullptr;
  notes.draw(logits, plan, nullptr, states, drafts, width, false, partials);
}

void CudaBackend::combine(const PartialsView& partials, const PlanView& plan, const DraftView& drafts, int64_t depth,
                          int64_t* outcomes) {
  if (plan.num_sequences) {
    DFLASH_LAUNCH(combine_kernel, blocks_for(plan.num_sequences), partials, plan, drafts, depth, outcomes);
  }
}

void CudaBackend::commit(const int64_t* outcomes, int64_t width, const PlanView& plan, char* features,
                         int64_t row_bytes, int64_t* commits) {
  if (plan.num_sequences) {
    DFLASH_LAUNCH(commit_kernel, plan.num_sequences, outcomes, width, plan, features, row_bytes, commits);
  }
}

void CudaBackend::logprobs(const LogitsView& logits, const int64_t* chosen, int64_t num_top, double* out) {
  DFLASH_LAUNCH_LOGITS(kThreads, logprobs_kernel, logits, logits.num_rows, logits, chosen, num_top, out);
}

void CudaBackend::noise(const int64_t* seeds, const int64_t* positions, const int64_t* ids, int64_t count,
                        int64_t width, int purpose, double* out) {
  const int64_t blocks = blocks_for(count * width);
  if (blocks > 0) DFLASH_LAUNCH(noise_kernel, blocks, seeds, positions, ids, count, width, purpose, out);
}

}  // namespace dflash_ray
