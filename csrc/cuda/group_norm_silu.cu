// palette::group_norm_silu on CUDA: moments of slabs, folded to mean and rstd, then applied.
//
// Two passes over x, the second in reverse order: what the first read last is still in the L2
// cache. The reduction is split over many blocks per group, which keeps a GPU busy at batch 1,
// where one block per group leaves most of it idle. The formula is Wu and He, "Group Normalization"
// (2018).
#include <limits>

#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/host.h"
#include "cuda/moments.cuh"

namespace palette {
namespace {

// partials [samples, slabs, 2, channels]: mean and m2 of each channel within each slab.
template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, 3)
    moments_kernel(const T* __restrict__ x, float* __restrict__ partials, Plan plan) {
  const Walk walk = walk_of<V, kRows>(plan, blockIdx.x);
  float sum[V] = {}, square[V] = {}, pivot[V] = {};
  if (walk.visits > 0) {
    const T* source = x + walk.offset;
    load(source, pivot);
    if (!kRows) {
#pragma unroll
      for (int v = 1; v < V; ++v) pivot[v] = pivot[0];
    }
#pragma unroll 4
    for (int i = 0; i < walk.visits; ++i, source += walk.stride) {
      float values[V];
      load(source, values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float deviation = values[v] - pivot[v];
        sum[v] += deviation;
        square[v] += deviation * deviation;
      }
    }
  }

  float* out = partials + (walk.sample * plan.slabs + walk.slab) * 2 * plan.channels + walk.channel;
  if (kRows) {
    Moments<V> own{};
    own.count = static_cast<float>(walk.visits);
    if (walk.visits > 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) own.set(v, pivot[v], sum[v], square[v]);
    }
    merge_lanes(own, plan, walk.lane);
    if (walk.lane == 0 && walk.visits > 0) {
      store(out, own.mean);
      store(out + plan.channels, own.m2);
    }
  } else {
    Moments<1> own{};
    own.count = static_cast<float>(walk.visits * V);
    if (walk.visits > 0) {
#pragma unroll
      for (int v = 1; v < V; ++v) {
        sum[0] += sum[v];
        square[0] += square[v];
      }
      own.set(0, pivot[0], sum[0], square[0]);
    }
    merge_warp(own);
    if (walk.lane == 0 && walk.visits > 0) {
      out[0] = own.mean[0];
      out[plan.channels] = own.m2[0];
    }
  }
}

