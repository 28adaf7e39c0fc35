// Tensors as the CPU kernels see them: [N, C, ...] in one of two dense layouts, and small
// parameter tensors of any dtype and strides as plain arrays.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "checks.h"

namespace palette::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kLineBytes = 64;  // of a cache

// Where all arguments of an op have to be: on the CPU, where x is.
inline Device device_of(const Tensor& x) {
  return {aoti_torch_device_type_cpu(), x.get_device_index()};
}

// The rule of palette/ops/_layout.py: whether the channels of x lie next to each other in memory.
inline bool channels_last(const Tensor& x) {
  return x.dim() >= 3 && x.size(1) > 1 && x.stride(1) == 1 && pixels_of(x) > 1;
}

// Asks for pages of 2 MB, so that the first writes to a large tensor do not wait for thousands of
// small ones. Where the answer is no, nothing changes.
inline void advise_huge_pages([[maybe_unused]] const Tensor& tensor,
                              [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kWorthIt = int64_t{1} << 23;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kWorthIt) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised, on the CPU, dense, with dimension 1 innermost or in the order of the dimensions.
inline Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype, bool channels_last) {
  std::vector<int64_t> strides(dims);
  int64_t next = 1;
  const auto place = [&](int64_t d) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  };
  if (channels_last) place(1);
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (!channels_last || d != 1) place(d);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor result(handle);
  advise_huge_pages(result, result.numel() * static_cast<int64_t>(result.element_size()));
  return result;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, false);
}

// Of x's shape and dtype.
inline Tensor empty_dense(const Tensor& x, bool channels_last) {
  return empty(x.sizes().data(), x.dim(), x.scalar_type(), channels_last);
}

// x [N, C, ...] as [N, C, P]. In rows, the channels of a pixel are adjacent and the pixels
// `pixel_stride` apart; otherwise a sample's pixels, then its channels, are adjacent.
struct Image {
  Tensor tensor;
  bool rows;
  int64_t batch, channels, pixels;
  int64_t batch_stride, pixel_stride;
};

inline bool fits(const Tensor& x, bool rows, int64_t* pixel_stride) {
  int64_t next = rows ? -1 : 1;  // -1: the innermost dimension decides
  *pixel_stride = rows ? x.size(1) : 1;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (next < 0) *pixel_stride = next = x.stride(d);
    if (x.stride(d) != next) return false;
    next *= x.size(d);
  }
  return x.size(1) <= 1 || x.stride(1) == (rows ? 1 : next);
}

// x itself where its strides allow, else a dense copy.
inline Image image(const Tensor& x, bool rows) {
  Image result = {x, rows, x.size(0), x.size(1), pixels_of(x), 0, 1};
  if (!fits(x, rows, &result.pixel_stride)) {
    result.tensor = empty_dense(x, rows && x.dim() > 2);
    torch::stable::copy_(result.tensor, x);
    result.pixel_stride = rows ? result.channels : 1;
  }
  result.batch_stride = result.tensor.stride(0);
  return result;
}

template <class A, class T>
void gather(const Tensor& from, std::vector<A>& to) {
  const T* data = from.const_data_ptr<T>();
  const bool matrix = from.dim() == 2;
  const int64_t height = matrix ? from.size(0) : 1, width = from.size(matrix ? 1 : 0);
  const int64_t row = matrix ? from.stride(0) : 0, step = from.stride(matrix ? 1 : 0);
  to.resize(height * width);
  for (int64_t i = 0; i < height; ++i) {
    const T* values = data + i * row;
    A* out = to.data() + i * width;
    if (step == 1) {  // which the compiler makes vectors of
      for (int64_t j = 0; j < width; ++j) out[j] = static_cast<A>(values[j]);
    } else {
      for (int64_t j = 0; j < width; ++j) out[j] = static_cast<A>(values[j * step]);
    }
  }
}

// The values of a vector or matrix in row-major order; empty where there is no tensor.
template <class A>
std::vector<A> values(const std::optional<Tensor>& from) {
  std::vector<A> result;
  if (!from.has_value()) return result;
  switch (from->scalar_type()) {
    case ScalarType::Float:
      gather<A, float>(*from, result);
      break;
    case ScalarType::Double:
      gather<A, double>(*from, result);
      break;
    case ScalarType::BFloat16:
      gather<A, BFloat16>(*from, result);
      break;
    case ScalarType::Half:
      gather<A, Half>(*from, result);
      break;
    default:
      STD_TORCH_CHECK(false, "palette: a parameter has a dtype that is not floating");
  }
  return result;
}

template <class T, class A>
void scatter(const std::vector<A>& from, const Tensor& to) {
  T* data = to.mutable_data_ptr<T>();
  for (size_t i = 0; i < from.size(); ++i) data[i] = static_cast<T>(from[i]);
}

// A new contiguous tensor on the CPU with these values, rounded to `dtype`.
template <class A>
Tensor tensor_of(const std::vector<A>& from, std::initializer_list<int64_t> shape,
                 ScalarType dtype) {
  const Tensor result = empty(shape, dtype);
  switch (dtype) {
    case ScalarType::Double:
      scatter<double>(from, result);
      break;
    case ScalarType::BFloat16:
      scatter<BFloat16>(from, result);
      break;
    case ScalarType::Half:
      scatter<Half>(from, result);
      break;
    default:
      scatter<float>(from, result);
      break;
  }
  return result;
}

// body(T()) with T the element type of x.
template <class F>
auto by_dtype(const Tensor& x, const F& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(BFloat16());
    case ScalarType::Half:
      return body(Half());
    default:
      STD_TORCH_CHECK(false, "palette: a tensor has a dtype that is not floating");
  }
}

}  // namespace palette::cpu
