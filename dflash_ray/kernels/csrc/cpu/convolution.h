// The convolutions along a draft block that DFlash 2 has before and after each sublayer (models/dflash2.py), float32.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dflash_ray {

enum class Side : int64_t { kBefore, kAfter };

// What stands around one sublayer. A tap's coefficient is its base, one a channel, plus a part that depends on the slot, one
// a group of channels. Nothing comes from before a row's block.
struct Convolution {
  int64_t block, taps, group, width;
  const float* base;           // [sides, taps, width]
  const float* coefficients;  // [T, sides, taps, width / group]

  // out [width]: row `row` of x, whose rows begin `stride` floats after each other, convolved.
  void run(Side side, int64_t row, const float* x, int64_t stride, float* out) const {
    const int64_t groups = width / group, first = static_cast<int64_t>(side) * taps;
    std::fill_n(out, width, 0.0f);
    for (int64_t tap = 0; tap < std::min(taps, row % block + 1); ++tap) {
      const float* own = base + (first + tap) * width;
      const float* shared = coefficients + (2 * taps * row + first + tap) * groups;
      const float* from = x + (row - tap) * stride;
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] += (own[i] + shared[g]) * from[i];
      }
    }
  }
};

}  // namespace dflash_ray
