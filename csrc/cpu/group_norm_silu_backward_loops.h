// The inner loops of the gradients of group_norm_silu, included once per instruction set by
// each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// Values added up one after the other before they join a longer sum.
constexpr int64_t kRunLength = 64;

// The dtype whose precision SiLU needs here: in sums over many values that of bfloat16 would show.
template <class T>
using Precise = std::conditional_t<std::is_same_v<T, BFloat16>, Half, T>;

// dz = grad * silu'(z).
template <class T, bool kSilu, class V>
PALETTE_INLINE V through_silu(V grad, V z) {
  if constexpr (kSilu) {
    using A = Wide<T>;
    const V gate = A(1) / (A(1) + scaled_power<Precise<T>>(z * kExponent<A>, A(1)));
    return grad * (gate * fma(z, 1.0f - gate, broadcast(Wide<T>(1))));
  } else {
    return grad;
  }
}

template <class T, bool kSilu, int kVectors, bool kPart, class C>
PALETTE_INLINE void sums_of_columns(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t at,
                                    int64_t count, const Affine<C>& by, Wide<T>* dz_sum,
                                    Wide<T>* dz_d_sum) {
  using V = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kLanes;
  V p[kVectors] = {}, q[kVectors] = {}, center[kVectors], gain[kVectors], offset[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    center[v] = coefficient(by.center, at + v * kLanes);
    gain[v] = coefficient(by.gain, at + v * kLanes);
    offset[v] = coefficient(by.offset, at + v * kLanes);
  }
  for (int64_t begin = 0; begin < rows; begin += kRunLength) {
    const int64_t end = begin + kRunLength < rows ? begin + kRunLength : rows;
    V part_p[kVectors] = {}, part_q[kVectors] = {};
    for (int64_t row = begin; row < end; ++row) {
      V values[kVectors], gradient[kVectors];
      load_columns<T, kVectors, kPart>(x.data + row * x.stride + at, count, values);
      load_columns<T, kVectors, kPart>(grad.data + row * grad.stride + at, count, gradient);
      for (int v = 0; v < kVectors; ++v) {
        const V d = values[v] - center[v];
        const V dz = through_silu<T, kSilu>(gradient[v], fma(d, gain[v], offset[v]));
        part_p[v] += dz;
        part_q[v] = fma(dz, d, part_q[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      p[v] += part_p[v];
      q[v] += part_q[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store_row<Wide<T>, kPart>(dz_sum + v * kLanes, count, p[v]);
    store_row<Wide<T>, kPart>(dz_d_sum + v * kLanes, count, q[v]);
  }
}

template <class T, bool kSilu>
PALETTE_INLINE void sums_as(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t width,
                            const Affine<Wide<T>*>& by, Wide<T>* dz, Wide<T>* dz_d) {
  constexpr int kLanes = Lanes<T>::kLanes;
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    sums_of_columns<T, kSilu, 2, false>(grad, x, rows, c, kLanes, by, dz + c, dz_d + c);
  }
  for (; c + kLanes <= width; c += kLanes) {
    sums_of_columns<T, kSilu, 1, false>(grad, x, rows, c, kLanes, by, dz + c, dz_d + c);
  }
  if (c < width) {
    sums_of_columns<T, kSilu, 1, true>(grad, x, rows, c, width - c, by, dz + c, dz_d + c);
  }
}

template <class T>
PALETTE_LEAF void sums(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t width,
                       Affine<Wide<T>*> by, bool silu, Wide<T>* dz, Wide<T>* dz_d) {
  if (silu) {
    sums_as<T, true>(grad, x, rows, width, by, dz, dz_d);
  } else {
    sums_as<T, false>(grad, x, rows, width, by, dz, dz_d);
  }
}

template <class T, bool kSilu>
PALETTE_INLINE void sums_run_as(const T* grad, const T* x, int64_t count, const Affine<Wide<T>>& by,
                                Wide<T>* dz, Wide<T>* dz_d) {
  constexpr int kLanes = Lanes<T>::kLanes;
  constexpr int64_t kWidth = 2 * kLanes;
  Wide<T> p[kWidth] = {}, q[kWidth] = {};
  const int64_t rows = count / kWidth;
  if (rows > 0) {
    sums_of_columns<T, kSilu, 2, false>({grad, kWidth}, {x, kWidth}, rows, 0, kLanes, by, p, q);
  }
  double total_p = 0.0, total_q = 0.0;
  for (int i = 0; i < kWidth; ++i) {
    total_p += p[i];
    total_q += q[i];
  }
  for (int64_t at = rows * kWidth; at < count; at += kLanes) {
    const int64_t rest = count - at < kLanes ? count - at : kLanes;
    sums_of_columns<T, kSilu, 1, true>({grad + at, 0}, {x + at, 0}, 1, 0, rest, by, p, q);
    for (int i = 0; i < rest; ++i) {
      total_p += p[i];
      total_q += q[i];
    }
  }
  *dz = static_cast<Wide<T>>(total_p);
  *dz_d = static_cast<Wide<T>>(total_q);
}

template <class T>
PALETTE_LEAF void sums_run(const T* grad, const T* x, int64_t count, Affine<Wide<T>> by, bool silu,
                           Wide<T>* dz, Wide<T>* dz_d) {
  if (silu) {
    sums_run_as<T, true>(grad, x, count, by, dz, dz_d);
  } else {
    sums_run_as<T, false>(grad, x, count, by, dz, dz_d);
  }
}

template <class T, bool kSilu, class V, class C>
PALETTE_INLINE V input_of(V grad, V x, const Affine<C>& by, int64_t at) {
  const V gain = coefficient(by.gain, at), d = x - coefficient(by.center, at);
  const V dz = through_silu<T, kSilu>(grad, fma(d, gain, coefficient(by.offset, at)));
  return fma(dz, gain, fma(d, coefficient(by.slope, at), coefficient(by.base, at)));
}

template <class T, bool kSilu, class C>
PALETTE_INLINE void input_row(const T* grad, const T* x, T* dx, int64_t width,
                              const Affine<C>& by) {
  constexpr int kLanes = Lanes<T>::kLanes;
  int64_t at = 0;
  for (; at + 2 * kLanes <= width; at += 2 * kLanes) {
    const auto gradient = load_pair(grad + at), values = load_pair(x + at);
    store_pair(dx + at, {input_of<T, kSilu>(gradient.low, values.low, by, at),
                         input_of<T, kSilu>(gradient.high, values.high, by, at + kLanes)});
  }
  if (at + kLanes <= width) {
    store(dx + at, input_of<T, kSilu>(load(grad + at), load(x + at), by, at));
    at += kLanes;
  }
  if (at < width) {
    const int64_t rest = width - at;
    store_part(dx + at, rest,
               input_of<T, kSilu>(load_part(grad + at, rest), load_part(x + at, rest), by, at));
  }
}

template <class T>
PALETTE_LEAF void input(Rows<const T> grad, Rows<const T> x, Rows<T> dx, int64_t rows,
                        int64_t width, Affine<Wide<T>*> by, bool silu) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* gradient = grad.data + row * grad.stride;
    const T* from = x.data + row * x.stride;
    T* to = dx.data + row * dx.stride;
    if (silu) {
      input_row<T, true>(gradient, from, to, width, by);
    } else {
      input_row<T, false>(gradient, from, to, width, by);
    }
  }
}

template <class T>
PALETTE_LEAF void input_run(const T* grad, const T* x, T* dx, int64_t count, Affine<Wide<T>> by,
                            bool silu) {
  if (silu) {
    input_row<T, true>(grad, x, dx, count, by);
  } else {
    input_row<T, false>(grad, x, dx, count, by);
  }
}

template <class T>
constexpr Loops<T> kLoops = {sums<T>, sums_run<T>, input<T>, input_run<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
