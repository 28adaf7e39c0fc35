// The inner loops of reverse_step, included once per instruction set by each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

template <bool kPart>
PALETTE_INLINE Floats get(const float* from, int64_t count) {
  return kPart ? load_part(from, count) : load(from);
}

template <bool kPart>
PALETTE_INLINE void put(float* to, int64_t count, Floats value) {
  if constexpr (kPart) {
    store_part(to, count, value);
  } else {
    store(to, value);
  }
}

template <bool kPart>
PALETTE_INLINE void advance_vector(const Run& run, const Row& row, int64_t at, int64_t count) {
  const Floats before = get<kPart>(run.state + at, count);
  const Floats output = get<kPart>(run.output + at, count);
  Floats x0 = row.a * before + row.b * output;
  x0 = x0 < -1.0f ? broadcast(-1.0f) : x0;  // NaN stays NaN
  x0 = x0 > 1.0f ? broadcast(1.0f) : x0;
  Floats y = row.c1 * x0 + row.c2 * before;
  if (run.history != nullptr) {
    y = y + row.c3 * get<kPart>(run.history + at, count);
    put<kPart>(run.history + at, count, x0);
  }
  if (run.noise != nullptr) y = y + row.sigma * get<kPart>(run.noise + at, count);
  if (run.mask != nullptr) {
    const Floats mask = get<kPart>(run.mask + at, count);
    y = get<kPart>(run.known + at, count) * (1.0f - mask) + mask * y;
  }
  put<kPart>(run.state + at, count, y);
}

PALETTE_LEAF void advance(const Run& run, const Row& row, int64_t count) {
  int64_t at = 0;
  for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) {
    advance_vector<false>(run, row, at, PALETTE_LANES);
  }
  if (at < count) advance_vector<true>(run, row, at, count - at);
}

// to[i] = from[i], rounded to To where that is the narrower one.
template <class From, class To>
PALETTE_INLINE void convert(const From* from, int64_t count, To* to) {
  int64_t at = 0;
  if constexpr (Lanes<From>::kLanes == Lanes<To>::kLanes) {
    for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) store(to + at, load(from + at));
  }
  for (; at < count; ++at) to[at] = static_cast<To>(from[at]);
}

// What is moved when a value is: the compiler makes vectors of integers, not of classes.
PALETTE_INLINE float& bits(float& value) { return value; }
PALETTE_INLINE double& bits(double& value) { return value; }
PALETTE_INLINE uint16_t& bits(BFloat16& value) { return value.x; }
PALETTE_INLINE uint16_t& bits(Half& value) { return value.x; }

// to[i] = from[i * step], in vectors for pictures of three channels.
template <class T>
PALETTE_INLINE void gather(T* __restrict__ from, int64_t step, int64_t count, T* __restrict__ to) {
  if (step == 3) {
    for (int64_t i = 0; i < count; ++i) bits(to[i]) = bits(from[3 * i]);
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) bits(to[i]) = bits(from[i * step]);
  }
}

// to[i * step] = from[i]
template <class T>
PALETTE_INLINE void scatter(T* __restrict__ from, int64_t count, T* __restrict__ to, int64_t step) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) bits(to[i * step]) = bits(from[i]);
}

template <class T>
PALETTE_LEAF void read(T* from, int64_t step, int64_t count, float* to) {
  if (step == 1) return convert(from, count, to);
  if constexpr (std::is_same_v<T, float>) {
    gather(from, step, count, to);
  } else {
    T near[kPixels];
    gather(from, step, count, near);
    convert(near, count, to);
  }
}

template <class T>
PALETTE_LEAF void write(float* from, int64_t count, T* to, int64_t step) {
  if (step == 1) return convert(from, count, to);
  if constexpr (std::is_same_v<T, float>) {
    scatter(from, count, to, step);
  } else {
    T near[kPixels];
    convert(from, count, near);
    scatter(near, count, to, step);
  }
}

#if PALETTE_LANES == 16
PALETTE_INLINE __m512i whole_vector(const float* from, float) { return _mm512_loadu_si512(from); }

PALETTE_INLINE __m512i whole_vector(const float* from, BFloat16) {
  return narrow_pair(load_pair(from));
}

PALETTE_INLINE __m512i whole_vector(const float* from, Half) {
  Half near[2 * PALETTE_LANES];
  store_pair(near, load_pair(from));
  return _mm512_loadu_si512(near);
}

// Of the words of kStep vectors that hold kStep channels side by side: which of two vectors of
// channels 0 and 1, one after the other, and of channel 2 each is, as far as the first three go.
template <class Word, int kStep>
struct Interleaving {
  static constexpr int kWords = 64 / sizeof(Word);
  Word place[kStep][kWords] = {};
  uint32_t all[kStep] = {}, last[kStep] = {};

  constexpr Interleaving() {
    for (int i = 0; i < kStep * kWords; ++i) {
      const int pixel = i / kStep, channel = i % kStep, vector = i / kWords, word = i % kWords;
      place[vector][word] = static_cast<Word>(channel == 1 ? kWords + pixel : pixel);
      all[vector] |= (channel < 3 ? 1u : 0u) << word;
      last[vector] |= (channel == 2 ? 1u : 0u) << word;
    }
  }
};

PALETTE_INLINE void store_words(float* to, __m512i a, __m512i b, __m512i c, __m512i place,
                                uint32_t all, uint32_t last) {
  const __m512i two = _mm512_permutex2var_epi32(a, place, b);
  const __m512i three = _mm512_mask_permutexvar_epi32(two, static_cast<__mmask16>(last), place, c);
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(all), three);
}

template <class T>
PALETTE_INLINE void store_words(T* to, __m512i a, __m512i b, __m512i c, __m512i place, uint32_t all,
                                uint32_t last) {
  const __m512i two = _mm512_permutex2var_epi16(a, place, b);
  const __m512i three = _mm512_mask_permutexvar_epi16(two, last, place, c);
  _mm512_mask_storeu_epi16(to, all, three);
}

template <class T, int kStep>
PALETTE_INLINE int64_t write_vectors(const float* const* from, int64_t count, T* to) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  static constexpr Interleaving<Word, kStep> kPlaces;
  constexpr int kWords = Interleaving<Word, kStep>::kWords;
  int64_t at = 0;
  for (; at + kWords <= count; at += kWords) {
    const __m512i a = whole_vector(from[0] + at, T()), b = whole_vector(from[1] + at, T()),
                  c = whole_vector(from[2] + at, T());
    for (int v = 0; v < kStep; ++v) {
      store_words(to + at * kStep + v * kWords, a, b, c, _mm512_loadu_si512(kPlaces.place[v]),
                  kPlaces.all[v], kPlaces.last[v]);
    }
  }
  return at;
}
#endif

template <class T>
PALETTE_LEAF void write_three(const float* const* from, int64_t count, T* to, int64_t step) {
  int64_t at = 0;
#if PALETTE_LANES == 16
  if constexpr (!std::is_same_v<T, double>) {
    if (step == 3) at = write_vectors<T, 3>(from, count, to);
    if (step == 6) at = write_vectors<T, 6>(from, count, to);
  }
#endif
  for (; at < count; ++at) {
    for (int c = 0; c < 3; ++c) to[at * step + c] = static_cast<T>(from[c][at]);
  }
}

template <class T>
constexpr Loops<T> kLoops = {advance, read<T>, write<T>, write_three<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