// One block per (sample, group): mean, rstd, and the coefficients of the group's channels.
__global__ void __launch_bounds__(kFoldThreads)
    fold_moments_kernel(const float* __restrict__ partials, float* __restrict__ mean,
                        float* __restrict__ rstd, float* __restrict__ table, Plan plan,
                        GroupNorm problem) {
  const int64_t sample = blockIdx.x / problem.groups;
  const int64_t group = blockIdx.x % problem.groups;
  const int64_t members = problem.channels / problem.groups;
  const int64_t last = plan.spatial - (plan.slabs - 1) * plan.slab;  // the last slab is short

  Moments<1> own{};
  for (int64_t i = threadIdx.x; i < plan.slabs * members; i += kFoldThreads) {
    const int64_t slab = i / members;
    const float* in = partials + (sample * plan.slabs + slab) * 2 * problem.channels +
                      group * members + i % members;
    own.merge({static_cast<float>(slab + 1 < plan.slabs ? plan.slab : last),
               {in[0]},
               {in[problem.channels]}});
  }
  __shared__ Moments<1> warps[kFoldThreads / kWarp];
  merge_warp(own);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = own;
  __syncthreads();
  own = warps[0];
  for (int warp = 1; warp < kFoldThreads / kWarp; ++warp) own.merge(warps[warp]);

  const float group_rstd = 1.0f / sqrtf(own.m2[0] / own.count + problem.eps);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = own.mean[0];
    rstd[blockIdx.x] = group_rstd;
  }
  for (int64_t channel = group * members + threadIdx.x; channel < (group + 1) * members;
       channel += kFoldThreads) {
    write_coefficients(problem, table, sample, channel, own.mean[0], group_rstd);
  }
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, 3)
    apply_kernel(const T* __restrict__ x, T* __restrict__ y, const float* __restrict__ table,
                 Plan plan, bool silu) {
  const Walk walk = walk_of<V, kRows>(plan, gridDim.x - 1 - blockIdx.x);
  if (walk.visits == 0) return;
  const Coefficients<kRows ? V : 1> at(table, plan, walk);
  int64_t offset = walk.offset;
#pragma unroll 4
  for (int i = 0; i < walk.visits; ++i, offset += walk.stride) {
    float values[V];
    load(x + offset, values);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float z = at.z(values[v], kRows ? v : 0);
      values[v] = silu ? z * sigmoid(z) : z;
    }
    store(y + offset, values);
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

// Floats of scratch that either direction needs, 16-byte aligned.
extern "C" int64_t palette_cuda_group_norm_silu_scratch(const GroupNorm* problem) {
  const Plan plan = make_plan(*problem, true), scalar = make_plan(*problem, false);
  const int64_t slabs = plan.slabs > scalar.slabs ? plan.slabs : scalar.slabs;
  return problem->samples * problem->channels * (kCoefficients + kCorrections + 2 + 2 * slabs);
}

// x and y in the problem's type and layout; mean and rstd float32 [samples, groups].
extern "C" cudaError_t palette_cuda_group_norm_silu(const GroupNorm* problem, const void* x,
                                                    void* y, float* mean, float* rstd,
                                                    float* scratch, cudaStream_t stream) {
  const Plan plan = make_plan(*problem, is_aligned(x) && is_aligned(y));
  if (plan.blocks == 0) return cudaSuccess;
  float* table = scratch;
  float* partials = table + problem->samples * problem->channels * kCoefficients;
  return dispatch_layout(*problem, plan, [&](auto element, auto width, auto rows) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    constexpr bool kRows = decltype(rows)::value;
    cudaError_t status = launch(moments_kernel<T, V, kRows>, plan.blocks, kThreads, stream,
                                static_cast<const T*>(x), partials, plan);
    if (status != cudaSuccess) return status;
    status = launch(fold_moments_kernel, problem->samples * problem->groups, kFoldThreads, stream,
                    partials, mean, rstd, table, plan, *problem);
    if (status != cudaSuccess) return status;
    return launch(apply_kernel<T, V, kRows>, plan.blocks, kThreads, stream,
                  static_cast<const T*>(x), static_cast<T*>(y), table, plan, problem->silu != 0);
  });
}

// What the backward writes besides grad_x; a parameter of type kAbsent is left out.
struct ParameterGradients {
  Parameter weight, bias, scale, shift;
};

// grad and grad_x in the problem's type and layout, as x.
extern "C" cudaError_t palette_cuda_group_norm_silu_backward(
    const GroupNorm* problem, const void* grad, const void* x, const float* mean, const float* rstd,
    void* grad_x, const ParameterGradients* gradients, float* scratch, cudaStream_t stream) {
  const Plan plan = make_plan(*problem, is_aligned(grad) && is_aligned(x) && is_aligned(grad_x));
  if (plan.blocks == 0) return cudaSuccess;
  const int64_t rows = problem->samples * problem->channels;
  float* table = scratch;
  float* corrections = table + rows * kCoefficients;
  float* totals = corrections + rows * kCorrections;
  float* partials = totals + rows * 2;
  const bool silu = problem->silu != 0;
  return dispatch_layout(*problem, plan, [&](auto element, auto width, auto channels_last) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    constexpr bool kRows = decltype(channels_last)::value;
    const T* in = static_cast<const T*>(x);
    const T* slopes = static_cast<const T*>(grad);
    cudaError_t status = launch(coefficients_kernel, ceil_div(rows, kThreads), kThreads, stream,
                                mean, rstd, table, *problem);
    if (status != cudaSuccess) return status;
    status = launch(sums_kernel<T, V, kRows>, plan.blocks, kThreads, stream, slopes, in, table,
                    partials, plan, silu);
    if (status != cudaSuccess) return status;
    status =
        launch(fold_sums_kernel, problem->samples * problem->groups, kFoldThreads, stream, partials,
               rstd, totals, corrections, plan, *problem, gradients->scale, gradients->shift);
    if (status != cudaSuccess) return status;
    status = launch(parameter_gradients_kernel, ceil_div(problem->channels, kFoldThreads),
                    kFoldThreads, stream, totals, *problem, gradients->weight, gradients->bias);
    if (status != cudaSuccess) return status;
    return launch(gradient_kernel<T, V, kRows>, plan.blocks, kThreads, stream, slopes, in,
                  static_cast<T*>(grad_x), table, corrections, plan, silu);
  });
}

}  // namespace palette

