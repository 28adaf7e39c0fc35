// What the passes of group_norm_silu gather over a tensor, and how it is merged: always in the same
// order, without atomics.
#pragma once

#include "cuda/group_norm_silu.cuh"

namespace palette {

// Mean and sum of squared deviations of V neighbours, each over `count` values.
template <int V>
struct Moments {
  float count, mean[V], m2[V];

  // Chan, Golub and LeVeque (1983). A constant's mean stays exact, which c / c in fast division
  // does not give.
  __device__ void merge(const Moments& other) {
    if (other.count == 0.0f) return;
    if (count == 0.0f) {
      *this = other;
      return;
    }
    const float total = count + other.count;
    const float part = __fdividef(other.count, total);
    const float weight = count * part;
    count = total;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float delta = other.mean[v] - mean[v];
      mean[v] += delta * part;
      m2[v] += other.m2[v] + delta * delta * weight;
    }
  }

  // From sums of (x - pivot) and (x - pivot)^2, with a pivot near the values.
  __device__ void set(int v, float pivot, float sum, float square) {
    const float offset = __fdividef(sum, count);
    const float spread = square - sum * offset;
    mean[v] = pivot + offset;
    m2[v] = spread < 0.0f ? 0.0f : spread;  // NaN stays NaN
  }
};

// Two sums for each of V neighbours.
template <int V>
struct Sums {
  float p[V], q[V];
  float odd;  // an odd number of words keeps accesses to shared memory free of bank conflicts

  __device__ void merge(const Sums& other) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      p[v] += other.p[v];
      q[v] += other.q[v];
    }
  }
};

__device__ __forceinline__ Moments<1> from_lane(const Moments<1>& own, int delta) {
  return {__shfl_down_sync(0xffffffffu, own.count, delta),
          {__shfl_down_sync(0xffffffffu, own.mean[0], delta)},
          {__shfl_down_sync(0xffffffffu, own.m2[0], delta)}};
}

__device__ __forceinline__ Sums<1> from_lane(const Sums<1>& own, int delta) {
  return {{__shfl_down_sync(0xffffffffu, own.p[0], delta)},
          {__shfl_down_sync(0xffffffffu, own.q[0], delta)},
          0.0f};
}

// The whole warp's, in lane 0. Every lane takes part.
template <typename Partial>
__device__ __forceinline__ void merge_warp(Partial& own) {
#pragma unroll
  for (int delta = kWarp / 2; delta > 0; delta /= 2) {
    const Partial other = from_lane(own, delta);
    if (threadIdx.x % kWarp + delta < kWarp) own.merge(other);
  }
}

// Of each column, over the lanes of a block (rows), in lane 0. Every thread takes part.
template <typename Partial>
__device__ __forceinline__ void merge_lanes(Partial& own, const Plan& plan, int lane) {
  __shared__ Partial shared[kThreads];
  shared[threadIdx.x] = own;
  for (int busy = plan.lanes; busy > 1;) {
    const int half = (busy + 1) / 2;
    __syncthreads();
    if (lane + half < busy) {
      own.merge(shared[threadIdx.x + half * plan.columns]);
      shared[threadIdx.x] = own;
    }
    busy = half;
  }
}

}  // namespace palette
