// Kernels with one fault each, and one without: does the emulation notice?
#include "cuda/launch.cuh"

namespace palette {
namespace {

constexpr int kThreads = 64;

// Reverses a block through shared memory; right only with the barrier.
template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void missed_barrier_kernel(float* out) {
  if (threadIdx.x != 3) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void misaligned_kernel(float* out) {
  *reinterpret_cast<float4*>(out + 1) = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
}

__global__ void warp_sum_kernel(const float* in, float* out) {
  float sum = in[threadIdx.x];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
  out[threadIdx.x] = sum;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void run(int which, const float* in, float* out) {
  switch (which) {
    case 0:
      launch(reverse_kernel<true>, 3, kThreads, nullptr, in, out);
      break;
    case 1:
      launch(reverse_kernel<false>, 3, kThreads, nullptr, in, out);
      break;
    case 2:
      launch(missed_barrier_kernel, 1, kThreads, nullptr, out);
      break;
    case 3:
      launch(misaligned_kernel, 1, 1, nullptr, out);
      break;
    case 4:
      launch(warp_sum_kernel, 1, kThreads, nullptr, in, out);
      break;
  }
}

}  // namespace palette
