// Products of rows with a panel of a weight, float32.
//
// Every output is one chain of fused multiply-adds over the inputs in their order, whatever the number of rows and
// however the weight is stored: a row's result does not depend on what else is in the batch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "weights.h"

namespace dflash_ray {

// Two registers a row for its sums; the rest, of 32 or 16, hold a panel's slice and an input.
constexpr int64_t kTile = kLanes == 16 ? 8 : 6;
constexpr int64_t kSliceDepth = 64;      // inputs of a panel that are unpacked at a time: they stay in the first cache
constexpr int64_t kRowsOfPairs = kLanes == 16 ? 2 : 1;  // up to which panels are multiplied in pairs
constexpr int64_t kRowsAPiece = 96;      // whose sums and inputs do so too
constexpr int64_t kWorkAPiece = 1 << 16;  // multiply-adds; some microseconds

// Calls work(count) with `rows`, 1 .. kTile, as a constant.
template <class Work>
void with_rows(int64_t rows, const Work& work) {
  switch (rows) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    case 4: return work(std::integral_constant<int, 4>());
    case 5: return work(std::integral_constant<int, 5>());
    case 6: return work(std::integral_constant<int, 6>());
    case 7: return work(std::integral_constant<int, std::min<int>(kTile, 7)>());
    default: return work(std::integral_constant<int, kTile>());
  }
}

// Adds `depth` inputs' products to sums [kRows, kPanel]; slice [depth, kPanel]. Not inlined: within larger loops GCC
// spills the sums.
template <int kRows>
[[gnu::noinline]] void multiply(const float* x, int64_t stride, const float* slice, int64_t depth, float* sums) {
  Lanes left[kRows], right[kRows];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    left[row] = load(sums + row * kPanel), right[row] = load(sums + row * kPanel + kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes first = in_register(load(slice + k * kPanel)), second = in_register(load(slice + k * kPanel + kLanes));
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      left[row] += x[row * stride + k] * first;
      right[row] += x[row * stride + k] * second;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    store(sums + row * kPanel, left[row]), store(sums + row * kPanel + kLanes, right[row]);
  }
}

// sums [kPanels, kRows, kPanel] of whole panels, which are unpacked in registers.
template <Form kForm, int kPanels, int kRows>
[[gnu::noinline]] void multiply_unpacking(const Weight& weight, int64_t panel, const float* x, int64_t stride,
                                          float* sums) {
  constexpr bool kHasRegisters = kLanes == 16 || kRows < kTile;
  Lanes totals[kRows][2 * kPanels]{};
  for (int64_t begin = 0; begin < weight.in(); begin += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, weight.in() - begin);
    weight.each<kForm, kPanels, kHasRegisters>(panel, begin, depth, [&](int64_t k, const Lanes (&halves)[2 * kPanels]) {
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int half = 0; half < 2 * kPanels; ++half) {
          totals[row][half] += x[row * stride + begin + k] * halves[half];
        }
      }
    });
  }
#pragma GCC unroll 4
  for (int half = 0; half < 2 * kPanels; ++half) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      store(sums + (half / 2 * kRows + row) * kPanel + half % 2 * kLanes, totals[row][half]);
    }
  }
}

// Panels that are multiplied at the same time. One panel of one or two rows is two or four chains, each waiting for its own
// last addition.
inline int64_t panels_at_once(int64_t rows) { return rows <= kRowsOfPairs ? 2 : 1; }

// sums [panels, rows, kPanel] of at most kRowsAPiece rows of x with 1 .. panels_at_once(rows) panels that follow each other.
inline void multiply_panels(const Weight& weight, int64_t panel, int64_t panels, const float* x, int64_t stride,
                            int64_t rows, float* sums) {
  if (rows <= kTile) {
    return weight.with_form([&](auto form) {
      with_rows(rows, [&](auto count) {
        if constexpr (count.value <= kRowsOfPairs) {
          if (panels == 2) return multiply_unpacking<form.value, 2, count.value>(weight, panel, x, stride, sums);
        }
        multiply_unpacking<form.value, 1, count.value>(weight, panel, x, stride, sums);
      });
    });
  }
  alignas(64) float buffer[kSliceDepth * kPanel];
  std::fill_n(sums, rows * kPanel, 0.0f);
  const int64_t tiles = (rows + kTile - 1) / kTile;
  for (int64_t k = 0; k < weight.in(); k += kSliceDepth) {
    const int64_t depth = std::min(kSliceDepth, weight.in() - k);
    const float* slice = weight.slice(panel, k, depth, buffer);
    // Tiles of nearly the same size: one of a row or two would take as long as one of four.
    for (int64_t tile = 0, row = 0, end; tile < tiles; ++tile, row = end) {
      end = (tile + 1) * rows / tiles;
      with_rows(end - row, [&](auto count) {
        multiply<count.value>(x + row * stride + k, stride, slice, depth, sums + row * kPanel);
      });
    }
  }
}

// Rows that a product reads, `stride` floats from one to the next.
struct InputRows {
  float* data = nullptr;
  int64_t stride = 0;

  // The stride of rows with as many columns: an odd number of cache lines. Rows of a power of two of them would meet in the
  // same few sets of the first cache.
  static int64_t stride_of(int64_t columns) { return (columns + 15) / 16 * 16 | 16; }

  float* at(int64_t row) const { return data + row * stride; }
};

// How a product is cut into pieces: blocks of rows, and in each of them groups of panels.
struct Cut {
  int64_t rows, row_blocks, panels, panels_a_piece, panel_groups;

  Cut(int64_t rows, const Weight& weight) : rows(rows), panels(weight.num_panels()) {
    row_blocks = (rows + kRowsAPiece - 1) / kRowsAPiece;
    const int64_t work = std::max<int64_t>(1, std::min(rows, kRowsAPiece) * weight.in() * kPanel);
    panels_a_piece = std::clamp<int64_t>(kWorkAPiece / work, 1, std::max<int64_t>(1, panels / 8));
    panels_a_piece += panels_a_piece % panels_at_once(rows);
    panel_groups = (panels + panels_a_piece - 1) / panels_a_piece;
  }

  int64_t num_pieces() const { return row_blocks * panel_groups; }

  // Calls body(panel, panels, first row, rows) for what belongs to a piece, with 1 .. panels_at_once(rows) panels.
  template <class Body>
  void each(int64_t piece, const Body& body) const {
    const int64_t first = piece / panel_groups * kRowsAPiece, group = piece % panel_groups, step = panels_at_once(rows);
    const int64_t end = std::min(panels, (group + 1) * panels_a_piece);
    for (int64_t panel = group * panels_a_piece; panel < end; panel += step) {
      body(panel, std::min(step, end - panel), first, std::min(kRowsAPiece, rows - first));
    }
  }

  // Multiplies the rows x by what belongs to a piece: put(row, column, count, sums) for each row and panel.
  template <class Put>
  void multiply(int64_t piece, const Weight& weight, const InputRows& x, const Put& put) const {
    alignas(64) float sums[kRowsAPiece * kPanel];
    each(piece, [&](int64_t panel, int64_t count, int64_t first, int64_t rows) {
      multiply_panels(weight, panel, count, x.at(first), x.stride, rows, sums);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t column = (panel + i) * kPanel, width = std::min(kPanel, weight.out() - column);
        for (int64_t row = 0; row < rows; ++row) put(first + row, column, width, sums + (i * rows + row) * kPanel);
      }
    });
  }
};

}  // namespace dflash_ray
