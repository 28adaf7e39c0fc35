// Vectors of floats in one instruction set: loads and stores of every dtype, fma, exp, SiLU.
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

// To nearest, ties to even; NaN stays NaN.
PALETTE_INLINE Halves narrow(Floats value, BFloat16) {
#ifdef PALETTE_BF16
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(value));
#else
  const Words bits = reinterpret_cast<Words>(value);
  const Words nan = reinterpret_cast<Words>(value != value);
  const Words kept = ((bits + (((bits >> 16) & 1) + 0x7fff)) | nan) >> 16;
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

// 2^f for f in [0, 1], to 2.6e-6; minimax in relative error.
PALETTE_INLINE Floats exp2_fraction(Floats f) {
  Floats p = fma(broadcast(0.013534168f), f, broadcast(0.05201146f));
  p = fma(p, f, broadcast(0.24144276f));
  p = fma(p, f, broadcast(0.69300383f));
  return fma(p, f, broadcast(1.0000026f));
}

// e^r for r in [0, ln 2], to 7.5e-8 before rounding; minimax in relative error.
PALETTE_INLINE Floats exp_fraction(Floats r) {
  Floats p = fma(broadcast(0.011734656f), r, broadcast(0.038942693f));
  p = fma(p, r, broadcast(0.16763419f));
  p = fma(p, r, broadcast(0.49984829f));
  p = fma(p, r, broadcast(1.0000085f));
  return fma(p, r, broadcast(0.9999999f));
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

// p * 2^n for whole n; the narrow sets need n in [-127, 128] and give 0 and infinity at the ends.
PALETTE_INLINE Floats scale_by_power(Floats p, Floats n) {
#if PALETTE_LANES == 16
  return _mm512_maskz_scalef_ps(kAll, p, n);
#else
  const Words bits = reinterpret_cast<Words>(n + 12583039.0f);  // 1.5 * 2^23 + 127
  return p * reinterpret_cast<Floats>(bits << 23);
#endif
}

// e^-z within 2 ulp for |z| < 87; 0 or less than 2^-125 above, infinity below. NaN may become a
// number.
PALETTE_INLINE Floats exp_minus(Floats z) {
  // Beyond these bounds the result is decided, and r would lose its meaning.
#if PALETTE_LANES == 16
  z = _mm512_maskz_range_ps(kAll, z, broadcast(104.0f), 2);  // smaller magnitude, sign of z
#else
  z = z < 87.3f ? z : broadcast(87.3f);
  z = z > -89.0f ? z : broadcast(-89.0f);
#endif
  const Floats n = floor(z * -1.44269504f);
  // ln 2 in two parts, the first so short that n times it is exact.
  Floats r = fma(n, broadcast(-0.693359375f), -z);
  r = fma(n, broadcast(2.12194440e-4f), r);
  return scale_by_power(exp_fraction(r), n);
}

// The same to 4e-6 for |z| < 20, enough before rounding to 16 bits.
PALETTE_INLINE Floats exp_minus_short(Floats z) {
  Floats t = z * -1.44269504f;
#if PALETTE_LANES == 16
  return _mm512_maskz_scalef_ps(kAll, exp2_fraction(t - floor(t)), t);
#else
  t = t < 128.0f ? t : broadcast(128.0f);
  t = t > -126.0f ? t : broadcast(-126.0f);
  const Floats n = floor(t);
  return scale_by_power(exp2_fraction(t - n), n);
#endif
}

// 1 + e^-z, as exact as results of dtype T need it.
template <class T>
PALETTE_INLINE Floats one_plus_exp_minus(Floats z) {
  return 1.0f + (sizeof(T) == 4 ? exp_minus(z) : exp_minus_short(z));
}

template <class T>
PALETTE_INLINE double one_plus_exp_minus(double z) {
  return 1.0 + std::exp(-z);
}

// Adjacent coefficients, or the same one for a whole run.
template <class A>
PALETTE_INLINE auto coefficient(const A* values, int64_t channel) {
  return load(values + channel);
}

PALETTE_INLINE auto coefficient(float value, int64_t) { return broadcast(value); }
PALETTE_INLINE auto coefficient(double value, int64_t) { return value; }

template <class T, bool kPart>
PALETTE_INLINE auto load_row(const T* from, int64_t count) {
  if constexpr (kPart) {
    return load_part(from, count);
  } else {
    return load(from);
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

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
