// What the forward and the backward of group_norm_silu share: how a tensor is cut up among blocks
// and threads, and the coefficients of a channel.
//
// Two layouts, one code. With channels last (rows) a thread owns a vector of V neighbouring
// channels and walks down the pixels of a slab; 256 threads cover `lanes` pixels by `columns`
// vectors. Contiguous (planes), a warp owns one slab of the plane of one channel. Either way a
// thread visits vectors at a constant stride, at most 64 of them, so plain float32 sums within a
// thread are safe; everything above is merged in a fixed order, without atomics. The cut depends on
// the shape of one sample only: a sample gives the same bits alone and in a batch.
#pragma once

#include "cuda/vector.cuh"

namespace palette {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kWidestColumns = 32;  // 512 contiguous bytes of a row per block
constexpr int kFewestVisits = 4;    // loads in flight per thread
constexpr int kMostVisits = 64;     // float32 sums stay short
constexpr int kWantedBlocks = 264;  // two for each of the 132 multiprocessors of an H200
constexpr int kFoldThreads = 128;

// The problem, as the host states it.
struct GroupNorm {
  int64_t samples, channels, spatial, groups;
  Type type;  // of x, y and their gradients
  int32_t
      channels_last;  // memory is [samples, spatial, channels], else [samples, channels, spatial]
  int32_t silu;
  float eps;
  Parameter weight, bias;  // [channels]
  Parameter scale, shift;  // [samples, channels]
};

// How the tensor is cut up.
struct Plan {
  int64_t samples, channels, spatial;
  bool vectors;  // 16-byte accesses
  int columns;   // rows: vectors of a pixel that a block takes side by side
  int lanes;     // rows: pixels that a block takes at a time
  int tiles;     // rows: blocks side by side
  int64_t slab;  // pixels (rows) or elements (planes) of a slab
  int64_t slabs;
  int64_t blocks;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan make_plan(const GroupNorm& problem, bool aligned) {
  const int width = problem.type == kFloat32 ? 4 : 8;
  const int64_t innermost = problem.channels_last ? problem.channels : problem.spatial;
  Plan plan{problem.samples,
            problem.channels,
            problem.spatial,
            aligned && innermost % width == 0,
            1,
            1,
            1,
            0,
            0,
            0};
  const int64_t v = plan.vectors ? width : 1;
  const auto visits = [](int64_t steps, int64_t walkers) {
    const int64_t each = steps / walkers;
    return each < kFewestVisits ? kFewestVisits : each > kMostVisits ? kMostVisits : each;
  };
  if (problem.channels_last) {
    const int64_t across = problem.channels / v;
    plan.tiles = static_cast<int>(ceil_div(across, kWidestColumns));
    plan.columns = static_cast<int>(ceil_div(across, plan.tiles));
    plan.lanes = kThreads / plan.columns;
    const int64_t steps = ceil_div(problem.spatial, plan.lanes);
    plan.slab = plan.lanes * visits(steps * plan.tiles, kWantedBlocks);
    plan.slabs = ceil_div(problem.spatial, plan.slab);
    plan.blocks = problem.samples * plan.slabs * plan.tiles;
  } else {
    const int64_t steps = ceil_div(problem.spatial, kWarp * v) * problem.channels;
    plan.slab = kWarp * v * visits(steps, kWantedBlocks * kWarpsPerBlock);
    plan.slabs = ceil_div(problem.spatial, plan.slab);
    plan.blocks = ceil_div(problem.samples * problem.channels * plan.slabs, kWarpsPerBlock);
  }
  return plan;
}

// The vectors of one thread.
struct Walk {
  int64_t offset;  // of the first one, in elements
  int64_t stride;  // from one to the next
  int visits;      // how many; 0 for a thread without work
  int64_t sample, slab, channel;
  int column, lane;  // rows: place in the block; planes: lane of the warp
};

template <int V, bool kRows>
__device__ __forceinline__ Walk walk_of(const Plan& plan, int64_t block) {
  Walk walk{};
  int64_t first, last, per_visit;  // the thread's first pixel or element, the end of its slab
  if (kRows) {
    const int64_t slab = block / plan.tiles;
    walk.column = threadIdx.x % plan.columns;
    walk.lane = threadIdx.x / plan.columns;
    walk.channel = (block % plan.tiles * plan.columns + walk.column) * V;
    walk.slab = slab % plan.slabs;
    walk.sample = slab / plan.slabs;
    per_visit = plan.lanes;
    first = walk.slab * plan.slab + walk.lane;
    walk.offset = (walk.sample * plan.spatial + first) * plan.channels + walk.channel;
    walk.stride = plan.lanes * plan.channels;
  } else {
    const int64_t task = block * kWarpsPerBlock + threadIdx.x / kWarp;
    const int64_t plane = task / plan.slabs;
    walk.lane = threadIdx.x % kWarp;
    walk.slab = task % plan.slabs;
    walk.channel = plane % plan.channels;
    walk.sample = plane / plan.channels;
    per_visit = kWarp * V;
    first = walk.slab * plan.slab + walk.lane * V;
    walk.offset = plane * plan.spatial + first;
    walk.stride = per_visit;
  }
  last = (walk.slab + 1) * plan.slab;
  if (last > plan.spatial) last = plan.spatial;
  const bool works = walk.sample < plan.samples && walk.channel < plan.channels &&
                     (!kRows || walk.lane < plan.lanes) && first < last;
  walk.visits = works ? static_cast<int>((last - first + per_visit - 1) / per_visit) : 0;
  return walk;
}

// Row `kind` of a table [samples, kinds, channels] of float32, at the walk's channel.
__device__ __forceinline__ int64_t table_at(const Plan& plan, const Walk& walk, int kinds,
                                            int kind) {
  return (walk.sample * kinds + kind) * plan.channels + walk.channel;
}

// y = silu(z) with z = (x - center) * slope + offset: one table row of `center`, `slope`, `offset`
// per sample. Subtracting first keeps a constant group exact, where x * slope + (offset - center *
// slope) would cancel.
constexpr int kCoefficients = 3;

template <int K>
struct Coefficients {
  float center[K], slope[K], offset[K];

