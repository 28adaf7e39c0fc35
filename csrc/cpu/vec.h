// Vectors of floats in one instruction set: loads and stores of every dtype, fma, exp2.
//
// Included by each_isa.h once per instruction set, which names the set (PALETTE_ISA) and its width
// (PALETTE_LANES). Arithmetic is the compiler's vector extension; intrinsics only where it has
// none. float64 runs one lane at a time: it exists for gradient checks.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

typedef float Floats __attribute__((vector_size(4 * PALETTE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * PALETTE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * PALETTE_LANES)));

#if PALETTE_LANES == 16
// Every lane: GCC 12 warns of an undefined operand in the intrinsics that take no mask.
constexpr __mmask16 kAll = 0xffff;
#endif

// How one dtype is held in registers: Vector has kLanes elements of Scalar, in which all arithmetic
// is done.
template <class T>
struct Lanes {
  using Scalar = float;
  using Vector = Floats;
  static constexpr int kLanes = PALETTE_LANES;
};

template <>
struct Lanes<double> {
  using Scalar = double;
  using Vector = double;
  static constexpr int kLanes = 1;
};

PALETTE_INLINE Floats broadcast(float value) { return value - Floats{}; }
PALETTE_INLINE double broadcast(double value) { return value; }

PALETTE_INLINE double fma(double a, double b, double c) { return a * b + c; }

PALETTE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if PALETTE_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif PALETTE_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

PALETTE_INLINE Floats widen(Halves bits, BFloat16) {
#if PALETTE_LANES == 16
  const Words words =
      reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(kAll, reinterpret_cast<__m256i>(bits)));
#elif PALETTE_LANES == 8
  const Words words =
      reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  const Words words = __builtin_convertvector(bits, Words);
#endif
  return reinterpret_cast<Floats>(words << 16);
}

// The bfloat16 nearest to each value in the upper half of its word: ties to even, NaN stays NaN.
PALETTE_INLINE Words round(Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words nan = reinterpret_cast<Words>(value != value);
  return (bits + (((bits >> 16) & 1) + 0x7fff)) | nan;
}

PALETTE_INLINE Halves narrow(Floats value, BFloat16) {
#ifdef PALETTE_BF16
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(value));
#else
  const Words kept = round(value) >> 16;
#if PALETTE_LANES == 16
  return reinterpret_cast<Halves>(
      _mm512_maskz_cvtepi32_epi16(kAll, reinterpret_cast<__m512i>(kept)));
#elif PALETTE_LANES == 8
  const __m256i wide = reinterpret_cast<__m256i>(kept);
  return reinterpret_cast<Halves>(
      _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(kept, Halves);
#endif
#endif
}

PALETTE_INLINE Floats widen(Halves bits, Half) {
#if PALETTE_LANES == 16
  return _mm512_maskz_cvtph_ps(kAll, reinterpret_cast<__m256i>(bits));
#elif PALETTE_LANES == 8
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
  Floats value;
  for (int i = 0; i < PALETTE_LANES; ++i) value[i] = Half(bits[i], Half::from_bits());
  return value;
#endif
}

PALETTE_INLINE Halves narrow(Floats value, Half) {
#if PALETTE_LANES == 16
  return reinterpret_cast<Halves>(_mm512_maskz_cvtps_ph(kAll, value, _MM_FROUND_TO_NEAREST_INT));
#elif PALETTE_LANES == 8
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  Halves bits;
  for (int i = 0; i < PALETTE_LANES; ++i) bits[i] = Half(value[i]).x;
  return bits;
#endif
}

PALETTE_INLINE double load(const double* from) { return *from; }
PALETTE_INLINE void store(double* to, double value) { *to = value; }

PALETTE_INLINE Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

PALETTE_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }

template <class T>
PALETTE_INLINE Floats load(const T* from) {
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return widen(bits, T());
}

template <class T>
PALETTE_INLINE void store(T* to, Floats value) {
  const Halves bits = narrow(value, T());
  __builtin_memcpy(to, &bits, sizeof bits);
}

// Two adjacent vectors: cheaper at once where there is an instruction for it.
template <class V>
struct Pair {
  V low, high;
};

template <class T>
PALETTE_INLINE auto load_pair(const T* from) {
  return Pair<typename Lanes<T>::Vector>{load(from), load(from + Lanes<T>::kLanes)};
}

