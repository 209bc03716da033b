// Verification on a GPU: one block a row reads its logits once, in 16-byte loads; the rest is a few numbers a row.
//
// Launch shapes depend on shapes alone, nothing is allocated and nobody waits, so that a step can be captured in a graph.
// Each thread prunes by its own best token: a token's noise is drawn only where its bound could still win.

#include "backend.h"
#include "simt.cuh"
#include "../scalars.h"

namespace dflash_ray {
namespace {

constexpr int kGroup = 4;  // tokens that share a counter

template <class T>
struct alignas(16) Loaded {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

template <class T>
DFLASH_DEVICE Row<T> row_of(const LogitsView& logits, int64_t i) {
  return {static_cast<T*>(logits.data) + i * logits.stride, logits.size, logits.start};
}

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

// What a thread has seen of a row.
struct Seen {
  Best best;
  float maximum = kMinusInf;
  bool is_bad = false;

  DFLASH_DEVICE void note(float value) {
    maximum = value > maximum ? value : maximum;
    is_bad |= value != value || value == INFINITY;
  }
};

// Thread 0 writes the block's part of a row.
DFLASH_DEVICE void write_partial(const Seen& seen, float scale, double* partial) {
  DFLASH_SHARED(Best, bests, kWarps);
  DFLASH_SHARED(float, maxima, kWarps);
  DFLASH_SHARED(int, flags, kWarps);
  const Best best = block_reduce(seen.best, bests, TakeBest());
  const float maximum = block_reduce(seen.maximum, maxima, TakeMaximum());
  const int is_bad = block_reduce(static_cast<int>(seen.is_bad), flags, TakeSum());
  if (threadIdx.x == 0) {
    partial[kBestScore] = is_bad ? static_cast<double>(kMinusInf) : best.score;
    partial[kBestToken] = is_bad ? -1.0 : static_cast<double>(best.token);
    partial[kMaximum] = maximum * scale;
    partial[kIsBad] = is_bad != 0;
  }
}

template <class T>
DFLASH_DEVICE void see_greedy(const Row<T>& row, Seen& seen) {
  for_values(row, [&](int64_t index, float value) {
    if (value > seen.maximum) seen.best = {value, row.start + index};
    seen.note(value);
  });
}

// Four tokens of one counter; outside the row they are -inf. One load where they lie together.
template <class T>
DFLASH_DEVICE void load_group(const Row<T>& row, int64_t index, float (&values)[kGroup]) {
  struct alignas(kGroup * sizeof(T)) Quad {
    T values[kGroup];
  };
  const T* from = row.data + index;
  if (index >= 0 && index + kGroup <= row.size && reinterpret_cast<uintptr_t>(from) % sizeof(Quad) == 0) {
    const Quad quad = *reinterpret_cast<const Quad*>(from);
    for (int j = 0; j < kGroup; ++j) values[j] = to_float(quad.values[j]);
    return;
  }
  for (int j = 0; j < kGroup; ++j) {
    values[j] = index + j >= 0 && index + j < row.size ? to_float(from[j]) : kMinusInf;
  }
}

template <class T>
DFLASH_DEVICE void see_drawn(const Row<T>& row, const RowDraw& draw, Seen& seen) {
  const int64_t first = row.start / kGroup, last = (row.start + row.size + kGroup - 1) / kGroup;
  for (int64_t group = first + threadIdx.x; group < last; group += kThreads) {
    const int64_t index = group * kGroup - row.start;
    float values[kGroup];
    load_group(row, index, values);
    float highest = kMinusInf;
    for (int j = 0; j < kGroup; ++j) {
      seen.note(values[j]);
      highest = values[j] > highest ? values[j] : highest;
    }
    highest *= draw.inv_temperature;
    if (highest == kMinusInf || highest < draw.floor) continue;
    const double gap = seen.best.token < 0 ? 0 : seen.best.score - static_cast<double>(highest);
    const uint32_t needed = word_that_may_reach(static_cast<float>(gap));
    if (needed == kNoWord) continue;
    const Words words = noise_words(draw.seed, draw.position, group, draw.purpose);
    for (int j = 0; j < kGroup; ++j) {
      if (words.at[j] >> 8 < needed || index + j < 0 || index + j >= row.size) continue;
      consider(draw, values[j] * draw.inv_temperature, words.at[j], row.start + index + j, seen.best);
    }
  }
}

DFLASH_DEVICE float floor_of(const int64_t* states, int64_t row) {
  return states ? value_of_key(static_cast<uint32_t>(states[row * kStateColumns + kFloorKey])) : kMinusInf;
}

DFLASH_DEVICE float scale_of(const PlanView& plan, int64_t row) {
  const float* parameters = plan.parameters(plan.row(row)[kRowSequence]);
  return is_greedy(parameters) ? 1.0f : parameters[kInvTemperature];
}

template <class T>
DFLASH_DEVICE void draw_row(const Row<T>& row, int64_t i, const PlanView& plan, const int64_t* states,
                            const DraftView& drafts, double* partial) {
  Seen seen;
  if (is_greedy(plan.parameters(plan.row(i)[kRowSequence]))) {
    see_greedy(row, seen);
  } else {
    see_drawn(row, row_draw(plan, drafts, i, floor_of(states, i)), seen);
  }
  write_partial(seen, scale_of(plan, i), partial);
}

template <class T>
DFLASH_KERNEL prepare_kernel(LogitsView logits, PlanView plan, double* stats) {
  Row<T> row = row_of<T>(logits, blockIdx.x);
  adjust(plan, blockIdx.x, row);
  Seen seen;
  for_values(row, [&](int64_t, float value) { seen.note(value); });
  DFLASH_SHARED(float, maxima, kWarps);
  DFLASH_SHARED(int, flags, kWarps);
  const float maximum = block_reduce(seen.maximum, maxima, TakeMaximum());
  const int is_bad = block_reduce(static_cast<int>(seen.is_bad), flags, TakeSum());
  if (threadIdx.x == 0) {
    stats[2 * blockIdx.x] = maximum * scale_of(plan, blockIdx.x);
    stats[2 * blockIdx.x + 1] = is_bad != 0;
  }
}

template <class T>
DFLASH_KERNEL greedy_kernel(LogitsView logits, PlanView plan, bool adjusts, double* partials) {
  Row<T> row = row_of<T>(logits, blockIdx.x);
  if (adjusts) adjust(plan, blockIdx.x, row);
  Seen seen;
  see_greedy(row, seen);
  write_partial(seen, 1.0f, partials + blockIdx.x * kPlainPartials);
}

template <class T>
DFLASH_KERNEL coupled_kernel(LogitsView logits, PlanView plan, const int64_t* states, bool adjusts, double* partials) {
  Row<T> row = row_of<T>(logits, blockIdx.x);
  if (adjusts) adjust(plan, blockIdx.x, row);
  draw_row(row, blockIdx.x, plan, states, {}, partials + blockIdx.x * kPlainPartials);
}

template <class T>
DFLASH_KERNEL rejection_kernel(LogitsView logits, PlanView plan, const double* maxima, const int64_t* states,
                               DraftView drafts, double* partials) {
  const int64_t i = blockIdx.x;
  const Row<T> row = row_of<T>(logits, i);
  double* partial = partials + i * (kDraftMass + drafts.width);
  draw_row(row, i, plan, states, drafts, partial);
  const bool judged = is_judged(plan, drafts, i);
  const float scale = scale_of(plan, i), maximum = static_cast<float>(maxima[i]), floor = floor_of(states, i);
  long long mass = 0;
  if (judged) {
    for_values(row, [&](int64_t, float value) { mass += value * scale >= floor ? mass_of(value, scale, maximum) : 0; });
  }
  DFLASH_SHARED(long long, masses, kWarps);
  mass = block_reduce(mass, masses, TakeSum());
  if (threadIdx.x == 0) partial[kMass] = static_cast<double>(mass);
  for (int64_t j = threadIdx.x; j < drafts.width; j += kThreads) {
    const int64_t token = drafts.ids[i * drafts.width + j];
    const bool counts = judged && row.has(token) && row.get(token) * scale >= floor;
    partial[kDraftMass + j] = counts ? static_cast<double>(mass_of(row.get(token), scale, maximum)) : 0.0;
  }
}

DFLASH_KERNEL threshold_start_kernel(const double* maxima, PlanView plan, int64_t* states) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < plan.num_rows) {
    start_threshold(plan.parameters(plan.row(i)[kRowSequence]), maxima[i], states + i * kStateColumns);
  }
}

template <class T>
DFLASH_KERNEL threshold_histogram_kernel(LogitsView logits, PlanView plan, const double* maxima, const int64_t* states,
                                         int index, int64_t* histograms) {
  DFLASH_SHARED(unsigned long long, bins, kBins);
  static_assert(kThreads == kBins);
  bins[threadIdx.x] = 0ull;
  __syncthreads();
  const int64_t i = blockIdx.x, s = plan.row(i)[kRowSequence];
  const Round round(index);
  if (round.concerns(plan.sequence(s), plan.parameters(s))) {
    const int64_t* state = states + i * kStateColumns;
    const float scale = plan.parameters(s)[kInvTemperature], maximum = static_cast<float>(maxima[i]);
    for_values(row_of<T>(logits, i), [&](int64_t, float value) {
      const uint32_t key = key_of(value * scale);
      if (!round.has(key, state)) return;
      const unsigned long long weight = round.is_top_k ? 1 : mass_of(value, scale, maximum);
#ifdef __CUDACC__
      atomicAdd(&bins[key >> round.shift & (kBins - 1)], weight);
#else
      bins.add(key >> round.shift & (kBins - 1), weight);
#endif
    });
  }
  __syncthreads();
  histograms[i * kBins + threadIdx.x] = static_cast<int64_t>(bins[threadIdx.x]);
}

DFLASH_KERNEL threshold_narrow_kernel(const int64_t* histograms, PlanView plan, int round, int64_t* states) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plan.num_rows) return;
  const int64_t s = plan.row(i)[kRowSequence];
  narrow_threshold(round, plan.sequence(s), plan.parameters(s), histograms + i * kBins, states + i * kStateColumns);
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

}  // namespace

