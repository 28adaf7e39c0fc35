// The inner loops of group_norm_silu, included once per instruction set by each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// Values added up one after the other before they join a longer sum.
constexpr int64_t kRunLength = 64;
constexpr int64_t kShiftRows = 8;
constexpr int64_t kColumns = 4;  // vectors of channels that one pass over the rows sums up

// Per channel of kVectors vectors: a shift near its mean, and over all rows the sums of the
// deviations from it and of their squares. The shift is the mean of the first rows: its distance
// from the mean of all is at most sqrt(rows / kShiftRows) standard deviations, whatever the data,
// so the sums lose no more than that ratio when the mean is taken out of them.
template <class T, int kVectors, bool kPart>
PALETTE_INLINE void moments_of_columns(Rows<const T> x, int64_t rows, int64_t count, Wide<T>* shift,
                                       Wide<T>* sum, Wide<T>* square) {
  using V = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kLanes;
  const int64_t first = rows < kShiftRows ? rows : kShiftRows;
  V center[kVectors] = {}, total[kVectors] = {}, squares[kVectors] = {};
  for (int64_t row = 0; row < first; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      center[v] += load_row<T, kPart>(x.data + row * x.stride + v * kLanes, count);
    }
  }
  for (int v = 0; v < kVectors; ++v) center[v] /= static_cast<Wide<T>>(first);
  for (int64_t begin = 0; begin < rows; begin += kRunLength) {
    const int64_t end = begin + kRunLength < rows ? begin + kRunLength : rows;
    V part[kVectors] = {}, part_squares[kVectors] = {};
    for (int64_t row = begin; row < end; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        const V d = load_row<T, kPart>(x.data + row * x.stride + v * kLanes, count) - center[v];
        part[v] += d;
        part_squares[v] = fma(d, d, part_squares[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      total[v] += part[v];
      squares[v] += part_squares[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store_row<Wide<T>, kPart>(shift + v * kLanes, count, center[v]);
    store_row<Wide<T>, kPart>(sum + v * kLanes, count, total[v]);
    store_row<Wide<T>, kPart>(square + v * kLanes, count, squares[v]);
  }
}

// Moments over `columns` columns of `rows` values each, from their shifted sums.
template <class A>
PALETTE_INLINE Moments fold(const A* shift, const A* sum, const A* square, int64_t columns,
                            int64_t rows) {
  const double inverse = 1.0 / static_cast<double>(rows);
  double total = 0.0;
  for (int64_t c = 0; c < columns; ++c) total += shift[c] + sum[c] * inverse;
  const double mean = total / static_cast<double>(columns);
  double m2 = 0.0;
  for (int64_t c = 0; c < columns; ++c) {
    const double step = sum[c] * inverse, d = shift[c] + step - mean;
    m2 += (square[c] - sum[c] * step) + d * d * static_cast<double>(rows);
  }
  return {mean, m2};
}

template <class T>
PALETTE_LEAF void moments(Rows<const T> x, int64_t rows, int64_t width, int64_t groups,
                          Wide<T>* scratch, Moments* out, int64_t pitch) {
  constexpr int kLanes = Lanes<T>::kLanes;
  Wide<T>*shift = scratch, *sum = scratch + width, *square = scratch + 2 * width;
  int64_t c = 0;
  for (; c + kColumns * kLanes <= width; c += kColumns * kLanes) {
    moments_of_columns<T, kColumns, false>({x.data + c, x.stride}, rows, kLanes, shift + c, sum + c,
                                           square + c);
  }
  for (; c + kLanes <= width; c += kLanes) {
    moments_of_columns<T, 1, false>({x.data + c, x.stride}, rows, kLanes, shift + c, sum + c,
                                    square + c);
  }
  if (c < width) {
    moments_of_columns<T, 1, true>({x.data + c, x.stride}, rows, width - c, shift + c, sum + c,
                                   square + c);
  }
  const int64_t channels = width / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * channels;
    out[g * pitch] = fold(shift + at, sum + at, square + at, channels, rows);
  }
}

// A run is a matrix of kColumns vectors and as many rows as fit, and a remainder.
template <class T>
PALETTE_LEAF Moments moments_run(const T* x, int64_t count) {
  constexpr int64_t kWidth = kColumns * Lanes<T>::kLanes;
  const int64_t rows = count / kWidth, whole = rows * kWidth, rest = count - whole;
  Wide<T> shift[kWidth], sum[kWidth], square[kWidth];
  Moments result = {0.0, 0.0};
  if (rows > 0) {
    moments_of_columns<T, kColumns, false>({x, kWidth}, rows, kWidth, shift, sum, square);
    result = fold(shift, sum, square, kWidth, rows);
  }
  if (rest > 0) {
    double mean = 0.0, m2 = 0.0;
    for (int64_t i = whole; i < count; ++i) mean += static_cast<Wide<T>>(x[i]);
    mean /= static_cast<double>(rest);
    for (int64_t i = whole; i < count; ++i) {
      const double d = static_cast<Wide<T>>(x[i]) - mean;
      m2 += d * d;
    }
    const double step = mean - result.mean, n = static_cast<double>(count);
    result.m2 += m2 + step * step * static_cast<double>(whole) * static_cast<double>(rest) / n;
    result.mean += step * static_cast<double>(rest) / n;
  }
  return result;
}

template <class T, bool kSilu, bool kPart, class C>
PALETTE_INLINE void apply_vector(const T* x, T* y, int64_t at, int64_t count, const Affine<C>& by) {
  auto d = load_row<T, kPart>(x + at, count);
  if constexpr (kCentred<T>) d -= coefficient(by.center, at);
  const auto z = fma(d, coefficient(by.gain, at), coefficient(by.offset, at));
  if constexpr (kSilu) {
    store_row<T, kPart>(y + at, count, z / one_plus_exp_minus<T>(z));
  } else {
    store_row<T, kPart>(y + at, count, z);
  }
}

template <class T, bool kSilu, class C>
PALETTE_INLINE void apply_row(const T* x, T* y, int64_t width, const Affine<C>& by) {
  constexpr int kLanes = Lanes<T>::kLanes;
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    apply_vector<T, kSilu, false>(x, y, at, kLanes, by);
  }
  if (at < width) apply_vector<T, kSilu, true>(x, y, at, width - at, by);
}

template <class T>
PALETTE_LEAF void apply(Rows<const T> x, Rows<T> y, int64_t rows, int64_t width,
                        Affine<Wide<T>*> by, bool silu) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x.data + row * x.stride;
    T* to = y.data + row * y.stride;
    if (silu) {
      apply_row<T, true>(from, to, width, by);
    } else {
      apply_row<T, false>(from, to, width, by);
    }
  }
}

template <class T>
PALETTE_LEAF void apply_run(const T* x, T* y, int64_t count, Affine<Wide<T>> by, bool silu) {
  if (silu) {
    apply_row<T, true>(x, y, count, by);
  } else {
    apply_row<T, false>(x, y, count, by);
  }
}

template <class T>
constexpr Loops<T> kLoops = {moments<T>, moments_run<T>, apply<T>, apply_run<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
