// What the host half of every CUDA op needs from torch, through the stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "cuda/ops.h"
#include "cuda/vector.cuh"

namespace palette::cuda {

#ifdef PALETTE_EMULATE  // tensors are on the CPU
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
using torch::stable::accelerator::DeviceGuard;
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }

// The stream that torch queues this thread's work on, for the tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// Where all arguments of an op have to be: on the GPU that x is on, if it is on one.
inline Device device_of(const Tensor& x) { return {device_type(), x.get_device_index()}; }

inline void check_launch(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op,
                  ": the kernel was not launched: ", cudaGetErrorString(status));
}

inline Type type_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " is neither float32, float16 nor bfloat16");
  }
}

// The memory layout rule of palette/ops/_layout.py.
inline bool channels_last(const Tensor& x) {
  return x.dim() >= 3 && x.size(1) > 1 && x.stride(1) == 1 && pixels_of(x) > 1;
}

// Strides of a dense tensor of these sizes [N, C, ...].
inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, bool channels_last) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = channels_last ? sizes[1] : 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (channels_last && d == 1) {
      strides[d] = 1;
      continue;
    }
    strides[d] = next;
    next *= sizes[d] > 0 ? sizes[d] : 1;  // as torch counts
  }
  return strides;
}

inline bool is_dense(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes();
  const std::vector<int64_t> wanted =
      dense_strides(std::vector<int64_t>(sizes.begin(), sizes.end()), channels_last);
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1 && x.stride(d) != wanted[d]) return false;
  }
  return true;
}

inline Tensor empty_dense(const Tensor& like, int64_t channels, bool channels_last) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[1] = channels;
  const std::vector<int64_t> strides = dense_strides(shape, channels_last);
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), shape.data(), strides.data(), dtype, device, like.get_device_index(), &made));
  return Tensor(made);
}

// x itself where it is dense in that layout, else a copy that is.
inline Tensor dense(const Tensor& x, bool channels_last) {
  if (is_dense(x, channels_last)) return x;
  Tensor copy = empty_dense(x, x.size(1), channels_last);
  torch::stable::copy_(copy, x);
  return copy;
}

// A small array [C] or [N, C] as the kernels read it. What had to be copied is kept in `copies`
// until the kernels are queued.
inline Parameter parameter(const std::optional<Tensor>& value, const char* op, const char* name,
                           std::vector<Tensor>& copies) {
  if (!value.has_value()) return {nullptr, 0, kAbsent};
  const int64_t last = value->dim() - 1;
  const bool direct = value->stride(last) == 1 || value->size(last) <= 1;
  copies.push_back(direct ? *value : torch::stable::contiguous(*value));
  const Tensor& kept = copies.back();
  return {kept.data_ptr(), last == 1 ? kept.stride(0) : 0, type_of(kept, op, name)};
}

}  // namespace palette::cuda