// A launch of no blocks is an error, so empty steps launch nothing.
#define DFLASH_LAUNCH_ROWS(kernel, logits, ...)                                                               \
  do {                                                                                                        \
    if ((logits).num_rows == 0) break;                                                                        \
    if ((logits).kind == Kind::kFloat32) DFLASH_LAUNCH(kernel<float>, (logits).num_rows, __VA_ARGS__);        \
    if ((logits).kind == Kind::kBfloat16) DFLASH_LAUNCH(kernel<Bfloat16>, (logits).num_rows, __VA_ARGS__);    \
    if ((logits).kind == Kind::kFloat16) DFLASH_LAUNCH(kernel<Float16>, (logits).num_rows, __VA_ARGS__);      \
  } while (false)

void CudaBackend::prepare(const LogitsView& logits, const PlanView& plan, double* stats) {
  DFLASH_LAUNCH_ROWS(prepare_kernel, logits, logits, plan, stats);
}

void CudaBackend::threshold_start(const double* maxima, const PlanView& plan, int64_t* states) {
  if (plan.num_rows) DFLASH_LAUNCH(threshold_start_kernel, blocks_for(plan.num_rows), maxima, plan, states);
}

void CudaBackend::threshold_histogram(const LogitsView& logits, const PlanView& plan, const double* maxima,
                                      const int64_t* states, int round, int64_t* histograms) {
  DFLASH_LAUNCH_ROWS(threshold_histogram_kernel, logits, logits, plan, maxima, states, round, histograms);
}

