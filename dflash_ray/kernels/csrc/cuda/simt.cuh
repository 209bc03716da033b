// What the kernels use of the machine: launches, shared memory, warps, block reductions. Under g++ the same words mean
// the emulation of emulation.h.
#pragma once

#include "../verify_core.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define DFLASH_DEVICE __device__ __forceinline__
#define DFLASH_KERNEL __global__ void __launch_bounds__(kThreads)
#define DFLASH_SHARED(type, name, size) __shared__ type name[size]
#define DFLASH_LAUNCH(kernel, blocks, ...) \
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(current_stream())>>>(__VA_ARGS__)
#else
#include "emulation.h"
#define DFLASH_DEVICE inline
#define DFLASH_KERNEL void
#define DFLASH_SHARED(type, name, size)  \
  static const char name##_key = 0;      \
  auto& name = simt::shared<type, size>(&name##_key, #name)
#define DFLASH_LAUNCH(kernel, blocks, ...) simt::launch(blocks, kThreads, [&] { kernel(__VA_ARGS__); })
#endif

namespace dflash_ray {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

template <class T>
DFLASH_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(kFullWarp, value, delta);
}

DFLASH_DEVICE Best shuffle_down(Best best, int delta) {
  const double score = __shfl_down_sync(kFullWarp, best.score, delta);
  const long long token = __shfl_down_sync(kFullWarp, static_cast<long long>(best.token), delta);
  Best other;
  other.score = score;
  other.token = token;
  return other;
}

// Reduces one value a thread to the block's; only thread 0 has the result. `scratch` has kWarps places. All threads
// take part; the scratch may be used again after the next __syncthreads.
template <class T, class Scratch, class Merge>
DFLASH_DEVICE T block_reduce(T value, Scratch& scratch, const Merge& merge) {
  for (int delta = kWarp / 2; delta > 0; delta /= 2) value = merge(value, shuffle_down(value, delta));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) value = merge(value, T(scratch[warp]));
  }
  return value;
}

struct TakeBest {
  DFLASH_DEVICE Best operator()(Best a, const Best& b) const {
    a.take(b.score, b.token);
    return a;
  }
};
struct TakeMaximum {
  DFLASH_DEVICE float operator()(float a, float b) const { return a > b ? a : b; }
};
struct TakeSum {
  template <class T>
  DFLASH_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

}  // namespace dflash_ray
