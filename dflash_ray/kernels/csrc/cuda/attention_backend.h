// The CUDA backend of attention over pages; the launchers are in attention.cu.
#pragma once

#include "../attention_core.h"
#include "backend.h"

namespace dflash_ray {

struct CudaAttention {
  // Stores the rows' keys and values in their slots, then attends; `out` as the query.
  static void attend(const AttentionView& view, const void* key, const void* value, void* out);
};

}  // namespace dflash_ray
