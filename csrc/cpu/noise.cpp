// palette::noise on the CPU: Philox4x32-10 words (Salmon et al., SC 2011) and Box-Muller normals.
//
// The counters of a run are worked on side by side, in loops without branches that the compiler
// turns into vector code, once for each instruction set. No step is contracted or reordered, so the
// instruction sets agree in every bit.

#include "cpu/noise.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/ops.h"

namespace palette::cpu {
namespace {

#define PALETTE_INLINE inline __attribute__((always_inline))

struct Words {
  uint32_t w[4];
};

PALETTE_INLINE Words philox(uint32_t counter, const NoiseStream& s) {
  uint32_t c0 = counter, c1 = s.step, c2 = s.stream, c3 = s.layer;
  uint32_t k0 = static_cast<uint32_t>(s.seed);
  uint32_t k1 = static_cast<uint32_t>(s.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word as a float in (0, 1].
PALETTE_INLINE float uniform(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}

// Natural logarithm for u in [2^-33, 1], to 1 ulp. u = m 2^e with m in [sqrt(1/2), sqrt(2)), and
// log(1 + f) = f - f^2/2 + f^3 p(f) with p minimax in relative error (0.1 * 2^-24).
PALETTE_INLINE float logarithm(float u) {
  const int32_t bits = std::bit_cast<int32_t>(u);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = std::bit_cast<float>(bits - (exponent << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = -0x1.38a8bep-4f;
  p = p * f + 0x1.055e00p-3f;
  p = p * f - 0x1.0d88b6p-3f;
  p = p * f + 0x1.22da00p-3f;
  p = p * f - 0x1.5471eep-3f;
  p = p * f + 0x1.99a006p-3f;
  p = p * f - 0x1.000228p-2f;
  p = p * f + 0x1.555554p-2f;
  const float square = f * f;
  const float small = e * 0x1.7f7d1cp-20f + (square * f * p - 0.5f * square);
  return (small + f) + e * 0x1.62e4p-1f;  // ln 2 in two parts, the product with the first exact
}

struct Pair {
  float first, second;
};

// sqrt(-2 ln u1) times the cosine and the sine of 2 pi u2.
PALETTE_INLINE Pair box_muller(uint32_t word1, uint32_t word2) {
  const float radius = std::sqrt(-2.0f * logarithm(uniform(word1)));
  const float angle = 6.28318530717958647692f * uniform(word2);
  // angle = quadrant * pi/2 + r with |r| <= pi/4. pi/2 is in three parts of 20 bits and the rest:
  // the first difference is exact, and the second where it cancels.
  const int32_t quadrant = static_cast<int32_t>(angle * 0.63661977f + 0.5f);
  const float q = static_cast<float>(quadrant);
  const float r = ((angle - q * 0x1.921fap+0f) - q * 0x1.54442p-20f) - q * 0x1.a308d4p-41f;
  const float t = r * r;
  float sine = -0x1.994dd6p-13f;
  sine = sine * t + 0x1.11075ep-7f;
  sine = sine * t - 0x1.555546p-3f;
  sine = sine * t * r + r;
  float cosine = 0x1.9a0194p-16f;
  cosine = cosine * t - 0x1.6c0c8ap-10f;
  cosine = cosine * t + 0x1.55554ap-5f;
  cosine = cosine * t * t - 0.5f * t + 1.0f;
  const bool swap = (quadrant & 1) != 0;
  const uint32_t flip_cosine = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
  const uint32_t flip_sine = static_cast<uint32_t>(quadrant & 2) << 30;
  const float c = swap ? sine : cosine;
  const float s = swap ? cosine : sine;
  return {radius * std::bit_cast<float>(std::bit_cast<uint32_t>(c) ^ flip_cosine),
          radius * std::bit_cast<float>(std::bit_cast<uint32_t>(s) ^ flip_sine)};
}

// The kNormals normals of the counters from `counter` on.
PALETTE_INLINE void fill(const NoiseStream& stream, uint32_t counter, float* __restrict__ out) {
  uint32_t words[4][kCounters];
  for (int64_t i = 0; i < kCounters; ++i) {
    const Words made = philox(counter + static_cast<uint32_t>(i), stream);
    for (int j = 0; j < 4; ++j) words[j][i] = made.w[j];
  }
  for (int64_t i = 0; i < kCounters; ++i) {
    const Pair a = box_muller(words[0][i], words[1][i]);
    const Pair b = box_muller(words[2][i], words[3][i]);
    out[4 * i] = a.first;
    out[4 * i + 1] = a.second;
    out[4 * i + 2] = b.first;
    out[4 * i + 3] = b.second;
  }
}

void fill_baseline(const NoiseStream& stream, uint32_t counter, float* out) {
  fill(stream, counter, out);
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) void fill_avx2(const NoiseStream& stream, uint32_t counter,
                                               float* out) {
  fill(stream, counter, out);
}

__attribute__((target("avx512f,avx512dq"))) void fill_avx512(const NoiseStream& stream,
                                                             uint32_t counter, float* out) {
  fill(stream, counter, out);
}

#endif

}  // namespace

FillNoise choose_fill(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return fill_avx512;
  if (isa == Isa::avx2) return fill_avx2;
#endif
  (void)isa;
  return fill_baseline;
}

Tensor noise(const Tensor& seeds, const Tensor& step, const std::vector<int64_t>& shape,
             int64_t stream, int64_t layer) {
  const Tensor keys = torch::stable::contiguous(seeds);
  const Tensor steps = torch::stable::contiguous(step);
  const int64_t images = keys.numel();
  STD_TORCH_CHECK(steps.numel() == 1 || steps.numel() == images, "noise: step has ", steps.numel(),
                  " elements, wanted 1 or ", images);
  std::vector<int64_t> sizes{images};
  int64_t elements = 1;
  for (const int64_t size : shape) {
    sizes.push_back(size);
    elements *= size;
  }
  Tensor out = torch::stable::new_empty(keys, sizes, torch::headeronly::ScalarType::Float);
  if (images * elements == 0) return out;

  const FillNoise fill_run = choose_fill(current_isa());
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int64_t* step_of = steps.const_data_ptr<int64_t>();
  const int64_t step_stride = steps.numel() == 1 ? 0 : 1;
  float* target = out.mutable_data_ptr<float>();
  const int64_t runs = (elements + kNormals - 1) / kNormals;
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / runs;
      const int64_t first = i % runs * kNormals;
      const NoiseStream one{static_cast<uint64_t>(key[image]),
                            static_cast<uint32_t>(step_of[image * step_stride]),
                            static_cast<uint32_t>(stream), static_cast<uint32_t>(layer)};
      float* place = target + image * elements + first;
      if (first + kNormals <= elements) {
        fill_run(one, static_cast<uint32_t>(first / 4), place);
      } else {
        float last[kNormals];
        fill_run(one, static_cast<uint32_t>(first / 4), last);
        std::copy_n(last, elements - first, place);
      }
    }
  };
  constexpr int64_t kRunsPerTask = 32;  // 8192 normals, about 8 us of work
  torch::stable::parallel_for(0, images * runs, kRunsPerTask, work);
  return out;
}

}  // namespace palette::cpu
