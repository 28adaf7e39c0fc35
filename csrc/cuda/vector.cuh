// Storage types, 16-byte vectors of them, and small parameters whose type is known at run time.
#pragma once

#include "cuda/launch.cuh"

namespace palette {

// The numbers are those of palette's host code and tests, not torch's.
enum Type : int32_t { kAbsent = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3, kFloat64 = 4 };

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void assign(float& target, float value) { target = value; }
__device__ __forceinline__ void assign(__half& target, float value) {
  target = __float2half_rn(value);
}
__device__ __forceinline__ void assign(__nv_bfloat16& target, float value) {
  target = __float2bfloat16_rn(value);
}

// V elements that move together; at most 16 bytes a machine access.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T values[V];
};

template <typename T, int V>
__device__ __forceinline__ void load(const T* source, float (&values)[V]) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(source);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = to_float(pack.values[v]);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* target, const float (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) assign(pack.values[v], values[v]);
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// Element i of an array whose type is known at run time.
__device__ __forceinline__ float read_as(Type type, const void* data, int64_t i) {
  switch (type) {
    case kFloat16:
      return to_float(static_cast<const __half*>(data)[i]);
    case kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case kFloat64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void write_as(Type type, void* data, int64_t i, float value) {
  switch (type) {
    case kFloat16:
      assign(static_cast<__half*>(data)[i], value);
      break;
    case kBFloat16:
      assign(static_cast<__nv_bfloat16*>(data)[i], value);
      break;
    case kFloat64:
      static_cast<double*>(data)[i] = value;
      break;
    default:
      static_cast<float*>(data)[i] = value;
  }
}

// A small array [columns] (row_stride 0) or [rows, columns], or nothing.
struct Parameter {
  void* data;
  int64_t row_stride;
  Type type;

  __device__ float read(int64_t row, int64_t column, float absent) const {
    return type == kAbsent ? absent : read_as(type, data, row * row_stride + column);
  }

  __device__ void write(int64_t row, int64_t column, float value) const {
    if (type != kAbsent) write_as(type, data, row * row_stride + column, value);
  }
};

}  // namespace palette