void CudaBackend::threshold_narrow(const int64_t* histograms, const PlanView& plan, int round, int64_t* states) {
  if (plan.num_rows) DFLASH_LAUNCH(threshold_narrow_kernel, blocks_for(plan.num_rows), histograms, plan, round, states);
}

void CudaBackend::greedy(const LogitsView& logits, const PlanView& plan, bool adjusts, double* partials) {
  DFLASH_LAUNCH_ROWS(greedy_kernel, logits, logits, plan, adjusts, partials);
}

void CudaBackend::coupled(const LogitsView& logits, const PlanView& plan, const int64_t* states, bool adjusts,
                          double* partials) {
  DFLASH_LAUNCH_ROWS(coupled_kernel, logits, logits, plan, states, adjusts, partials);
}

void CudaBackend::rejection(const LogitsView& logits, const PlanView& plan, const double* maxima, const int64_t* states,
                            const DraftView& drafts, double* partials) {
  DFLASH_LAUNCH_ROWS(rejection_kernel, logits, logits, plan, maxima, states, drafts, partials);
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
  DFLASH_LAUNCH_ROWS(logprobs_kernel, logits, logits, chosen, num_top, out);
}

void CudaBackend::noise(const int64_t* seeds, const int64_t* positions, const int64_t* ids, int64_t count,
                        int64_t width, int purpose, double* out) {
  const int64_t blocks = blocks_for(count * width);
  if (blocks > 0) DFLASH_LAUNCH(noise_kernel, blocks, seeds, positions, ids, count, width, purpose, out);
}

}  // namespace dflash_ray
