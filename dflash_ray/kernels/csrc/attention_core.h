// What attention over pages knows of a step, on any device that reads it from there.
#pragma once

#include "scalars.h"

namespace dflash_ray {

constexpr int kSplit = 256;    // positions of a context that are summed apart
constexpr int kTileRows = 16;  // of an entry, that read keys and values together
constexpr int kMostHeadSize = 256;

// Columns of a plan's tables; the order is that of kernels/attention.py. A row's splits are summed into as many parts,
// from its first part on; a row of no part attends to nothing. An entry of one part sums all splits into it.
enum RowAttention { kRowPlace, kRowTotal, kRowPartAt, kRowParts, kRowAttentionColumns };
enum TileAttention { kTileEntryRow, kTileContext, kTilePageAt, kTileBefore, kTileNumRows, kTileParts, kTileIsTree,
                     kTileColumns };

// Keys and values in pages, and which of them the rows of a step see. Everything is on the device.
struct AttentionView {
  const void* query;       // [T, heads, size], query_stride values a row
  const void* keys;        // [cache rows, kv_heads, size]
  const void* values;      // the same
  const int64_t* slots;    // [T] cache rows of the step's own rows
  const int64_t* rows;     // [T, kRowAttentionColumns]
  const int64_t* tiles;    // [N, kTileColumns]; those of no rows are empty
  const int64_t* pages;    // page tables of all entries in a row
  const int64_t* paths;    // [T, depth] own rows on the way to a row, from the entry's first on; null for chains
  int64_t query_stride, num_rows, num_tiles, depth, page_size, num_splits, num_parts;
  int heads, kv_heads, size, window;
  bool is_causal;
  float scale, softcap;
  Kind kind;

  // Positions from begin on, below end.
  struct Span {
    int begin = 0, end = 0;
  };

  // What a row sees.
  DFLASH_FN Span seen(int64_t row) const {
    const int64_t* mine = rows + row * kRowAttentionColumns;
    const int position = static_cast<int>(mine[kRowPlace]), total = static_cast<int>(mine[kRowTotal]);
    Span span;
    if (mine[kRowParts] == 0) return span;
    if (window > 0 && position - window + 1 > 0) span.begin = position - window + 1;
    span.end = is_causal ? position + 1 : window > 0 && position + window < total ? position + window : total;
    return span;
  }

  DFLASH_FN int64_t first_part(int64_t row, int64_t head) const {
    const int64_t* mine = rows + row * kRowAttentionColumns;
    return mine[kRowPartAt] * heads + head * mine[kRowParts];
  }
  DFLASH_FN int64_t parts_of(int64_t row) const { return rows[row * kRowAttentionColumns + kRowParts]; }
};

}  // namespace dflash_ray
