// palette::attention on CUDA: softmax(q k^T scale) v with a running maximum (Milakov and
// Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135), on the packed qkv where it lies.
//
// Scores, sums and softmax are float32; half formats round the weights for the tensor cores.
#include <cmath>

#include "cuda/attention_backward.cuh"
#include "cuda/host.h"

namespace palette {
namespace {

constexpr int kForwardColumns = 64;

// What is known of the two rows of a lane (elements 0, 1 and elements 2, 3 of its fragments) after
// some tiles of keys; scores are in units of log 2.
struct Softmax {
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {};

  // Turns a tile's scores into weights relative to the new highest score; `shrink` is what the
  // weights before are now worth.
  template <int kColumns>
  __device__ __forceinline__ void add(float (&scores)[kColumns / 8][4], int64_t start,
                                      int64_t tokens, float (&shrink)[2]) {
    const int64_t left = tokens - start - threadIdx.x % 4 * 2;
    float now[2] = {highest[0], highest[1]}, sum[2] = {};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + i % 2 >= left) scores[n][i] = -INFINITY;
        now[i / 2] = fmaxf(now[i / 2], scores[n][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // the four lanes of a row
      now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 1));
      now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 2));
      shrink[r] = exp2f(highest[r] - now[r]);
      highest[r] = now[r];
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2f(scores[n][i] - now[i / 2]);
        sum[i / 2] += scores[n][i];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
      total[r] = total[r] * shrink[r] + sum[r];
    }
  }
};

// Multiplies the two rows of a lane by a factor each.
template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&sums)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= factor[i / 2];
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_kernel(const T* __restrict__ qkv, T* __restrict__ out, float* __restrict__ lse,
                     Attention problem, bool vectors) {
  constexpr int kColumns = kForwardColumns;
  __shared__ Tile<T, kWidth, kRows> queries;
  __shared__ Tile<T, kWidth, kColumns> keys, values;
  const Task task = task_of<kWidth>(problem, blockIdx.x);
  const int64_t width = 3 * problem.heads * problem.size;
  const T* head = qkv + task.sample * problem.tokens * width + task.head * problem.head_step;
  const Matrix<T> q{head, width}, k{head + problem.part_step, width},
      v{head + 2 * problem.part_step, width};
  Softmax softmax;
  float mixed[kWidth / 8][4] = {};
  for (int64_t start = 0; start < problem.tokens; start += kColumns) {
    float weights[kColumns / 8][4] = {};
    for (int chunk = 0; chunk < task.chunks; ++chunk) {
      __syncthreads();
      if (start == 0 || task.chunks > 1) {
        load_tile<T, kWidth, kRows>(queries, q, task.row, chunk, problem, vectors);
      }
      load_tile<T, kWidth, kColumns>(keys, k, start, chunk, problem, vectors);
      if (chunk == task.chunk) {
        load_tile<T, kWidth, kColumns>(values, v, start, chunk, problem, vectors);
      }
      __syncthreads();
      multiply_rows<T, kWidth, kColumns>(weights, queries, keys);
    }
    float shrink[2];
    const float units[2] = {problem.scale * kLog2E, problem.scale * kLog2E};
    scale_rows(weights, units);
    softmax.add<kColumns>(weights, start, problem.tokens, shrink);
    scale_rows(mixed, shrink);
    mix<T, kWidth, kColumns>(mixed, weights, values);
  }
  const float share[2] = {1.0f / softmax.total[0], 1.0f / softmax.total[1]};
  scale_rows(mixed, share);
  store_rows<T, kWidth>(out, mixed, task, task.head * problem.size, problem);
  if (task.chunk == 0 && threadIdx.x % 4 == 0) {
    for (int r = 0; r < 2; ++r) {
      const int64_t token = task.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
      if (token < problem.tokens) {
        lse[(task.sample * problem.heads + task.head) * problem.tokens + token] =
            (softmax.highest[r] + log2f(softmax.total[r])) / kLog2E;
      }
    }
  }
}

// Whether every row of q, k, v and of a head of grad starts on 16 bytes.
bool in_vectors(const Attention& problem, const void* qkv, const void* grad) {
  const int64_t vector = problem.type == kFloat32 ? 4 : 8;
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return problem.size % vector == 0 && aligned(qkv) && aligned(grad);
}

// Calls run(T{}, width) for the type and the width of a head.
template <typename Run>
cudaError_t dispatch_width(const Attention& problem, Run run) {
  using Narrow = std::integral_constant<int, 32>;
  using Wide = std::integral_constant<int, 64>;
  const bool narrow = problem.size <= 32;
  switch (problem.type) {
    case kFloat16:
      return narrow ? run(__half{}, Narrow{}) : run(__half{}, Wide{});
    case kBFloat16:
      return narrow ? run(__nv_bfloat16{}, Narrow{}) : run(__nv_bfloat16{}, Wide{});
    default:
      return run(float{}, Narrow{});  // a wider tile would not fit into static shared memory
  }
}

