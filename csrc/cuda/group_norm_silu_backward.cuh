// The kernels of palette::group_norm_silu_backward.
//
// With u = (x - mean) * rstd, z = u * gain + offset and dz = grad * silu'(z), the first pass
// gathers P = sum dz and Q = sum dz * (x - mean) per sample and channel; the fold turns them into
// the gradients of the parameters and the two means of a group
//     c1 = mean(gain * dz * u),  c2 = mean(gain * dz),
// and the second pass writes grad_x = rstd * (gain * dz - c2 - u * c1). z is computed again from x,
// so nothing but x, mean and rstd is kept between forward and backward.
#pragma once

#include "cuda/moments.cuh"

namespace palette {
namespace {

// Row kinds of the second table: grad_x = slope * dz - tilt * (x - mean) - level.
constexpr int kCorrections = 2;

__device__ __forceinline__ float silu_slope(float z) {
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(const float* __restrict__ mean, const float* __restrict__ rstd,
                        float* __restrict__ table, GroupNorm problem) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= problem.samples * problem.channels) return;
  const int64_t sample = i / problem.channels;
  const int64_t channel = i % problem.channels;
  const int64_t group = sample * problem.groups + channel / (problem.channels / problem.groups);
  write_coefficients(problem, table, sample, channel, mean[group], rstd[group]);
}

// partials [samples, slabs, 2, channels]: P and Q of each channel within each slab.
template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                const float* __restrict__ table, float* __restrict__ partials, Plan plan,
                bool silu) {
  const Walk walk = walk_of<V, kRows>(plan, blockIdx.x);
  Sums<V> own{};
  if (walk.visits > 0) {
    const Coefficients<kRows ? V : 1> at(table, plan, walk);
    int64_t offset = walk.offset;
#pragma unroll 2
    for (int i = 0; i < walk.visits; ++i, offset += walk.stride) {
      float values[V], slopes[V];
      load(x + offset, values);
      load(grad + offset, slopes);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int k = kRows ? v : 0;
        const float dz = silu ? slopes[v] * silu_slope(at.z(values[v], k)) : slopes[v];
        own.p[v] += dz;
        own.q[v] += dz * (values[v] - at.center[k]);
      }
    }
  }

  float* out = partials + (walk.sample * plan.slabs + walk.slab) * 2 * plan.channels + walk.channel;
  if (kRows) {
    merge_lanes(own, plan, walk.lane);
    if (walk.lane == 0 && walk.visits > 0) {
      store(out, own.p);
      store(out + plan.channels, own.q);
    }
  } else {
    Sums<1> one{};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      one.p[0] += own.p[v];
      one.q[0] += own.q[v];
    }
    merge_warp(one);
    if (walk.lane == 0 && walk.visits > 0) {
      out[0] = one.p[0];
      out[plan.channels] = one.q[0];
    }
  }
}

// One block per (sample, group), one warp per channel at a time: P and Q * rstd of the sample
// (totals [samples, 2, channels]), the gradients of scale and shift, and the corrections of grad_x.
__global__ void __launch_bounds__(kFoldThreads)
    fold_sums_kernel(const float* __restrict__ partials, const float* __restrict__ rstd,
                     float* __restrict__ totals, float* __restrict__ corrections, Plan plan,
                     GroupNorm problem, Parameter grad_scale, Parameter grad_shift) {
  constexpr int kWarps = kFoldThreads / kWarp;
  const int64_t sample = blockIdx.x / problem.groups;
  const int64_t members = problem.channels / problem.groups;
  const int64_t first = blockIdx.x % problem.groups * members;
  const float group_rstd = rstd[blockIdx.x];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;

  Sums<1> group{};  // of gain * P and gain * Q * rstd
  for (int64_t channel = first + warp; channel < first + members; channel += kWarps) {
    Sums<1> own{};
    for (int64_t slab = lane; slab < plan.slabs; slab += kWarp) {
      const float* in = partials + (sample * plan.slabs + slab) * 2 * problem.channels + channel;
      own.merge({{in[0]}, {in[problem.channels]}, 0.0f});
    }
    merge_warp(own);
    if (lane == 0) {
      const float p = own.p[0], q = own.q[0] * group_rstd;
      const float weight = problem.weight.read(0, channel, 1.0f);
      const float gain = weight * (1.0f + problem.scale.read(sample, channel, 0.0f));
      float* out = totals + sample * 2 * problem.channels + channel;
      out[0] = p;
      out[problem.channels] = q;
      grad_scale.write(sample, channel, weight * q + problem.bias.read(0, channel, 0.0f) * p);
      grad_shift.write(sample, channel, p);
      group.p[0] += gain * p;
      group.q[0] += gain * q;
    }
  }

  __shared__ Sums<1> warps[kWarps];
  if (lane == 0) warps[warp] = group;
  __syncthreads();
  group = warps[0];
  for (int other = 1; other < kWarps; ++other) group.merge(warps[other]);
  const float share = group_rstd / (static_cast<float>(members) * plan.spatial);
  for (int64_t channel = first + threadIdx.x; channel < first + members; channel += kFoldThreads) {
    float* out = corrections + sample * kCorrections * problem.channels + channel;
    out[0] = group.q[0] * share * group_rstd;
    out[problem.channels] = group.p[0] * share;
  }
}

// One thread per channel: the samples in their order.
__global__ void __launch_bounds__(kFoldThreads)
    parameter_gradients_kernel(const float* __restrict__ totals, GroupNorm problem,
                               Parameter grad_weight, Parameter grad_bias) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (channel >= problem.channels) return;
  float weight = 0.0f, bias = 0.0f;
  for (int64_t sample = 0; sample < problem.samples; ++sample) {
    const float gain = 1.0f + problem.scale.read(sample, channel, 0.0f);
    const float* in = totals + sample * 2 * problem.channels + channel;
    bias += gain * in[0];
    weight += gain * in[problem.channels];
  }
  grad_weight.write(0, channel, weight);
  grad_bias.write(0, channel, bias);
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ grad_x,
                    const float* __restrict__ table, const float* __restrict__ corrections,
                    Plan plan, bool silu) {
  const Walk walk = walk_of<V, kRows>(plan, gridDim.x - 1 - blockIdx.x);
  if (walk.visits == 0) return;
  constexpr int K = kRows ? V : 1;
  const Coefficients<K> at(table, plan, walk);
  float tilt[K], level[K];
  load(corrections + table_at(plan, walk, kCorrections, 0), tilt);
  load(corrections + table_at(plan, walk, kCorrections, 1), level);
  int64_t offset = walk.offset;
#pragma unroll 2
  for (int i = 0; i < walk.visits; ++i, offset += walk.stride) {
    float values[V], slopes[V];
    load(x + offset, values);
    load(grad + offset, slopes);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = kRows ? v : 0;
      const float dz = silu ? slopes[v] * silu_slope(at.z(values[v], k)) : slopes[v];
      values[v] = at.slope[k] * dz - tilt[k] * (values[v] - at.center[k]) - level[k];
    }
    store(grad_x + offset, values);
  }
}

}  // namespace
}  // namespace palette
