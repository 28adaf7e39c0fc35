// palette::noise on CUDA: one thread makes the four normals of one counter (philox.cuh).
#include "cuda/host.h"
#include "cuda/philox.cuh"

namespace palette {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    noise_kernel(const int64_t* __restrict__ seeds, const int64_t* __restrict__ step,
                 int64_t step_stride, float* __restrict__ out, int64_t images, int64_t elements,
                 uint32_t stream, uint32_t layer) {
  const int64_t quads = (elements + 3) / 4;
  const int64_t total = images * quads;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const int64_t image = i / quads;
    const int64_t quad = i % quads;
    float normals[4];
    normals_of(static_cast<uint64_t>(seeds[image]), static_cast<uint32_t>(quad),
               static_cast<uint32_t>(step[image * step_stride]), stream, layer, normals);
    float* target = out + image * elements + quad * 4;
    if (elements % 4 == 0) {  // out is a fresh allocation, so every quad is 16-byte aligned
      *reinterpret_cast<float4*>(target) =
          make_float4(normals[0], normals[1], normals[2], normals[3]);
    } else {
      const int count = quad * 4 + 4 <= elements ? 4 : static_cast<int>(elements - quad * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < count) target[j] = normals[j];
      }
    }
  }
}

}  // namespace

// seeds [images] and step (one value, or [images] with step_stride 1) on the device; out float32
// [images, elements].
extern "C" cudaError_t palette_cuda_noise(const int64_t* seeds, const int64_t* step,
                                          int64_t step_stride, float* out, int64_t images,
                                          int64_t elements, int64_t stream_number, int64_t layer,
                                          cudaStream_t stream) {
  const int64_t quads = images * ((elements + 3) / 4);
  if (quads == 0) return cudaSuccess;
  const int64_t blocks = (quads + kThreads - 1) / kThreads;
  const int64_t limit = int64_t{1} << 20;
  return launch(noise_kernel, blocks < limit ? blocks : limit, kThreads, stream, seeds, step,
                step_stride, out, images, elements, static_cast<uint32_t>(stream_number),
                static_cast<uint32_t>(layer));
}

}  // namespace palette

namespace palette::cuda {

Tensor noise(const Tensor& seeds, const Tensor& step, const std::vector<int64_t>& shape,
             int64_t stream, int64_t layer) {
  STD_TORCH_CHECK(checks::noise(device_of(seeds), seeds, step), "noise: seeds and step do not fit");
  const DeviceGuard guard(seeds.get_device_index());
  const Tensor keys = torch::stable::contiguous(seeds);
  const Tensor steps = torch::stable::contiguous(step);
  std::vector<int64_t> sizes{keys.numel()};
  int64_t elements = 1;
  for (const int64_t size : shape) {
    sizes.push_back(size);
    elements *= size;
  }
  Tensor out = torch::stable::new_empty(keys, sizes, ScalarType::Float);
  check_launch(palette_cuda_noise(keys.const_data_ptr<int64_t>(), steps.const_data_ptr<int64_t>(),
                                  steps.numel() == 1 ? 0 : 1, out.mutable_data_ptr<float>(),
                                  keys.numel(), elements, stream, layer, current_stream(keys)),
               "noise");
  return out;
}

}  // namespace palette::cuda