int64_t blocks_of(const Attention& problem, int width) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  return problem.samples * problem.heads * ceil_div(problem.tokens, kRows) *
         ceil_div(problem.size, width);
}

}  // namespace

// qkv as the problem says; out by the problem's strides; lse float32 [samples, heads, tokens].
extern "C" cudaError_t palette_cuda_attention(const Attention* problem, const void* qkv, void* out,
                                              float* lse, cudaStream_t stream) {
  return dispatch_width(*problem, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value;
    return launch(attention_kernel<T, kWidth>, blocks_of(*problem, kWidth), kAttentionThreads,
                  stream, static_cast<const T*>(qkv), static_cast<T*>(out), lse, *problem,
                  in_vectors(*problem, qkv, qkv));
  });
}

// grad and out dense [samples, tokens, heads * size]; grad_qkv by the problem's strides; delta is
// scratch of lse's size.
extern "C" cudaError_t palette_cuda_attention_backward(const Attention* problem, const void* grad,
                                                       const void* qkv, const void* out,
                                                       const float* lse, float* delta,
                                                       void* grad_qkv, cudaStream_t stream) {
  const int64_t rows = problem->samples * problem->heads * problem->tokens;
  const bool vectors = in_vectors(*problem, qkv, grad);
  return dispatch_width(*problem, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value;
    const T* slopes = static_cast<const T*>(grad);
    const T* in = static_cast<const T*>(qkv);
    T* into = static_cast<T*>(grad_qkv);
    const int64_t blocks = blocks_of(*problem, kWidth);
    cudaError_t status =
        launch(delta_kernel<T>, (rows + kAttentionThreads - 1) / kAttentionThreads,
               kAttentionThreads, stream, slopes, static_cast<const T*>(out), delta, *problem);
    if (status != cudaSuccess) return status;
    status = launch(attention_backward_kernel<T, kWidth, false>, blocks, kAttentionThreads, stream,
                    slopes, in, lse, delta, into, *problem, vectors);
    if (status != cudaSuccess) return status;
    return launch(attention_backward_kernel<T, kWidth, true>, blocks, kAttentionThreads, stream,
                  slopes, in, lse, delta, into, *problem, vectors);
  });
}

}  // namespace palette

namespace palette::cuda {
namespace {

constexpr const char* kAttention = "attention";

Attention problem_of(const Tensor& qkv, int64_t heads, const std::string& order, int64_t channels,
                     bool rows) {
  const int64_t size = qkv.size(1) / (3 * heads), tokens = pixels_of(qkv);
  const bool legacy = is_legacy(order);
  return {qkv.size(0),
          heads,
          tokens,
          size,
          legacy ? 3 * size : size,
          legacy ? size : heads * size,
          channels * tokens,
          rows ? 1 : tokens,
          rows ? channels : 1,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(size))),
          type_of(qkv, kAttention, "qkv")};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, int64_t heads, const std::string& order) {
  STD_TORCH_CHECK(checks::attention(device_of(qkv), qkv, heads),
                  "attention: heads that do not fit qkv");
  const DeviceGuard guard(qkv.get_device_index());
  const bool rows = channels_last(qkv);
  const int64_t channels = qkv.size(1) / 3;
  const Attention problem = problem_of(qkv, heads, order, channels, rows);
  Tensor out = empty_dense(qkv, channels, rows);
  Tensor lse =
      torch::stable::new_empty(qkv, {problem.samples, heads, problem.tokens}, ScalarType::Float);
  if (qkv.numel() == 0) return {out, lse};
  const Tensor in = dense(qkv, true);
  check_launch(palette_cuda_attention(&problem, in.data_ptr(), out.data_ptr(),
                                      lse.mutable_data_ptr<float>(), current_stream(qkv)),
               kAttention);
  return {out, lse};
}

Tensor attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, int64_t heads, const std::string& order) {
  STD_TORCH_CHECK(checks::attention_backward(device_of(qkv), grad, qkv, out, lse, heads),
                  "attention_backward: arguments that do not fit each other");
  const DeviceGuard guard(qkv.get_device_index());
  const bool rows = channels_last(qkv);
  const Attention problem = problem_of(qkv, heads, order, qkv.size(1), rows);
  Tensor grad_qkv = empty_dense(qkv, qkv.size(1), rows);
  if (qkv.numel() == 0) return grad_qkv;
  const Tensor in = dense(qkv, true), slopes = dense(grad, true), made = dense(out, true);
  const Tensor norm = torch::stable::contiguous(lse), delta = torch::stable::empty_like(norm);
  check_launch(
      palette_cuda_attention_backward(&problem, slopes.data_ptr(), in.data_ptr(), made.data_ptr(),
                                      norm.const_data_ptr<float>(), delta.mutable_data_ptr<float>(),
                                      grad_qkv.data_ptr(), current_stream(qkv)),
      kAttention);
  return grad_qkv;
}

}  // namespace palette::cuda
