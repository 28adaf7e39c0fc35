// Products of small matrices by a warp: tensor cores where the GPU has them for the type, the same
// fragments by warp exchanges elsewhere.
//
// A warp multiplies a 16x16 matrix A by a 16x8 matrix B. With g = lane / 4 and t = lane % 4 a lane
// holds, in pairs of neighbours along the dimension that is summed,
//     A[g][2t], A[g + 8][2t], A[g][2t + 8], A[g + 8][2t + 8]     B[2t][g], B[2t + 8][g]
// and of the result D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]: the layout of the PTX
// instruction mma.m16n8k16. The instruction itself is proven on a GPU only; the form by exchanges,
// which float32 and bfloat16 on sm_75 take, and all that is built on either, is proven on the CPU.
#pragma once

#include "cuda/vector.cuh"

namespace palette {

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

template <typename T>
__device__ __forceinline__ Pair<T> pair_of(float x, float y) {
  Pair<T> pair;
  assign(pair.x, x);
  assign(pair.y, y);
  return pair;
}

template <typename T>
__device__ __forceinline__ Pair<T> from_lane(const Pair<T>& own, int lane) {
  using Word = std::conditional_t<sizeof(T) == 2, unsigned, unsigned long long>;
  static_assert(sizeof(Word) == sizeof(Pair<T>));
  Pair<T> other;
  const Word word = __shfl_sync(0xffffffffu, reinterpret_cast<const Word&>(own), lane);
  reinterpret_cast<Word&>(other) = word;
  return other;
}

template <typename T>
__device__ __forceinline__ float dot(const Pair<T>& a, const Pair<T>& b) {
  return to_float(a.x) * to_float(b.x) + to_float(a.y) * to_float(b.y);
}

// d += A B, by warp exchanges.
template <typename T>
__device__ __forceinline__ void multiply_add_by_exchange(float (&d)[4], const Pair<T> (&a)[4],
                                                         const Pair<T> (&b)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {  // neighbours 2k, 2k + 1 of either half of the summed dimension
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pair<T> upper = from_lane(a[2 * half], lane / 4 * 4 + k);
      const Pair<T> lower = from_lane(a[2 * half + 1], lane / 4 * 4 + k);
      const Pair<T> left = from_lane(b[half], lane % 4 * 2 * 4 + k);
      const Pair<T> right = from_lane(b[half], (lane % 4 * 2 + 1) * 4 + k);
      d[0] += dot(upper, left);
      d[1] += dot(upper, right);
      d[2] += dot(lower, left);
      d[3] += dot(lower, right);
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Pair<T> (&a)[4],
                                             const Pair<T> (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  if constexpr (sizeof(T) == 2) {
    const auto word = [](const Pair<T>& pair) { return reinterpret_cast<const unsigned&>(pair); };
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, __half>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(word(a[0])), "r"(word(a[1])), "r"(word(a[2])), "r"(word(a[3])), "r"(word(b[0])),
            "r"(word(b[1])));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(word(a[0])), "r"(word(a[1])), "r"(word(a[2])), "r"(word(a[3])), "r"(word(b[0])),
            "r"(word(b[1])));
    }
    return;
#else
    if constexpr (std::is_same_v<T, __half>) {  // sm_75: half of the sum at a time
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(word(a[2 * half])), "r"(word(a[2 * half + 1])), "r"(word(b[half])));
      }
      return;
    }
#endif
  }
#endif
  multiply_add_by_exchange(d, a, b);
}

}  // namespace palette
