// The inner loops of dropout, included once per instruction set by each_isa.h.

#include "cpu/philox.h"

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

#ifdef PALETTE_BF16

// The instruction that rounds to bfloat16 makes zeros of the smallest numbers, and no other set has
// it: without it all sets give the same bits.
template <class T>
constexpr Loops<T> kLoops = avx512::kLoops<T>;

#else

// Neighbouring elements, PALETTE_LANES of them or, with kPart, the first `count`: those whose words
// are not below drop.first are scaled, the others are zero.
template <class T, bool kPart>
PALETTE_INLINE void keep(const Drop& drop, Words words, const T* from, int64_t count, T* to) {
  if constexpr (Lanes<T>::kLanes == 1) {
    for (int64_t i = 0; i < (kPart ? count : PALETTE_LANES); ++i) {
      to[i] = words[i] >= drop.first ? from[i] * static_cast<T>(drop.scale) : T(0);
    }
  } else {
    const Floats scaled = load_row<T, kPart>(from, count) * static_cast<float>(drop.scale);
    store_row<T, kPart>(to, count, words >= drop.first ? scaled : Floats{});
  }
}

// The lower or upper of each two lanes, from `a` and `b` in turn.
PALETTE_INLINE Words lower(Words a, Words b) {
#if PALETTE_LANES == 16
  return reinterpret_cast<Words>(_mm512_maskz_unpacklo_epi64(0xff, reinterpret_cast<__m512i>(a),
                                                             reinterpret_cast<__m512i>(b)));
#elif PALETTE_LANES == 8
  return reinterpret_cast<Words>(
      _mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return Words{a[0], a[1], b[0], b[1]};
#endif
}

PALETTE_INLINE Words upper(Words a, Words b) {
#if PALETTE_LANES == 16
  return reinterpret_cast<Words>(_mm512_maskz_unpackhi_epi64(0xff, reinterpret_cast<__m512i>(a),
                                                             reinterpret_cast<__m512i>(b)));
#elif PALETTE_LANES == 8
  return reinterpret_cast<Words>(
      _mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return Words{a[2], a[3], b[2], b[3]};
#endif
}

template <class T>
PALETTE_LEAF void keep_run(const Drop& drop, uint32_t counter, const T* from, int64_t count,
                           T* to) {
  constexpr int kLanes = PALETTE_LANES, kBoth = 2 * kLanes;
  // Lanes 0, 2, ... have the first counters, so that `lower` gives neighbours.
  Longs counters;
  for (int l = 0; l < kLanes / 2; ++l) {
    counters[l] = counter + static_cast<uint32_t>(l % 2 * (kLanes / 4) + l / 2);
  }
  for (int64_t at = 0; at < count; at += kBoth, counters += uint64_t{kLanes / 2}) {
    const Counters words = philox(counters, drop.stream);
    const Words front = alternate(words.c[0], words.c[1]);
    const Words back = alternate(words.c[2], words.c[3]);
    const Words first = lower(front, back), second = upper(front, back);
    const int64_t left = count - at;
    if (left >= kBoth) {
      keep<T, false>(drop, first, from + at, kLanes, to + at);
      keep<T, false>(drop, second, from + at + kLanes, kLanes, to + at + kLanes);
    } else {
      keep<T, true>(drop, first, from + at, std::min<int64_t>(left, kLanes), to + at);
      if (left > kLanes) {
        keep<T, true>(drop, second, from + at + kLanes, left - kLanes, to + at + kLanes);
      }
    }
  }
}

template <class T>
PALETTE_LEAF void keep_rows(const Drop& drop, const Quads& quads, const T* from, T* to) {
  constexpr int kLanes = PALETTE_LANES;
  const int64_t channels = quads.channels;
  const uint64_t step = static_cast<uint64_t>(quads.plane);  // from a channel's counter to the next
  Longs even;                                                // of channels 0, 2, ...
  for (int l = 0; l < kLanes / 2; ++l) even[l] = static_cast<uint64_t>(quads.first) + 2 * l * step;
  for (int64_t quad = 0; quad < quads.count; ++quad, even += uint64_t{1}) {
    Longs counters = even;
    for (int64_t c = 0; c < channels; c += kLanes, counters += kLanes * step) {
      const Counters a = philox(counters, drop.stream), b = philox(counters + step, drop.stream);
      const int64_t left = channels - c;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t pixel = 4 * quad + j;
        const Words words = alternate(a.c[j], b.c[j]);
        const T* row = from + pixel * quads.from_stride + c;
        if (left >= kLanes) {
          keep<T, false>(drop, words, row, kLanes, to + pixel * channels + c);
        } else {
          keep<T, true>(drop, words, row, left, to + pixel * channels + c);
        }
      }
    }
  }
}

template <class T>
constexpr Loops<T> kLoops = {keep_run<T>, keep_rows<T>};

#endif

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
