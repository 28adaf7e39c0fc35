// Philox4x32-10 (Salmon et al., SC 2011) on vectors of counters. Included by the loops of each
// instruction set, after vec.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// Half as many words as Words, each in the lower half of a lane. The upper halves hold anything.
typedef uint64_t Longs __attribute__((vector_size(4 * PALETTE_LANES)));

// The whole products of the lower halves.
PALETTE_INLINE Longs product(Longs a, uint32_t factor) {
  const Longs b = uint64_t{factor} - Longs{};
#if PALETTE_LANES == 16
  return reinterpret_cast<Longs>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif PALETTE_LANES == 8
  return reinterpret_cast<Longs>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Longs>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * b;
#endif
}

struct Counters {
  Longs c[4];
};

PALETTE_INLINE Counters philox(Longs counter, const NoiseStream& s) {
  Longs c0 = counter, c1 = s.step - Longs{}, c2 = s.stream - Longs{}, c3 = s.layer - Longs{};
  uint32_t k0 = static_cast<uint32_t>(s.seed);
  uint32_t k1 = static_cast<uint32_t>(s.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Longs p0 = product(c0, 0xD2511F53u);
    const Longs p1 = product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of neighbouring lanes: those of `even` and `odd` in turn.
PALETTE_INLINE Words alternate(Longs even, Longs odd) {
  return reinterpret_cast<Words>((even & 0xffffffff) | (odd << 32));
}

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
