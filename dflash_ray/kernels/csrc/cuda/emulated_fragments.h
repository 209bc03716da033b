// Matrix products of a warp and copies into shared memory, under emulation. Fragments lie in the lanes as the PTX ISA has
// them ("Matrix Fragments for mma.m16n8k16", "ldmatrix").
//
// A tensor core's order of additions is not documented. Here the sixteen products of an output are summed in pairs,
// then in pairs of these, and so on, and what was there before is added last: like a tensor core, and unlike a loop,
// it lets a result depend on which of the sixteen places a product has.
#pragma once

#include "../scalars.h"
#include "emulation.h"

namespace dflash_ray {

template <class T>
inline float half_of(uint64_t word, int at) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * at))});
}

// c [16, 8] += a [16, 16] times b [16, 8].
template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto both = [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; };
  const auto* lanes = simt::block().exchange({{both(a[0], a[1]), both(a[2], a[3]), both(b0, b1)}});
  const int lane = static_cast<int>(simt::block().lane());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    float sums[16];
    for (int k = 0; k < 16; ++k) {
      const int in_lane = k % 8 / 2, half = k % 2 + 2 * (row / 8);
      const float left = half_of<T>(lanes[row % 8 * 4 + in_lane].word[k / 8], half);
      const float right = half_of<T>(lanes[column * 4 + in_lane].word[2], k % 2 + 2 * (k / 8));
      sums[k] = left * right;
    }
    for (int distance = 1; distance < 16; distance *= 2) {
      for (int k = 0; k < 16; k += 2 * distance) sums[k] += sums[k + distance];
    }
    c[i] += sums[0];
  }
}

// Four matrices of 8 x 8, of which lane l names the place of row l % 8 of matrix l / 8.
template <bool kTransposed, class Array>
inline void load_matrices(Array& array, int at, uint32_t (&to)[4]) {
  const auto* places = simt::block().exchange({{static_cast<uint64_t>(at)}});
  const int lane = static_cast<int>(simt::block().lane()), group = lane / 4, pair = lane % 4 * 2;
  const auto value = [&](int matrix, int row, int column) -> uint32_t {
    const typename Array::Value found = array[places[matrix * 8 + row].word[0] + column];
    return found.bits;
  };
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t low = kTransposed ? value(matrix, pair, group) : value(matrix, group, pair);
    const uint32_t high = kTransposed ? value(matrix, pair + 1, group) : value(matrix, group, pair + 1);
    to[matrix] = high << 16 | low;
  }
}

template <class T>
inline uint32_t pack(float low, float high) {
  T halves[2];
  from_float(low, halves[0]);
  from_float(high, halves[1]);
  return static_cast<uint32_t>(halves[1].bits) << 16 | halves[0].bits;
}

// Sixteen bytes from 16-byte aligned memory to a 16-byte aligned place; there after the next wait and barrier.
template <class T, class Array>
inline void copy_async(Array& array, int at, const T* from) {
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) array[at + i] = from[i];
}
inline void wait_for_copies() {}

}  // namespace dflash_ray