  __device__ __forceinline__ Coefficients(const float* table, const Plan& plan, const Walk& walk) {
    load(table + table_at(plan, walk, kCoefficients, 0), center);
    load(table + table_at(plan, walk, kCoefficients, 1), slope);
    load(table + table_at(plan, walk, kCoefficients, 2), offset);
  }

  __device__ __forceinline__ float z(float x, int k) const {
    return (x - center[k]) * slope[k] + offset[k];
  }
};

__device__ __forceinline__ void write_coefficients(const GroupNorm& problem, float* table,
                                                   int64_t sample, int64_t channel, float mean,
                                                   float rstd) {
  const float gain = 1.0f + problem.scale.read(sample, channel, 0.0f);
  float* row = table + sample * kCoefficients * problem.channels + channel;
  row[0] = mean;
  row[problem.channels] = problem.weight.read(0, channel, 1.0f) * gain * rstd;
  row[2 * problem.channels] =
      problem.bias.read(0, channel, 0.0f) * gain + problem.shift.read(sample, channel, 0.0f);
}

// Saturates to 0 and 1; NaN stays NaN.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// Calls run(T{}, vector width, rows or planes) for the problem's kernel variant.
template <typename Run>
cudaError_t dispatch_layout(const GroupNorm& problem, const Plan& plan, Run run) {
  using Yes = std::true_type;
  using No = std::false_type;
  const auto with = [&](auto element, auto width) {
    using One = std::integral_constant<int, 1>;
    if (plan.vectors) {
      return problem.channels_last ? run(element, width, Yes{}) : run(element, width, No{});
    }
    return problem.channels_last ? run(element, One{}, Yes{}) : run(element, One{}, No{});
  };
  switch (problem.type) {
    case kFloat16:
      return with(__half{}, std::integral_constant<int, 8>{});
    case kBFloat16:
      return with(__nv_bfloat16{}, std::integral_constant<int, 8>{});
    default:
      return with(float{}, std::integral_constant<int, 4>{});
  }
}

}  // namespace palette
