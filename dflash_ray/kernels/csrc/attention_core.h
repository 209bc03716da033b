// What attention over pages knows of a step, on any device that reads it from there.
#pragma once

#include "scalars.h"

namespace dflash_ray {

constexpr int kSplit = 256;         // positions of a context that are summed apart
constexpr int kMostHeadSize = 256;

// Columns of a plan, which has a line for each row that attends; the order is that of kernels/attention.py.
enum AttentionColumn { kAttentionRow, kAttentionContext, kAttentionPosition, kAttentionTotal, kAttentionFirstRow,
                       kAttentionPageAt, kAttentionColumns };

// Keys and values in pages, and which of them the rows of a step see. Everything is on the device.
struct AttentionView {
  const void* query;       // [T, heads, size], query_stride values a row
  const void* keys;        // [cache rows, kv_heads, size]
  const void* values;      // the same
  const int64_t* slots;    // [T] cache rows of the step's own rows
  const int64_t* plan;     // [N, kAttentionColumns]
  const int64_t* pages;    // page tables of all entries in a row
  const int64_t* paths;    // [N, depth] own rows on the way to a row, from the entry's first on; null for chains
  int64_t query_stride, num_rows, num_lines, depth, page_size, num_splits;
  int heads, kv_heads, size, window;
  bool is_causal;
  float scale, softcap;
  Kind kind;

  DFLASH_FN int64_t row(int64_t line) const { return plan[line * kAttentionColumns + kAttentionRow]; }

  // Positions that a line's row sees: from begin on, below end.
  DFLASH_FN int64_t begin(int64_t line) const {
    const int64_t first = plan[line * kAttentionColumns + kAttentionPosition] - window + 1;
    return window > 0 && first > 0 ? first : 0;
  }
  DFLASH_FN int64_t end(int64_t line) const {
    const int64_t* mine = plan + line * kAttentionColumns;
    if (is_causal) return mine[kAttentionPosition] + 1;
    const int64_t last = mine[kAttentionPosition] + window;
    return window > 0 && last < mine[kAttentionTotal] ? last : mine[kAttentionTotal];
  }
  // The cache row of what it sees at a position.
  DFLASH_FN int64_t cache_row(int64_t line, int64_t position) const {
    const int64_t* mine = plan + line * kAttentionColumns;
    const int64_t own = position - mine[kAttentionContext];
    if (own < 0) return pages[mine[kAttentionPageAt] + position / page_size] * page_size + position % page_size;
    return slots[mine[kAttentionFirstRow] + (paths ? paths[line * depth + own] : own)];
  }
};

}  // namespace dflash_ray
