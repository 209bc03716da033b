// A warp's part of attention: 16 rows of a query head against a few keys, in tensor cores for 16-bit values, by
// multiply-adds for float32. Lane l holds of rows l / 4 and l / 4 + 8 every fourth pair of columns, as an accumulator
// of mma.m16n8k16 does; a row's four lanes are a quad.
#pragma once

#include "../attention_core.h"
#include "fragments.cuh"

namespace dflash_ray {
namespace {

DFLASH_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// exp(score - maximum), 0 for what is not seen.
DFLASH_DEVICE float weight_of(float score, float maximum) {
  return score == kMinusInf ? 0.0f : exp_of_nonpositive(score - maximum);
}

// Of both halves of a quad's lanes; the same, to the bit, in all of them.
DFLASH_DEVICE float quad_maximum(float value) {
  value = larger(value, from_lane(value, lane_of_thread() ^ 1));
  return larger(value, from_lane(value, lane_of_thread() ^ 2));
}
DFLASH_DEVICE float quad_sum(float value) {
  value += from_lane(value, lane_of_thread() ^ 1);
  return value + from_lane(value, lane_of_thread() ^ 2);
}

constexpr int kLoaded = 4;

// The next values of a head of which `left` are left; 0 behind its end. One load where they lie together.
template <class T>
DFLASH_DEVICE void load_some(const T* from, int left, float (&values)[kLoaded]) {
  struct alignas(kLoaded * sizeof(T)) Quad {
    T values[kLoaded];
  };
  if (left >= kLoaded && reinterpret_cast<uintptr_t>(from) % sizeof(Quad) == 0) {
    const Quad quad = *reinterpret_cast<const Quad*>(from);
    for (int j = 0; j < kLoaded; ++j) values[j] = to_float(quad.values[j]);
    return;
  }
  for (int j = 0; j < kLoaded; ++j) values[j] = j < left ? to_float(from[j]) : 0.0f;
}

// Keys that are scored together, and how their rows lie in shared memory: so that eight rows fall into different banks.
template <class T, int kSize>
struct Unit {
  static constexpr int kKeys = 64 / sizeof(T), kChunk = 16 / sizeof(T), kChunks = kSize / kChunk;
  static constexpr int kPitch = kSize + kChunk, kPlaces = kKeys * kPitch, kColumns = kKeys / 8;
  static_assert(kSplit % kKeys == 0 && kTileRows == 16);
};

// Sixteen queries of 16-bit values.
template <class T, int kSize>
class Queries {
  using U = Unit<T, kSize>;

 public:
  // Of this lane's two rows.
  DFLASH_DEVICE Queries(const T* upper, const T* lower, int size) {
    const int pair = lane_of_thread() % 4 * 2;
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* from = i % 2 ? lower : upper;
        const int at = k * 16 + i / 2 * 8 + pair;
        const uint32_t low = at < size ? from[at].bits : 0, high = at + 1 < size ? from[at + 1].bits : 0;
        values_[k][i] = high << 16 | low;
      }
    }
  }

  // Products with the unit's keys.
  template <class Array>
  DFLASH_DEVICE void score(Array& keys, float (&scores)[U::kColumns][4]) const {
    const int lane = lane_of_thread();
    const int at = (lane / 16 * 8 + lane % 8) * U::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
#pragma unroll
      for (int n = 0; n < U::kColumns; n += 2) {
        uint32_t found[4];
        load_matrices<false>(keys, at + n * 8 * U::kPitch + k * 16, found);
        multiply_add<T>(scores[n], values_[k], found[0], found[1]);
        multiply_add<T>(scores[n + 1], values_[k], found[2], found[3]);
      }
    }
  }

  // sums += weights times the unit's values.
  template <class Array>
  DFLASH_DEVICE static void add(const float (&weights)[U::kColumns][4], Array& values, float (&sums)[kSize / 8][4]) {
    const int lane = lane_of_thread();
    const int at = (lane / 8 % 2 * 8 + lane % 8) * U::kPitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < U::kKeys / 16; ++k) {
      const float(&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
      const uint32_t packed[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                                  pack<T>(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < kSize / 8; n += 2) {
        uint32_t found[4];
        load_matrices<true>(values, at + k * 16 * U::kPitch + n * 8, found);
        multiply_add<T>(sums[n], packed, found[0], found[1]);
        multiply_add<T>(sums[n + 1], packed, found[2], found[3]);
      }
    }
  }

 private:
  uint32_t values_[kSize / 16][4];
};

// Of float32: every output is one chain of multiply-adds.
template <int kSize>
class Queries<float, kSize> {
  using U = Unit<float, kSize>;

 public:
  DFLASH_DEVICE Queries(const float* upper, const float* lower, int size) : upper_(upper), lower_(lower), size_(size) {}

  template <class Array>
  DFLASH_DEVICE void score(Array& keys, float (&scores)[U::kColumns][4]) const {
    const int pair = lane_of_thread() % 4 * 2;
    for (int i = 0; i < size_; i += kLoaded) {
      float upper[kLoaded], lower[kLoaded];
      load_some(upper_ + i, size_ - i, upper);
      load_some(lower_ + i, size_ - i, lower);
#pragma unroll
      for (int n = 0; n < U::kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < kLoaded; ++j) {
          const int at = (n * 8 + pair) * U::kPitch + i + j;
          const float left = keys[at], right = keys[at + U::kPitch];
          scores[n][0] = fmaf(upper[j], left, scores[n][0]);
          scores[n][1] = fmaf(upper[j], right, scores[n][1]);
          scores[n][2] = fmaf(lower[j], left, scores[n][2]);
          scores[n][3] = fmaf(lower[j], right, scores[n][3]);
        }
      }
    }
  }

  template <class Array>
  DFLASH_DEVICE static void add(const float (&weights)[U::kColumns][4], Array& values, float (&sums)[kSize / 8][4]) {
    const int lane = lane_of_thread(), pair = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < U::kKeys; ++k) {
      const int from = lane - lane % 4 + k % 8 / 2;
      const float upper = from_lane(weights[k / 8][k % 2], from), lower = from_lane(weights[k / 8][2 + k % 2], from);
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        const float left = values[k * U::kPitch + n * 8 + pair], right = values[k * U::kPitch + n * 8 + pair + 1];
        sums[n][0] = fmaf(upper, left, sums[n][0]);
        sums[n][1] = fmaf(upper, right, sums[n][1]);
        sums[n][2] = fmaf(lower, left, sums[n][2]);
        sums[n][3] = fmaf(lower, right, sums[n][3]);
      }
    }
  }

 private:
  const float *upper_, *lower_;
  int size_;
};

// A row of a unit's keys or values to shared memory by the threads that share it; zeros where `from` is null.
template <class T, int kSize, class Array>
DFLASH_DEVICE void load_row(Array& to, const T* from, int size) {
  using U = Unit<T, kSize>;
  const int threads = static_cast<int>(blockDim.x) / U::kKeys, row = static_cast<int>(threadIdx.x) / threads;
  for (int chunk = static_cast<int>(threadIdx.x) % threads; chunk < U::kChunks; chunk += threads) {
    const int first = chunk * U::kChunk, at = row * U::kPitch + first, left = from ? size - first : 0;
    if (left >= U::kChunk && reinterpret_cast<uintptr_t>(from + first) % 16 == 0) {
      copy_async(to, at, from + first);
      continue;
    }
    for (int i = 0; i < U::kChunk; ++i) {
      T value{};
      if (i < left) value = from[first + i];
      to[at + i] = value;
    }
  }
}

}  // namespace
}  // namespace dflash_ray
