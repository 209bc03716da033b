// What the kernels use of the machine: launches, shared memory, warps, block reductions. Under g++ the same words mean
// the emulation of emulation.h.
#pragma once

#include "../verify_core.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define DFLASH_DEVICE __device__ __forceinline__
#define DFLASH_KERNEL __global__ void __launch_bounds__(kThreads)
// So many blocks are to fit on a multiprocessor at least, which bounds the registers of a thread.
#define DFLASH_KERNEL_FITTING(blocks) __global__ void __launch_bounds__(kThreads, blocks)
#define DFLASH_SHARED(type, name, size) __shared__ alignas(16) type name[size]
#define DFLASH_SHARED_ADD(array, index, value) atomicAdd(&(array)[index], value)
#define DFLASH_LAUNCH_WITH(threads, kernel, blocks, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(current_stream())>>>(__VA_ARGS__)
#else
#include "emulation.h"
#define DFLASH_DEVICE inline
#define DFLASH_KERNEL void
#define DFLASH_KERNEL_FITTING(blocks) void
#define DFLASH_SHARED(type, name, size)  \
  static const char name##_key = 0;      \
  auto& name = simt::shared<type, size>(&name##_key, #name)
#define DFLASH_SHARED_ADD(array, index, value) (array).add(index, value)
#define DFLASH_LAUNCH_WITH(threads, kernel, blocks, ...) simt::launch(blocks, threads, [&] { kernel(__VA_ARGS__); })
#endif
#define DFLASH_LAUNCH(kernel, blocks, ...) DFLASH_LAUNCH_WITH(kThreads, kernel, blocks, __VA_ARGS__)

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

DFLASH_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
DFLASH_DEVICE int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

DFLASH_DEVICE unsigned ballot(bool vote) { return __ballot_sync(kFullWarp, vote); }

template <class T>
DFLASH_DEVICE T from_lane(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}

DFLASH_DEVICE unsigned warp_sum(unsigned value) { return __reduce_add_sync(kFullWarp, value); }

// Reduces one value a lane to the warp's; only its first lane has the result.
template <class T, class Merge>
DFLASH_DEVICE T warp_reduce(T value, const Merge& merge) {
  for (int delta = kWarp / 2; delta > 0; delta /= 2) value = merge(value, shuffle_down(value, delta));
  return value;
}

// Reduces one value a thread to the block's; only thread 0 has the result. `scratch` has kWarps places. All threads
// take part; the scratch may be used again after the next __syncthreads.
template <class T, class Scratch, class Merge>
DFLASH_DEVICE T block_reduce(T value, Scratch& scratch, const Merge& merge) {
  value = warp_reduce(value, merge);
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

// Whether this block is the last of `blocks` to come here; the same for all of its threads. What the others wrote before
// is then visible to whoever reads it past its first-level cache (`fresh`). `counter` is 0 before the first.
DFLASH_DEVICE bool is_last_of(int64_t blocks, unsigned* counter) {
  DFLASH_SHARED(int, is_last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(counter, 1u) + 1 == static_cast<unsigned>(blocks);
  __syncthreads();
  __threadfence();
  return is_last[0] != 0;
}

// A value that another block of the same launch may have written.
template <class T>
DFLASH_DEVICE T fresh(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

}  // namespace dflash_ray
