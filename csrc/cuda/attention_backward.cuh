// The kernels of palette::attention_backward. The weights are computed again from the log-sum-exp,
// once for the gradient of q and once for those of k and v: every sum in a fixed order, no atomics.
#pragma once

#include "cuda/attention.cuh"

namespace palette {
namespace {

constexpr int kBackwardColumns = 32;

// delta [samples, heads, tokens]: the sum over a head of grad * out, both dense with channels last.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    delta_kernel(const T* __restrict__ grad, const T* __restrict__ out, float* __restrict__ delta,
                 Attention problem) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (i >= problem.samples * problem.tokens * problem.heads) return;
  const int64_t head = i % problem.heads, token = i / problem.heads % problem.tokens;
  const int64_t sample = i / problem.heads / problem.tokens;
  float sum = 0.0f;
  for (int64_t c = i * problem.size; c < (i + 1) * problem.size; ++c) {
    sum += to_float(grad[c]) * to_float(out[c]);
  }
  delta[(sample * problem.heads + head) * problem.tokens + token] = sum;
}

// With weights P = exp(S * scale - lse) and D = P * (grad v^T - delta) * scale:
// rows are queries: dq = D k. Rows are keys (kKeys), S transposed: dk = D^T q and dv = P^T grad.
template <typename T, int kWidth, bool kKeys>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_kernel(const T* __restrict__ grad, const T* __restrict__ qkv,
                              const float* __restrict__ lse, const float* __restrict__ delta,
                              T* __restrict__ grad_qkv, Attention problem, bool vectors) {
  constexpr int kColumns = kBackwardColumns;
  __shared__ Tile<T, kWidth, kRows> rows, rows_beside;
  __shared__ Tile<T, kWidth, kColumns> columns, columns_beside;
  const Task task = task_of<kWidth>(problem, blockIdx.x);
  const int64_t width = 3 * problem.heads * problem.size;
  const int64_t first_channel = task.head * problem.head_step;
  const T* head = qkv + task.sample * problem.tokens * width + first_channel;
  const Matrix<T> q{head, width}, k{head + problem.part_step, width},
      v{head + 2 * problem.part_step, width};
  const Matrix<T> g{
      grad + (task.sample * problem.tokens * problem.heads + task.head) * problem.size,
      problem.heads * problem.size};
  const float* head_lse = lse + (task.sample * problem.heads + task.head) * problem.tokens;
  const float* head_delta = delta + (task.sample * problem.heads + task.head) * problem.tokens;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;

  float first[kWidth / 8][4] = {}, second[kWidth / 8][4] = {};
  for (int64_t start = 0; start < problem.tokens; start += kColumns) {
    float weights[kColumns / 8][4] = {}, slopes[kColumns / 8][4] = {};
    for (int i = 1; i <= task.chunks; ++i) {
      const int chunk = (task.chunk + i) % task.chunks;  // the block's own comes last, and stays
      __syncthreads();
      if (start == 0 || task.chunks > 1) {
        load_tile<T, kWidth, kRows>(rows, kKeys ? k : q, task.row, chunk, problem, vectors);
        load_tile<T, kWidth, kRows>(rows_beside, kKeys ? v : g, task.row, chunk, problem, vectors);
      }
      load_tile<T, kWidth, kColumns>(columns, kKeys ? q : k, start, chunk, problem, vectors);
      load_tile<T, kWidth, kColumns>(columns_beside, kKeys ? g : v, start, chunk, problem, vectors);
      __syncthreads();
      multiply_rows<T, kWidth, kColumns>(weights, rows, columns);
      multiply_rows<T, kWidth, kColumns>(slopes, rows_beside, columns_beside);
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t a = task.row + row + (i < 2 ? 0 : 8), b = start + n * 8 + column + i % 2;
        const int64_t query = kKeys ? b : a;
        float weight = 0.0f, slope = 0.0f;
        if (a < problem.tokens && b < problem.tokens) {
          weight = exp2f((weights[n][i] * problem.scale - head_lse[query]) * kLog2E);
          slope = weight * (slopes[n][i] - head_delta[query]) * problem.scale;
        }
        weights[n][i] = weight;
        slopes[n][i] = slope;
      }
    }
    mix<T, kWidth, kColumns>(first, slopes, columns);
    if (kKeys) mix<T, kWidth, kColumns>(second, weights, columns_beside);
  }
  const int64_t channel = first_channel + (kKeys ? problem.part_step : 0);
  store_rows<T, kWidth>(grad_qkv, first, task, channel, problem);
  if (kKeys) store_rows<T, kWidth>(grad_qkv, second, task, channel + problem.part_step, problem);
}

}  // namespace
}  // namespace palette
