// Products of rows with a panel of a weight, float32.
//
// Every output is one chain of fused multiply-adds over the inputs in their order, whatever the number of rows and
// however the weight is stored: a row's result does not depend on what else is in the batch.
#pragma once

#include <algorithm>

#include "weights.h"

namespace dflash_ray {

// Two registers a row for its sums; the rest, of 32 or 16, hold a panel's slice and an input.
constexpr int64_t kTile = kLanes == 16 ? 8 : 6;
constexpr int64_t kSliceDepth = 64;      // inputs of a panel that are unpacked at a time: they stay in the first cache
constexpr int64_t kRowsAPiece = 96;      // whose sums and inputs do so too
constexpr int64_t kWorkAPiece = 1 << 16;  // multiply-adds; some microseconds

// Few rows are so few chains that each waits for itself: they go over several panels at a time.
constexpr int64_t panels_at_once(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// Adds `depth` inputs' products to sums [kPanels, kRows, kPanel]; slices [kPanels, kSliceDepth, kPanel]. Not inlined:
// within larger loops GCC spills the sums.
template <int kRows, int kPanels>
[[gnu::noinline]] void multiply(const float* x, int64_t stride, const float* const* slices, int64_t depth,
                                float* sums) {
  Lanes left[kPanels][kRows], right[kPanels][kRows];
  const float* slice[kPanels];
#pragma GCC unroll 8
  for (int panel = 0; panel < kPanels; ++panel) {
    slice[panel] = slices[panel];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      left[panel][row] = load(sums + (panel * kRows + row) * kPanel);
      right[panel][row] = load(sums + (panel * kRows + row) * kPanel + kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int panel = 0; panel < kPanels; ++panel) {
      const Lanes first = load(slice[panel] + k * kPanel), second = load(slice[panel] + k * kPanel + kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        left[panel][row] += x[row * stride + k] * first;
        right[panel][row] += x[row * stride + k] * second;
      }
    }
  }
#pragma GCC unroll 8
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      store(sums + (panel * kRows + row) * kPanel, left[panel][row]);
      store(sums + (panel * kRows + row) * kPanel + kLanes, right[panel][row]);
    }
  }
}

// The same for any number of rows up to kTile and of panels up to panels_at_once(rows).
inline void multiply(int64_t rows, int64_t panels, const float* x, int64_t stride, const float* const* slices,
                     int64_t depth, float* sums) {
  switch (rows) {
    case 1:
      if (panels == 4) return multiply<1, 4>(x, stride, slices, depth, sums);
      for (int64_t i = 0; i < panels; ++i) multiply<1, 1>(x, stride, slices + i, depth, sums + i * kPanel);
      return;
    case 2:
      if (panels == 2) return multiply<2, 2>(x, stride, slices, depth, sums);
      return multiply<2, 1>(x, stride, slices, depth, sums);
    case 3: return multiply<3, 1>(x, stride, slices, depth, sums);
    case 4: return multiply<4, 1>(x, stride, slices, depth, sums);
    case 5: return multiply<5, 1>(x, stride, slices, depth, sums);
    case 6: return multiply<6, 1>(x, stride, slices, depth, sums);
    case 7: return multiply<7, 1>(x, stride, slices, depth, sums);
    default: return multiply<8, 1>(x, stride, slices, depth, sums);
  }
}

// sums [panels, rows, kPanel] of at most kRowsAPiece rows of x with panels_at_once(rows) panels or fewer.
inline void multiply_panels(const Weight& weight, int64_t panel, int64_t panels, const float* x, int64_t stride,
                            int64_t rows, float* sums) {
  alignas(64) float buffers[panels_at_once(1)][kSliceDepth * kPanel];
  const float* slices[panels_at_once(1)];
  std::fill_n(sums, panels * rows * kPanel, 0.0f);
  for (int64_t k = 0; k < weight.in(); k += kSliceDepth) {
    const int64_t depth = std::min(kSliceDepth, weight.in() - k);
    for (int64_t i = 0; i < panels; ++i) slices[i] = weight.slice(panel + i, k, depth, buffers[i]);
    for (int64_t row = 0; row < rows; row += kTile) {
      multiply(std::min(kTile, rows - row), panels, x + row * stride + k, stride, slices, depth, sums + row * kPanel);
    }
  }
}

// How a product is cut into pieces: blocks of rows, and in each of them groups of panels.
struct Cut {
  int64_t rows, row_blocks, panels, panels_a_piece, panel_groups;

  Cut(int64_t rows, const Weight& weight) : rows(rows), panels(weight.num_panels()) {
    row_blocks = (rows + kRowsAPiece - 1) / kRowsAPiece;
    const int64_t work = std::max<int64_t>(1, std::min(rows, kRowsAPiece) * weight.in() * kPanel);
    panels_a_piece = std::clamp<int64_t>(kWorkAPiece / work, 1, std::max<int64_t>(1, panels / 8));
    panels_a_piece += (panels_at_once(rows) - panels_a_piece % panels_at_once(rows)) % panels_at_once(rows);
    panel_groups = (panels + panels_a_piece - 1) / panels_a_piece;
  }

  int64_t num_pieces() const { return row_blocks * panel_groups; }

  // Calls body(panel, panels, first row, rows) for what belongs to a piece, panels_at_once at a time.
  template <class Body>
  void each(int64_t piece, const Body& body) const {
    const int64_t first = piece / panel_groups * kRowsAPiece, group = piece % panel_groups;
    const int64_t count = std::min(kRowsAPiece, rows - first);
    const int64_t end = std::min(panels, (group + 1) * panels_a_piece);
    for (int64_t panel = group * panels_a_piece; panel < end; panel += panels_at_once(count)) {
      body(panel, std::min(panels_at_once(count), end - panel), first, count);
    }
  }

  // Multiplies rows [rows, in] of x by what belongs to a piece: put(row, column, count, sums) for each row and panel.
  template <class Put>
  void multiply(int64_t piece, const Weight& weight, const float* x, const Put& put) const {
    alignas(64) float sums[kRowsAPiece * kPanel];
    each(piece, [&](int64_t panel, int64_t together, int64_t first, int64_t count) {
      multiply_panels(weight, panel, together, x + first * weight.in(), weight.in(), count, sums);
      for (int64_t i = 0; i < together; ++i) {
        const int64_t column = (panel + i) * kPanel, width = std::min(kPanel, weight.out() - column);
        for (int64_t row = 0; row < count; ++row) put(first + row, column, width, sums + (i * count + row) * kPanel);
      }
    });
  }
};

}  // namespace dflash_ray
