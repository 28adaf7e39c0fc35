// The inner loops of noise, included once per instruction set by each_isa.h.

#include "cpu/philox.h"

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

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

struct TwoNormals {
  float first, second;
};

// sqrt(-2 ln u1) times the cosine and the sine of 2 pi u2.
PALETTE_INLINE TwoNormals box_muller(uint32_t word1, uint32_t word2) {
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
template <class T>
PALETTE_LEAF void fill(const NoiseStream& stream, uint32_t counter, float* __restrict__ out) {
  uint32_t words[4][kCounters];
  Longs even;
  for (int l = 0; l < PALETTE_LANES / 2; ++l) even[l] = counter + 2u * static_cast<uint32_t>(l);
  for (int64_t i = 0; i < kCounters; i += PALETTE_LANES) {
    const Longs first = even + static_cast<uint64_t>(i);
    const Counters a = philox(first, stream), b = philox(first + 1, stream);
    for (int j = 0; j < 4; ++j) {
      const Words both = alternate(a.c[j], b.c[j]);
      __builtin_memcpy(&words[j][i], &both, sizeof both);
    }
  }
  for (int64_t i = 0; i < kCounters; ++i) {
    const TwoNormals a = box_muller(words[0][i], words[1][i]);
    const TwoNormals b = box_muller(words[2][i], words[3][i]);
    out[4 * i] = a.first;
    out[4 * i + 1] = a.second;
    out[4 * i + 2] = b.first;
    out[4 * i + 3] = b.second;
  }
}

template <class T>
constexpr Loops<T> kLoops = {fill<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
