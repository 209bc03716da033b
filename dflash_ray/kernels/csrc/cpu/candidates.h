// A drafter's candidates on CPU: of one row of logits, and of one slot of a block.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "../draft_core.h"
#include "../verify_core.cuh"

namespace dflash_ray {

constexpr int64_t kLogitsAtOnce = 64;  // logits that are looked at together

// The `count` first tokens in the order of `order_of`, ascending.
inline void top_of_row(const float* row, int64_t width, int64_t count, std::vector<uint64_t>& best,
                       int64_t* out) {
  best.clear();
  for (int64_t i = 0; i < count; ++i) best.push_back(order_of(row, i));
  std::sort(best.begin(), best.end(), std::greater<>());
  float least = value_of_key(static_cast<uint32_t>(best.back() >> 32));
  // A later token of the least one's logit is behind it, so only higher ones matter.
  for (int64_t begin = count; begin < width; begin += kLogitsAtOnce) {
    const int64_t end = std::min(begin + kLogitsAtOnce, width);
    int is_any_above = 0;
    for (int64_t i = begin; i < end; ++i) is_any_above |= row[i] > least;
    if (!is_any_above) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (!(row[i] > least)) continue;
      const uint64_t order = order_of(row, i);
      best.pop_back();
      best.insert(std::upper_bound(best.begin(), best.end(), order, std::greater<>()), order);
      least = value_of_key(static_cast<uint32_t>(best.back() >> 32));
    }
  }
  for (int64_t i = 0; i < count; ++i) out[i] = 0xFFFFFFFFu - static_cast<uint32_t>(best[i]);
  std::sort(out, out + count);
}

// Chooses a slot's candidate after candidate `previous` of the slot before, and puts all of them where they belong.
inline int64_t walk_slot(const WalkView& view, int64_t block, int64_t slot, int64_t previous, int64_t* ordered,
                         float* log_probs) {
  Best best;
  for (int64_t i = 0; i < view.candidates; ++i) {
    best.take(view.score(block, slot, previous, i) + view.noise(block, slot, i), i);
  }
  for (int64_t i = 0; i < view.candidates; ++i) {
    view.place(block, slot, previous, best.token, i, ordered, log_probs);
  }
  return best.token;
}

}  // namespace dflash_ray