namespace palette::cuda {
namespace {

constexpr const char* kOp = "group_norm_silu";

GroupNorm problem_of(const Tensor& x, bool rows, int64_t groups, double eps, bool silu,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                     std::vector<Tensor>& copies) {
  return {x.size(0),
          x.size(1),
          pixels_of(x),
          groups,
          type_of(x, kOp, "x"),
          rows,
          silu,
          static_cast<float>(eps),
          parameter(weight, kOp, "weight", copies),
          parameter(bias, kOp, "bias", copies),
          parameter(scale, kOp, "scale", copies),
          parameter(shift, kOp, "shift", copies)};
}

Tensor scratch_for(const GroupNorm& problem, const Tensor& like) {
  return torch::stable::new_empty(like, {palette_cuda_group_norm_silu_scratch(&problem)},
                                  ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias,
                                                   int64_t groups, double eps,
                                                   const std::optional<Tensor>& scale,
                                                   const std::optional<Tensor>& shift, bool silu) {
  STD_TORCH_CHECK(checks::group_norm_silu(device_of(x), x, weight, bias, groups, eps, scale, shift),
                  "group_norm_silu: arguments that do not fit each other");
  const DeviceGuard guard(x.get_device_index());
  const bool rows = channels_last(x);
  std::vector<Tensor> copies;
  const GroupNorm problem =
      problem_of(x, rows, groups, eps, silu, weight, bias, scale, shift, copies);
  Tensor y = empty_dense(x, x.size(1), rows);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), groups}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {x.size(0), groups}, ScalarType::Float);
  if (x.numel() == 0) {  // as torch.native_group_norm
    torch::stable::fill_(mean, 0.0);
    torch::stable::fill_(rstd, std::numeric_limits<double>::quiet_NaN());
    return {y, mean, rstd};
  }
  const Tensor in = dense(x, rows);
  const Tensor scratch = scratch_for(problem, x);
  check_launch(
      palette_cuda_group_norm_silu(&problem, in.data_ptr(), y.data_ptr(),
                                   mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(),
                                   scratch.mutable_data_ptr<float>(), current_stream(x)),
      kOp);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t groups,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu) {
  STD_TORCH_CHECK(checks::group_norm_silu_backward(device_of(x), grad, x, mean, rstd, weight, bias,
                                                   groups, scale, shift),
                  "group_norm_silu_backward: arguments that do not fit each other");
  const DeviceGuard guard(x.get_device_index());
  const bool rows = channels_last(x);
  std::vector<Tensor> copies;
  const GroupNorm problem =
      problem_of(x, rows, groups, 0.0, silu, weight, bias, scale, shift, copies);
  const auto film = [&](const std::optional<Tensor>& value) {
    return value.has_value()
               ? torch::stable::new_empty(x, {x.size(0), x.size(1)}, value->scalar_type())
               : torch::stable::new_empty(x, {0}, ScalarType::Float);
  };
  const auto written = [&](const Tensor& result, bool wanted) {
    return wanted ? parameter(result, kOp, "a gradient", copies) : Parameter{nullptr, 0, kAbsent};
  };
  const ScalarType type = weight.has_value() ? weight->scalar_type() : ScalarType::Float;
  Tensor grad_x = empty_dense(x, x.size(1), rows);
  Tensor grad_weight = torch::stable::new_empty(x, {x.size(1)}, type);
  Tensor grad_bias = torch::stable::new_empty(x, {x.size(1)}, type);
  Tensor grad_scale = film(scale), grad_shift = film(shift);
  if (x.numel() == 0) {
    for (Tensor* each : {&grad_weight, &grad_bias, &grad_scale, &grad_shift}) {
      torch::stable::fill_(*each, 0.0);
    }
    return {grad_x, grad_weight, grad_bias, grad_scale, grad_shift};
  }
  const ParameterGradients gradients{written(grad_weight, true), written(grad_bias, true),
                                     written(grad_scale, scale.has_value()),
                                     written(grad_shift, shift.has_value())};
  const Tensor slopes = dense(grad, rows), in = dense(x, rows);
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  const Tensor scratch = scratch_for(problem, x);
  check_launch(palette_cuda_group_norm_silu_backward(
                   &problem, slopes.data_ptr(), in.data_ptr(), means.const_data_ptr<float>(),
                   rstds.const_data_ptr<float>(), grad_x.data_ptr(), &gradients,
                   scratch.mutable_data_ptr<float>(), current_stream(x)),
               kOp);
  return {grad_x, grad_weight, grad_bias, grad_scale, grad_shift};
}

}  // namespace palette::cuda
