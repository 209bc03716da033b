// How a drafter's candidates are chosen, the same on every device. Terms are those of kernels/draft_ops.py.
//
// Scores are compared in float64, by operations that are rounded alike everywhere; exponentials and logarithms are those of
// verify_core.cuh.
#pragma once

#include "verify_core.cuh"

namespace dflash_ray {

constexpr int64_t kMostCandidates = 256, kMostSlots = 256;

// Rows [num_rows, width] of float32 logits, and how many are wanted of each.
struct TopView {
  const float* logits;
  int64_t num_rows, width, count;
};

// Orders a row's tokens: above are higher logits, and of equal ones lower tokens. NaN is lowest. Never 0.
DFLASH_FN uint64_t order_of(const float* row, int64_t token) {
  const float value = row[token];
  const uint32_t key = key_of(value != value ? kMinusInf : value);
  return static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

// Blocks of slots with candidates, and scores [candidates, candidates] of each slot.
struct WalkView {
  const float* scores;
  const int64_t* ids;
  const double* inverse_temperatures;  // 0 is greedy
  const int64_t *seeds, *firsts;
  int64_t num_blocks, slots, candidates;

  // Of candidate i after candidate `previous` of the slot before, as the draw sees it.
  DFLASH_FN double score(int64_t block, int64_t slot, int64_t previous, int64_t i) const {
    const double factor = inverse_temperatures[block];
    const float score = scores[((block * slots + slot) * candidates + previous) * candidates + i];
    if (score != score) return static_cast<double>(kMinusInf);
    return static_cast<double>(score) * (factor == 0.0 ? 1.0 : factor);
  }

  // The noise that the target will draw the candidate with.
  DFLASH_FN double noise(int64_t block, int64_t slot, int64_t i) const {
    if (inverse_temperatures[block] == 0.0) return 0.0;
    return gumbel(seeds[block], firsts[block] + slot, ids[(block * slots + slot) * candidates + i], kTargetDraw);
  }

  // Puts candidate i where it belongs: the chosen one first, behind it the others by falling score.
  DFLASH_FN void place(int64_t block, int64_t slot, int64_t previous, int64_t chosen, int64_t i, int64_t* ordered,
                       float* log_probs) const {
    const double own = score(block, slot, previous, i), best = score(block, slot, previous, chosen);
    double maximum = static_cast<double>(kMinusInf), sum = 0;
    int64_t rank = 0;
    for (int64_t j = 0; j < candidates; ++j) {
      const double other = score(block, slot, previous, j);
      maximum = other > maximum ? other : maximum;
      rank += other > own || (other == own && j < i);
    }
    for (int64_t j = 0; j < candidates; ++j) {
      sum += exp_of_nonpositive(static_cast<float>(score(block, slot, previous, j) - maximum));
    }
    if (i == chosen) {
      rank = 0;
    } else if (!(best > own || (best == own && chosen < i))) {
      ++rank;
    }
    const int64_t line = (block * slots + slot) * candidates;
    ordered[line + rank] = ids[line + i];
    log_probs[line + rank] = static_cast<float>(own - maximum) - log_of(static_cast<float>(sum));
  }
};

}  // namespace dflash_ray
