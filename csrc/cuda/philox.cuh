// Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) and Box-Muller, with the counter layout that every backend shares.
//
// key      the image's 64-bit seed (low word, high word)
// counter  (element / 4, step, stream, layer), elements counted in [C, H, W] order of the image
//
// Words, uniforms and angles are bit-identical in every backend; the normals agree to a few ulp.
#pragma once

#include "cuda/launch.cuh"

namespace palette {

struct Words {
  uint32_t w[4];
};

__device__ __forceinline__ Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                        uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word as a float in (0, 1]. The product by a power of two is exact, so a fused multiply-add
// gives the same bits.
__device__ __forceinline__ float uniform(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}

// Two normals from two words.
__device__ __forceinline__ void box_muller(uint32_t first, uint32_t second, float* normals) {
  const float radius = sqrtf(-2.0f * logf(uniform(first)));
  const float angle = 6.28318530717958647692f * uniform(second);
  // Lets the compiler drop the range reduction for large angles, and its local memory.
  __builtin_assume(fabsf(angle) < 7.0f);
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  normals[0] = radius * cosine;
  normals[1] = radius * sine;
}

// The four normals of elements 4 * quad ... 4 * quad + 3.
__device__ __forceinline__ void normals_of(uint64_t seed, uint32_t quad, uint32_t step,
                                           uint32_t stream, uint32_t layer, float* normals) {
  const Words words = philox(quad, step, stream, layer, seed);
  box_muller(words.w[0], words.w[1], normals);
  box_muller(words.w[2], words.w[3], normals + 2);
}

}  // namespace palette
