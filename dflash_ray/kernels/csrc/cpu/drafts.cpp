// A drafter's candidates on CPU: a row or a block a piece.

#include <algorithm>
#include <vector>

#include "../draft_ops.h"
#include "../operators.h"
#include "../verify_ops.h"
#include "team.h"

namespace dflash_ray {
namespace {

constexpr int64_t kStride = 64;          // logits that are looked at together
constexpr int64_t kWorthAThread = 65536;  // logits

// The `count` first tokens in the order of `order_of`, ascending.
void top_of_row(const float* row, int64_t width, int64_t count, std::vector<uint64_t>& best, int64_t* out) {
  best.clear();
  for (int64_t i = 0; i < count; ++i) best.push_back(order_of(row, i));
  std::sort(best.begin(), best.end(), std::greater<>());
  float least = value_of_key(static_cast<uint32_t>(best.back() >> 32));
  // A later token of the least one's logit is behind it, so only higher ones matter.
  for (int64_t begin = count; begin < width; begin += kStride) {
    const int64_t end = std::min(begin + kStride, width);
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

struct DraftCpuBackend {
  static void top_candidates(const TopView& view, int64_t* out) {
    const int64_t grain = std::max<int64_t>(1, kWorthAThread / view.width);
    in_ranges(view.num_rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> best;
      best.reserve(view.count);
      for (int64_t row = begin; row < end; ++row) {
        top_of_row(view.logits + row * view.width, view.width, view.count, best, out + row * view.count);
      }
    });
  }

  static void walk(const WalkView& view, int64_t* ordered, float* log_probs) {
    for (int64_t block = 0; block < view.num_blocks; ++block) {
      int64_t previous = 0;
      for (int64_t slot = 0; slot < view.slots; ++slot) {
        Best best;
        for (int64_t i = 0; i < view.candidates; ++i) {
          best.take(view.score(block, slot, previous, i) + view.noise(block, slot, i), i);
        }
        for (int64_t i = 0; i < view.candidates; ++i) {
          view.place(block, slot, previous, best.token, i, ordered, log_probs);
        }
        previous = best.token;
      }
    }
  }
};

}  // namespace

void register_drafts_cpu(torch::Library& library) { DraftOps<DraftCpuBackend, NoGuard>::register_in(library); }

}  // namespace dflash_ray
