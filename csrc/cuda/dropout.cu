// palette::dropout on CUDA: the words of Philox4x32-10 (philox.cuh) are made and compared in
// registers, so that no mask is ever stored.
//
// Contiguous, a thread has neighbouring elements, four to a counter. Channels-last, it has
// neighbouring channels of four pixels, whose counters are those of the channels; that wants a
// number of pixels that four divides, and other images take the contiguous way through copies.
#include "cuda/host.h"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"
#include "dropout.h"

namespace palette {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;
constexpr uint32_t kStream = 3;  // of dropout, palette/ops/philox.py

}  // namespace

struct Drop {
  const void* x;
  void* y;               // both dense
  const int64_t* seeds;  // [images]
  int64_t images, channels, pixels;
  uint32_t first, layer;  // words below `first` drop their elements
  float scale;
  Type type;
  int32_t rows;     // channels-last
  int32_t aligned;  // 16 bytes
};

namespace {

// A bit for each of a counter's four elements: whether it is kept.
__device__ __forceinline__ uint32_t kept(const Drop& drop, uint64_t seed, uint32_t counter) {
  const Words words = philox(counter, 0, kStream, drop.layer, seed);
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (words.w[j] >= drop.first) bits |= 1u << j;
  }
  return bits;
}

__device__ __forceinline__ float drop_one(const Drop& drop, bool keep, float value) {
  return keep ? value * drop.scale : 0.0f;
}

// The image of this block, of which every image has `blocks`, and the thread's number in it.
struct Place {
  int64_t image, number;
};

__device__ __forceinline__ Place place_of(uint32_t blocks) {
  return {blockIdx.x / blocks, static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x};
}

// V elements of T a thread; with V = 0, four, each on its own.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) dropout_run_kernel(Drop drop, uint32_t blocks) {
  constexpr int kWidth = V == 0 ? kQuad : V;
  const Place at = place_of(blocks);
  const int64_t elements = drop.channels * drop.pixels, begin = at.number * kWidth;
  if (begin >= elements) return;
  const uint64_t seed = static_cast<uint64_t>(drop.seeds[at.image]);
  const T* from = static_cast<const T*>(drop.x) + at.image * elements + begin;
  T* to = static_cast<T*>(drop.y) + at.image * elements + begin;
  if constexpr (V == 0) {
    const uint32_t bits = kept(drop, seed, static_cast<uint32_t>(begin / kQuad));
    const int64_t left = elements - begin;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j < left) assign(to[j], drop_one(drop, bits >> j & 1, to_float(from[j])));
    }
  } else {
    float values[V];
    load(from, values);
#pragma unroll
    for (int v = 0; v < V; v += kQuad) {
      const uint32_t bits = kept(drop, seed, static_cast<uint32_t>((begin + v) / kQuad));
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        values[v + j] = drop_one(drop, bits >> j & 1, values[v + j]);
      }
    }
    store(to, values);
  }
}

// V channels of four pixels a thread.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) dropout_rows_kernel(Drop drop, uint32_t blocks) {
  const Place at = place_of(blocks);
  const int64_t plane = drop.pixels / kQuad;  // counters of a channel
  const int64_t packs = drop.channels / V;
  if (at.number >= plane * packs) return;
  // at most 2^32 of them: the division of 32 bits is the cheap one
  const uint32_t number = static_cast<uint32_t>(at.number), width = static_cast<uint32_t>(packs);
  const int64_t quad = number / width, channel = static_cast<int64_t>(number % width) * V;
  const uint64_t seed = static_cast<uint64_t>(drop.seeds[at.image]);
  uint32_t bits[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    bits[v] = kept(drop, seed, static_cast<uint32_t>((channel + v) * plane + quad));
  }
  const int64_t begin = (at.image * drop.pixels + quad * kQuad) * drop.channels + channel;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const int64_t place = begin + j * drop.channels;
    float values[V];
    load(static_cast<const T*>(drop.x) + place, values);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = drop_one(drop, bits[v] >> j & 1, values[v]);
    store(static_cast<T*>(drop.y) + place, values);
  }
}

using Kernel = void (*)(Drop, uint32_t);

// Of each image, how many threads.
cudaError_t start(Kernel kernel, const Drop& drop, int64_t threads, cudaStream_t stream) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return launch(kernel, drop.images * blocks, kThreads, stream, drop,
                static_cast<uint32_t>(blocks));
}

template <typename T>
cudaError_t start_as(const Drop& drop, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (drop.rows) {
    const int64_t quads = drop.pixels / kQuad;
    if (drop.aligned && drop.channels % kVector == 0) {
      return start(dropout_rows_kernel<T, kVector>, drop, quads * (drop.channels / kVector),
                   stream);
    }
    return start(dropout_rows_kernel<T, 1>, drop, quads * drop.channels, stream);
  }
  const int64_t elements = drop.channels * drop.pixels;
  if (drop.aligned && elements % kVector == 0) {
    return start(dropout_run_kernel<T, kVector>, drop, elements / kVector, stream);
  }
  return start(dropout_run_kernel<T, 0>, drop, (elements + kQuad - 1) / kQuad, stream);
}

}  // namespace

extern "C" cudaError_t palette_cuda_dropout(const Drop* drop, cudaStream_t stream) {
  if (drop->images * drop->channels * drop->pixels == 0) return cudaSuccess;
  switch (drop->type) {
    case kFloat16:
      return start_as<__half>(*drop, stream);
    case kBFloat16:
      return start_as<__nv_bfloat16>(*drop, stream);
    default:
      return start_as<float>(*drop, stream);
  }
}

}  // namespace palette

namespace palette::cuda {

Tensor dropout(const Tensor& x, const Tensor& seeds, double p, int64_t layer) {
  STD_TORCH_CHECK(checks::dropout(device_of(x), x, seeds, p, layer),
                  "dropout: arguments that do not fit each other");
  const Type type = type_of(x, "dropout", "x");
  const bool rows = channels_last(x);
  Tensor y = empty_dense(x, x.size(1), rows);
  if (x.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t pixels = pixels_of(x);
  const bool direct = !rows || pixels % kQuad == 0;
  const Tensor from = dense(x, rows && direct);
  const Tensor to = direct ? y : empty_dense(x, x.size(1), false);
  const bool aligned = reinterpret_cast<uintptr_t>(from.data_ptr()) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(to.data_ptr()) % 16 == 0;
  const Drop drop{from.data_ptr(),
                  to.data_ptr(),
                  keys.const_data_ptr<int64_t>(),
                  x.size(0),
                  x.size(1),
                  pixels,
                  first_kept(p),
                  static_cast<uint32_t>(layer),
                  static_cast<float>(1 / (1 - p)),
                  type,
                  rows && direct,
                  aligned};
  check_launch(palette_cuda_dropout(&drop, current_stream(x)), "dropout");
  if (!direct) torch::stable::copy_(y, to);
  return y;
}

}  // namespace palette::cuda
