// What both directions of attention share: packed qkv as the kernels see it, and the matrices that
// one head's work is done on.
//
// One head of one sample is worked on by one thread, block by block in a fixed order, so neither
// the number of threads nor the place in the batch changes a bit.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace palette::cpu {

// The dtype of all arithmetic on elements of T.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr ScalarType kWideType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

constexpr int64_t kPadding = 16;                 // lanes of the widest vector
constexpr int64_t kRows = 8;                     // a multiple of the rows of every set's tile
constexpr int64_t kGroup = 16;                   // queries whose scores are in work together
constexpr int64_t kQueries = 256;                // queries for which a head's keys are laid out
constexpr int64_t kKeys = 256;                   // keys whose scores are in work together
constexpr int64_t kKeyPitch = kKeys + kPadding;  // no power of two: those share cache lines

constexpr int64_t padded(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// How many units of so many products are worth a thread.
constexpr int64_t grain_of(int64_t products) {
  return std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, products));
}

// One head of q, k, v or of the result, [tokens, dims], of which one stride is 1.
template <class T>
struct Head {
  T* data;
  int64_t token_stride, dim_stride;

  Head from_token(int64_t token) const {
    return {data + token * token_stride, token_stride, dim_stride};
  }
};

// Of one head.
struct Sizes {
  int64_t tokens, dims;
  int64_t width;  // dims, padded to whole vectors
};

// The sizes of attention on qkv [N, 3C, ...].
struct Shape {
  int64_t batch, heads, tokens, dims;
  bool legacy;

  Shape(const Tensor& qkv, int64_t heads, bool legacy)
      : batch(qkv.size(0)),
        heads(heads),
        tokens(pixels_of(qkv)),
        dims(qkv.size(1) / (3 * heads)),
        legacy(legacy) {}

  Sizes sizes() const { return {tokens, dims, padded(dims, kPadding)}; }

  // Part 0, 1 or 2 (q, k or v) of one head of packed x.
  template <class T>
  Head<T> part(const Image& x, T* data, int64_t n, int64_t head, int64_t part) const {
    const int64_t group = legacy ? head * 3 + part : part * heads + head;
    return at(x, data, n, group * dims);
  }

  // One head of x [N, C, ...].
  template <class T>
  Head<T> whole(const Image& x, T* data, int64_t n, int64_t head) const {
    return at(x, data, n, head * dims);
  }

 private:
  template <class T>
  static Head<T> at(const Image& x, T* data, int64_t n, int64_t channel) {
    const int64_t channel_stride = x.rows ? 1 : x.pixels;
    return {data + n * x.batch_stride + channel * channel_stride, x.rows ? x.pixel_stride : 1,
            channel_stride};
  }
};

// A matrix of whole vectors in scratch memory; rows `pitch` apart.
template <class A>
struct Matrix {
  A* data;
  int64_t pitch;

  A* row(int64_t i) const { return data + i * pitch; }
};

// Owns uninitialised matrices whose rows start where vectors like to.
template <class A>
class Workspace {
 public:
  Matrix<A> matrix(int64_t rows, int64_t pitch) {
    void* memory = ::operator new(rows * pitch * sizeof(A), kAlignment);
    owned_.emplace_back(memory);
    return {static_cast<A*>(memory), pitch};
  }
  A* vector(int64_t size) { return matrix(1, size).data; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::vector<std::unique_ptr<void, Free>> owned_;
};

}  // namespace palette::cpu
