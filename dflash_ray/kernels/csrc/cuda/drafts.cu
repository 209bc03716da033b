// A drafter's candidates on a GPU: the likeliest tokens of each row, and the walk along each block's slots. A launch each.

#include "backend.h"
#include "drafts_backend.h"
#include "simt.cuh"

namespace dflash_ray {
namespace {

constexpr int kDigit = 8;  // bits of an order that a round looks at
static_assert(kMostCandidates <= kThreads && 1 << kDigit == kThreads, "a thread has a candidate, and a bin");

// Sum of what the threads before this one have (`is_behind`: those behind it). All threads read the same place at a time.
template <class Counts>
DFLASH_DEVICE unsigned sum_beside(Counts& counts, bool is_behind) {
  unsigned sum = 0;
  for (unsigned other = 0; other < kThreads; ++other) {
    const unsigned count = counts[other];
    if (is_behind ? other > threadIdx.x : other < threadIdx.x) sum += count;
  }
  return sum;
}

// One block a row. The k-th largest of the threads' own best is at most the k-th largest of all, so few tokens are left
// for the search of that by its digits; orders are all different, so that exactly k are from there on.
DFLASH_KERNEL top_candidates_kernel(TopView view, int64_t* out) {
  DFLASH_SHARED(uint64_t, orders, kThreads);
  DFLASH_SHARED(uint64_t, floors, 1);
  DFLASH_SHARED(unsigned, counts, kThreads);
  DFLASH_SHARED(unsigned, found, 3);
  const float* row = view.logits + blockIdx.x * view.width;
  const unsigned wanted = static_cast<unsigned>(view.count);
  uint64_t own = 0;
  for (int64_t i = threadIdx.x; i < view.width; i += kThreads) {
    const uint64_t order = order_of(row, i);
    own = order > own ? order : own;
  }
  orders[threadIdx.x] = own;
  if (threadIdx.x == 0) floors[0] = 0;
  __syncthreads();
  unsigned above = 0;
  for (int other = 0; other < kThreads; ++other) above += uint64_t(orders[other]) > own;
  if (own && above == wanted - 1) floors[0] = own;
  __syncthreads();
  const uint64_t floor = floors[0];

  uint64_t prefix = 0;
  unsigned left = wanted;  // of those that begin with the prefix
  int shift = 64;
  for (bool is_exact = false; !is_exact;) {
    shift -= kDigit;
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < view.width; i += kThreads) {
      const uint64_t order = order_of(row, i);
      if (order < floor || (shift + kDigit < 64 && order >> (shift + kDigit) != prefix)) continue;
      DFLASH_SHARED_ADD(counts, order >> shift & (kThreads - 1), 1u);
    }
    __syncthreads();
    const unsigned higher = sum_beside(counts, true), here = counts[threadIdx.x];
    if (higher < left && left <= higher + here) {
      found[0] = threadIdx.x;
      found[1] = left - higher;
      found[2] = here;
    }
    __syncthreads();
    prefix = prefix << kDigit | static_cast<unsigned>(found[0]);
    left = found[1];
    is_exact = left == found[2];
  }

  const uint64_t found_from = prefix << shift, least = found_from > floor ? found_from : floor;
  unsigned chosen = 0;
  for (int64_t i = threadIdx.x; i < view.width; i += kThreads) chosen += order_of(row, i) >= least;
  counts[threadIdx.x] = chosen;
  __syncthreads();
  unsigned at = sum_beside(counts, false);
  for (int64_t i = threadIdx.x; i < view.width; i += kThreads) {
    if (order_of(row, i) >= least) orders[at++] = static_cast<uint64_t>(i);
  }
  __syncthreads();
  if (threadIdx.x < wanted) {
    const uint64_t token = orders[threadIdx.x];
    unsigned place = 0;
    for (unsigned other = 0; other < wanted; ++other) place += uint64_t(orders[other]) < token;
    out[blockIdx.x * view.count + place] = static_cast<int64_t>(token);
  }
}

// One block of threads a block of slots: choices one after the other, then all candidates to their places.
DFLASH_KERNEL walk_kernel(WalkView view, int64_t* ordered, float* log_probs) {
  DFLASH_SHARED(Best, bests, kWarps);
  DFLASH_SHARED(int, choices, kMostSlots + 1);
  const int64_t block = blockIdx.x;
  if (threadIdx.x == 0) choices[0] = 0;
  __syncthreads();
  for (int64_t slot = 0; slot < view.slots; ++slot) {
    const int previous = choices[slot];
    Best best;
    for (int64_t i = threadIdx.x; i < view.candidates; i += kThreads) {
      best.take(view.score(block, slot, previous, i) + view.noise(block, slot, i), i);
    }
    best = block_reduce(best, bests, TakeBest());
    if (threadIdx.x == 0) choices[slot + 1] = static_cast<int>(best.token);
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < view.slots * view.candidates; i += kThreads) {
    const int64_t slot = i / view.candidates;
    const int previous = choices[slot], chosen = choices[slot + 1];
    view.place(block, slot, previous, chosen, i % view.candidates, ordered, log_probs);
  }
}

}  // namespace

// A launch of no blocks is an error, so empty passes launch nothing.
void DraftCudaBackend::top_candidates(const TopView& view, int64_t* out) {
  if (view.num_rows) DFLASH_LAUNCH(top_candidates_kernel, view.num_rows, view, out);
}

void DraftCudaBackend::walk(const WalkView& view, int64_t* ordered, float* log_probs) {
  if (view.num_blocks && view.slots) DFLASH_LAUNCH(walk_kernel, view.num_blocks, view, ordered, log_probs);
}

}  // namespace dflash_ray
