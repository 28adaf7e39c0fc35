// The inner loops of the gradients of group_norm_silu, included once per instruction set by
// each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// Values added up one after the other before they join a longer sum.
constexpr int64_t kRunLength = 64;

// dz = grad * silu'(z).
template <class T, bool kSilu, class V>
PALETTE_INLINE V through_silu(V grad, V z) {
  if constexpr (kSilu) {
    const V gate = 1.0f / one_plus_exp_minus<T>(z);
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
      const T* from = x.data + row * x.stride + at;
      const T* gradient = grad.data + row * grad.stride + at;
      for (int v = 0; v < kVectors; ++v) {
        const V d = load_row<T, kPart>(from + v * kLanes, count) - center[v];
        const V dz = through_silu<T, kSilu>(load_row<T, kPart>(gradient + v * kLanes, count),
                                            fma(d, gain[v], offset[v]));
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

template <class T, bool kSilu, bool kPart, class C>
PALETTE_INLINE void input_vector(const T* grad, const T* x, T* dx, int64_t at, int64_t count,
                                 const Affine<C>& by) {
  const auto gain = coefficient(by.gain, at);
  const auto d = load_row<T, kPart>(x + at, count) - coefficient(by.center, at);
  const auto dz = through_silu<T, kSilu>(load_row<T, kPart>(grad + at, count),
                                         fma(d, gain, coefficient(by.offset, at)));
  const auto mean_part = fma(d, coefficient(by.slope, at), coefficient(by.base, at));
  store_row<T, kPart>(dx + at, count, fma(dz, gain, mean_part));
}

template <class T, bool kSilu, class C>
PALETTE_INLINE void input_row(const T* grad, const T* x, T* dx, int64_t width,
                              const Affine<C>& by) {
  constexpr int kLanes = Lanes<T>::kLanes;
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    input_vector<T, kSilu, false>(grad, x, dx, at, kLanes, by);
  }
  if (at < width) input_vector<T, kSilu, true>(grad, x, dx, at, width - at, by);
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