template <class T>
PALETTE_INLINE void store_pair(T* to, Pair<typename Lanes<T>::Vector> value) {
  store(to, value.low);
  store(to + Lanes<T>::kLanes, value.high);
}

#if PALETTE_LANES == 16
typedef uint16_t Halves2 __attribute__((vector_size(4 * PALETTE_LANES)));

// Each value's 16 bits moved straight to the upper half of its word.
PALETTE_INLINE Pair<Floats> load_pair(const BFloat16* from) {
  const Halves2 low = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i bits = _mm512_loadu_si512(from);
  const __m512i first = reinterpret_cast<__m512i>(low), last = reinterpret_cast<__m512i>(low + 16);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, first, bits)),
          _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, last, bits))};
}

PALETTE_INLINE __m512i narrow_pair(Pair<Floats> value) {
#ifdef PALETTE_BF16
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value.high, value.low));
#else
  const Halves2 upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                         33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(round(value.low)),
                                   reinterpret_cast<__m512i>(upper),
                                   reinterpret_cast<__m512i>(round(value.high)));
#endif
}

PALETTE_INLINE void store_pair(BFloat16* to, Pair<Floats> value) {
  _mm512_storeu_si512(to, narrow_pair(value));
}
#endif

// As store_pair, past the caches on 16 lanes: the lines of `to`, which starts one, are not read
// first, and what the caches hold stays there. Other threads see it after finish_stream().
template <class T>
PALETTE_INLINE void stream_pair(T* to, Pair<typename Lanes<T>::Vector> value) {
  store_pair(to, value);
}

PALETTE_INLINE void finish_stream() {
#if PALETTE_LANES == 16
  _mm_sfence();
#endif
}

#if PALETTE_LANES == 16
PALETTE_INLINE void stream_pair(float* to, Pair<Floats> value) {
  _mm512_stream_ps(to, value.low);
  _mm512_stream_ps(to + PALETTE_LANES, value.high);
}

PALETTE_INLINE void stream_pair(BFloat16* to, Pair<Floats> value) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), narrow_pair(value));
}

PALETTE_INLINE void stream_pair(Half* to, Pair<Floats> value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                      reinterpret_cast<__m256i>(narrow(value.low, Half())));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + PALETTE_LANES),
                      reinterpret_cast<__m256i>(narrow(value.high, Half())));
}
#endif

// The first `count` elements, the rest zero. Slower: for the end of a row.
template <class T>
PALETTE_INLINE typename Lanes<T>::Vector load_part(const T* from, int64_t count) {
  T buffer[Lanes<T>::kLanes] = {};
  __builtin_memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <class T>
PALETTE_INLINE void store_part(T* to, int64_t count, typename Lanes<T>::Vector value) {
  T buffer[Lanes<T>::kLanes];
  store(buffer, value);
  __builtin_memcpy(to, buffer, count * sizeof(T));
}

// scale * 2^f for f in [0, 1], minimax in relative error: to 7.5e-5, 2.6e-6 and, before rounding,
// 7.5e-8 for results that will be rounded once to bfloat16, float16 and float32. A constant scale
// costs nothing.
template <class T>
PALETTE_INLINE Floats exp2_fraction(Floats f, float scale = 1.0f) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Floats p = fma(broadcast(scale * 0.07802453f), f, broadcast(scale * 0.22606715f));
    p = fma(p, f, broadcast(scale * 0.69583354f));
    return fma(p, f, broadcast(scale * 0.9999252f));
  } else if constexpr (std::is_same_v<T, Half>) {
    Floats p = fma(broadcast(scale * 0.013534168f), f, broadcast(scale * 0.05201146f));
    p = fma(p, f, broadcast(scale * 0.24144276f));
    p = fma(p, f, broadcast(scale * 0.69300383f));
    return fma(p, f, broadcast(scale * 1.0000026f));
  } else {
    Floats p = fma(broadcast(scale * 0.0018775767f), f, broadcast(scale * 0.00898934f));
    p = fma(p, f, broadcast(scale * 0.055826318f));
    p = fma(p, f, broadcast(scale * 0.24015361f));
    p = fma(p, f, broadcast(scale * 0.6931531f));
    return fma(p, f, broadcast(scale * 0.99999994f));
  }
}

