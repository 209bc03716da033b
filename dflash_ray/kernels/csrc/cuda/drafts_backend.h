// The CUDA backend of the operators that choose a drafter's candidates; the launchers are in drafts.cu.
#pragma once

#include "../draft_core.h"

namespace dflash_ray {

struct DraftCudaBackend {
  static void top_candidates(const TopView& view, int64_t* out);
  static void walk(const WalkView& view, int64_t* ordered, float* log_probs);
};

}  // namespace dflash_ray
