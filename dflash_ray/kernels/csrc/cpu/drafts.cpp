// A drafter's candidates on CPU: a row or a block a piece.

#include <algorithm>
#include <vector>

#include "../draft_ops.h"
#include "../operators.h"
#include "../verify_ops.h"
#include "candidates.h"
#include "team.h"

namespace dflash_ray {
namespace {

constexpr int64_t kWorthAThread = 65536;  // logits

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
        previous = walk_slot(view, block, slot, previous, ordered, log_probs);
      }
    }
  }
};

}  // namespace

void register_drafts_cpu(torch::Library& library) { DraftOps<DraftCpuBackend, NoGuard>::register_in(library); }

}  // namespace dflash_ray