PALETTE_INLINE Floats floor(Floats t) {
#if PALETTE_LANES == 16
  return _mm512_maskz_roundscale_ps(kAll, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif PALETTE_LANES == 8
  return _mm256_floor_ps(t);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  return (t - 0.5f + magic) - magic;
#endif
}

// p * 2^floor(n) on 16 lanes; the narrow sets need a whole n in [-127, 128].
PALETTE_INLINE Floats scale_by_power(Floats p, Floats n) {
#if PALETTE_LANES == 16
  return _mm512_maskz_scalef_ps(kAll, p, n);
#else
  const Words bits = reinterpret_cast<Words>(n + 12583039.0f);  // 1.5 * 2^23 + 127
  return p * reinterpret_cast<Floats>(bits << 23);
#endif
}

// scale * 2^t for results that will be rounded once to T: far below zero 0 on 16 lanes, else
// 2^-126. In float64 scale * e^t: the library's exponential is exact, 2^t of a rounded product is
// not.
template <class T>
PALETTE_INLINE Floats scaled_power(Floats t, float scale) {
#if PALETTE_LANES == 16
  // The fraction of an infinity is 0.
  const Floats n = t;
  const Floats f = _mm512_maskz_reduce_ps(kAll, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  t = t < 128.0f ? t : broadcast(128.0f);
  t = t > -126.0f ? t : broadcast(-126.0f);
  const Floats n = floor(t), f = t - n;
#endif
  return scale_by_power(exp2_fraction<T>(f, scale), n);
}

template <class T>
PALETTE_INLINE double scaled_power(double t, double scale) {
  return scale * std::exp(t);
}

// Adjacent coefficients, or the same one for a whole run.
template <class A>
PALETTE_INLINE auto coefficient(const A* values, int64_t channel) {
  return load(values + channel);
}

PALETTE_INLINE auto coefficient(float value, int64_t) { return broadcast(value); }
PALETTE_INLINE auto coefficient(double value, int64_t) { return value; }

// Asks for the memory some way behind kBytes that are read now: what a processor asks for by itself
// ends with the page. A place behind the end of a tensor does no harm.
template <int kBytes>
PALETTE_INLINE void prefetch_behind(const void* from) {
  constexpr int kAhead = 4096;
  const uintptr_t at = reinterpret_cast<uintptr_t>(from) + kAhead;
  for (int byte = 0; byte < kBytes; byte += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + byte));
  }
}

// A vector, or with kPart only its first `count` elements.
template <class T, bool kPart>
PALETTE_INLINE auto load_row(const T* from, int64_t count) {
  if constexpr (kPart) {
    return load_part(from, count);
  } else {
    return load(from);
  }
}

// kVectors adjacent vectors; of a single one perhaps only the first `count` elements.
template <class T, int kVectors, bool kPart, class V>
PALETTE_INLINE void load_columns(const T* from, int64_t count, V (&to)[kVectors]) {
  constexpr int kLanes = Lanes<T>::kLanes;
  if constexpr (kVectors == 1) {
    to[0] = load_row<T, kPart>(from, count);
  } else {
    static_assert(kVectors % 2 == 0 && !kPart);
    for (int v = 0; v < kVectors; v += 2) {
      const auto pair = load_pair(from + v * kLanes);
      to[v] = pair.low;
      to[v + 1] = pair.high;
    }
  }
}

template <class T, bool kPart, class V>
PALETTE_INLINE void store_row(T* to, int64_t count, V value) {
  if constexpr (kPart) {
    store_part(to, count, value);
  } else {
    store(to, value);
  }
}

template <class T, int kVectors, bool kPart, bool kStream = false, class V>
PALETTE_INLINE void store_columns(T* to, int64_t count, const V (&from)[kVectors]) {
  constexpr int kLanes = Lanes<T>::kLanes;
  if constexpr (kVectors == 1) {
    store_row<T, kPart>(to, count, from[0]);
  } else {
    static_assert(kVectors % 2 == 0 && !kPart);
    for (int v = 0; v < kVectors; v += 2) {
      if constexpr (kStream) {
        stream_pair(to + v * kLanes, {from[v], from[v + 1]});
      } else {
        store_pair(to + v * kLanes, {from[v], from[v + 1]});
      }
    }
  }
}

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
