// The inner loops of group_norm_silu, included once per instruction set by each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

constexpr int kColumns =
    PALETTE_LANES == 16 ? 8 : 4;  // vectors of channels that are summed up side by side
constexpr int kHeld = PALETTE_LANES == 16 ? 4 : 2;  // of which registers hold all coefficients
constexpr int64_t kShiftRows = 4;

// Measured: float32, which is bound by memory sooner, loses by more than one.
template <class T>
constexpr int64_t kWideTileRows = sizeof(T) == 2 ? 4 : 1;

template <class V>
PALETTE_INLINE V median(V a, V b, V c) {
  const V low = a < b ? a : b, high = a < b ? b : a;
  const V middle = high < c ? high : c;
  return low < middle ? middle : low;
}

// Of some columns (kVectors vectors of channels), a shift near each one's mean: the median of the
// means of a few of n rows at the beginning, in the middle and at the end, which one outlier cannot
// move. Whatever the data, it is at most sqrt(n / few) standard deviations from the mean, so the
// sums below lose no more than that ratio when the shift is taken out of them.
template <class T, int kVectors, bool kPart>
PALETTE_INLINE void start_columns(Rows<const T> x, int64_t rows, int64_t count, Wide<T>* shift,
                                  Wide<T>* sum, Wide<T>* square) {
  using V = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kLanes;
  const int64_t few = std::min(rows / 16 + 1, kShiftRows);
  V totals[3][kVectors] = {};
  for (int64_t part = 0; part < 3; ++part) {
    const int64_t first = part * (rows - few) / 2;
    for (int64_t row = first; row < first + few; ++row) {
      V values[kVectors];
      load_columns<T, kVectors, kPart>(x.data + row * x.stride, count, values);
      for (int v = 0; v < kVectors; ++v) totals[part][v] += values[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const V center = median(totals[0][v], totals[1][v], totals[2][v]);
    store_row<Wide<T>, kPart>(shift + v * kLanes, count, center / static_cast<Wide<T>>(few));
    store_row<Wide<T>, kPart>(sum + v * kLanes, count, V{});
    store_row<Wide<T>, kPart>(square + v * kLanes, count, V{});
  }
}

// Adds the deviations from the shift over some rows to `sum`, and their squares to `square`.
template <class T, int kVectors, bool kPart>
PALETTE_INLINE void add_columns(Rows<const T> x, int64_t rows, int64_t count, Wide<T>* shift,
                                Wide<T>* sum, Wide<T>* square) {
  using V = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kLanes;
  V center[kVectors], part[kVectors] = {}, squares[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    center[v] = load_row<Wide<T>, kPart>(shift + v * kLanes, count);
  }
  for (int64_t row = 0; row < rows; ++row) {
    V values[kVectors];
    load_columns<T, kVectors, kPart>(x.data + row * x.stride, count, values);
    for (int v = 0; v < kVectors; ++v) {
      const V d = values[v] - center[v];
      part[v] += d;
      squares[v] = fma(d, d, squares[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Wide<T>*sum_at = sum + v * kLanes, *square_at = square + v * kLanes;
    store_row<Wide<T>, kPart>(sum_at, count, load_row<Wide<T>, kPart>(sum_at, count) + part[v]);
    store_row<Wide<T>, kPart>(square_at, count,
                              load_row<Wide<T>, kPart>(square_at, count) + squares[v]);
  }
}

// One of the two for all columns.
template <class T, bool kStart>
PALETTE_INLINE void sweep(Rows<const T> x, int64_t rows, int64_t width, Wide<T>* shift,
                          Wide<T>* sum, Wide<T>* square) {
  constexpr int kLanes = Lanes<T>::kLanes;
  constexpr auto wide =
      kStart ? start_columns<T, kColumns, false> : add_columns<T, kColumns, false>;
  constexpr auto held = kStart ? start_columns<T, kHeld, false> : add_columns<T, kHeld, false>;
  constexpr auto narrow = kStart ? start_columns<T, 1, false> : add_columns<T, 1, false>;
  constexpr auto part = kStart ? start_columns<T, 1, true> : add_columns<T, 1, true>;
  int64_t c = 0;
  for (; c + kColumns * kLanes <= width; c += kColumns * kLanes) {
    wide({x.data + c, x.stride}, rows, kLanes, shift + c, sum + c, square + c);
  }
  for (; c + kHeld * kLanes <= width; c += kHeld * kLanes) {
    held({x.data + c, x.stride}, rows, kLanes, shift + c, sum + c, square + c);
  }
  for (; c + kLanes <= width; c += kLanes) {
    narrow({x.data + c, x.stride}, rows, kLanes, shift + c, sum + c, square + c);
  }
  if (c < width) {
    part({x.data + c, x.stride}, rows, width - c, shift + c, sum + c, square + c);
  }
}

// Shifted sums of all columns. A few rows at a time, so that all columns of a row are read while
// it is in the nearest cache and no sum runs over many values.
template <class T>
PALETTE_INLINE void sum_columns(Rows<const T> x, int64_t rows, int64_t width, Wide<T>* shift,
                                Wide<T>* sum, Wide<T>* square) {
  sweep<T, true>(x, rows, width, shift, sum, square);
  const int64_t tile = tile_rows(width * static_cast<int64_t>(sizeof(T)));
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t end = row + tile < rows ? row + tile : rows;
    sweep<T, false>({x.data + row * x.stride, x.stride}, end - row, width, shift, sum, square);
  }
}

PALETTE_INLINE double total(const double (&parts)[8]) {
  return ((parts[0] + parts[4]) + (parts[1] + parts[5])) +
         ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}

// Shifted sums over `rows` values of each column -> mean and m2 of each column.
template <class A>
PALETTE_INLINE void center_columns(const A* shift, const A* sum, const A* square, int64_t columns,
                                   int64_t rows, double* mean, double* m2) {
  const double inverse = 1.0 / static_cast<double>(rows);
  for (int64_t c = 0; c < columns; ++c) {
    const double step = sum[c] * inverse;
    mean[c] = shift[c] + step;
    m2[c] = square[c] - sum[c] * step;
  }
}

// Squared deviations of a column's values from a center d away from their mean.
PALETTE_INLINE double spread(double d, double m2, double rows) { return m2 + d * d * rows; }

// The moments of some columns together, in several sums side by side: one alone would spend its
// time waiting for itself.
PALETTE_INLINE Moments fold(const double* mean, const double* m2, int64_t columns, int64_t rows) {
  constexpr int kSums = 8;
  const int64_t rest = columns % kSums, whole = columns - rest;
  double parts[kSums] = {};
  for (int64_t c = 0; c < whole; c += kSums) {
    for (int k = 0; k < kSums; ++k) parts[k] += mean[c + k];
  }
  for (int k = 0; k < rest; ++k) parts[k] += mean[whole + k];
  const double center = total(parts) / static_cast<double>(columns);
  const double weight = static_cast<double>(rows);
  for (int k = 0; k < kSums; ++k) parts[k] = 0.0;
  for (int64_t c = 0; c < whole; c += kSums) {
    for (int k = 0; k < kSums; ++k) parts[k] += spread(mean[c + k] - center, m2[c + k], weight);
  }
  for (int k = 0; k < rest; ++k) {
    parts[k] += spread(mean[whole + k] - center, m2[whole + k], weight);
  }
  return {center, total(parts)};
}

#ifdef PALETTE_BF16
constexpr int kPairLanes = 2 * PALETTE_LANES;  // values in a vector of pairs

// Squares without a shift lose as many bits as the mean's square is times the variance. From here
// on a piece is summed once more, with one.
constexpr double kFarMean = 16.0;

// Adds each pair of adjacent channels over some rows to `sum`, and its squares to `square`.
template <int kVectors, int kRows>
PALETTE_INLINE void add_pairs(Rows<const BFloat16> x, int64_t rows, float* sum, float* square) {
  const __m512bh ones = reinterpret_cast<__m512bh>(uint16_t{0x3f80} - Halves2{});
  Floats sums[kRows][kVectors] = {}, squares[kRows][kVectors] = {};
  for (int64_t row = 0; row < rows; row += kRows) {
    for (int r = 0; r < kRows; ++r) {
      const BFloat16* from = x.data + (row + r) * x.stride;
      prefetch_behind<kVectors * kPairLanes * sizeof(BFloat16)>(from);
      for (int v = 0; v < kVectors; ++v) {
        const __m512bh values =
            reinterpret_cast<__m512bh>(_mm512_loadu_si512(from + v * kPairLanes));
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], values, ones);
        squares[r][v] = _mm512_dpbf16_ps(squares[r][v], values, values);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Floats all = load(sum + v * PALETTE_LANES), all_squares = load(square + v * PALETTE_LANES);
    for (int r = 0; r < kRows; ++r) all += sums[r][v], all_squares += squares[r][v];
    store(sum + v * PALETTE_LANES, all);
    store(square + v * PALETTE_LANES, all_squares);
  }
}

// The same for all columns, whole vectors of pairs.
PALETTE_INLINE void sum_pairs(Rows<const BFloat16> x, int64_t rows, int64_t width, float* sum,
                              float* square) {
  std::fill_n(sum, width / 2, 0.0f);
  std::fill_n(square, width / 2, 0.0f);
  const int64_t tile = tile_rows(width * static_cast<int64_t>(sizeof(BFloat16)));
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t some = std::min(tile, rows - row), even = some / 2 * 2;
    const Rows<const BFloat16> from = {x.data + row * x.stride, x.stride};
    int64_t c = 0;
    for (; c + 8 * kPairLanes <= width; c += 8 * kPairLanes) {
      add_pairs<8, 1>({from.data + c, x.stride}, some, sum + c / 2, square + c / 2);
    }
    for (; c + 2 * kPairLanes <= width; c += 2 * kPairLanes) {
      add_pairs<2, 2>({from.data + c, x.stride}, even, sum + c / 2, square + c / 2);
      add_pairs<2, 1>({from.data + c + even * x.stride, x.stride}, some - even, sum + c / 2,
                      square + c / 2);
    }
    if (c < width) add_pairs<1, 1>({from.data + c, x.stride}, some, sum + c / 2, square + c / 2);
  }
}

// The moments by products of bfloat16, which need no conversion; false where they are not exact
// enough.
PALETTE_INLINE bool moments_of_pairs(Rows<const BFloat16> x, int64_t rows, int64_t width,
                                     int64_t groups, double* scratch, Moments* out, int64_t pitch) {
  const int64_t pairs = width / 2, of_group = pairs / groups;
  double *mean = scratch, *m2 = scratch + pairs;
  float* sum = reinterpret_cast<float*>(scratch + width);
  float* square = sum + pairs;
  sum_pairs(x, rows, width, sum, square);
  const double inverse = 0.5 / static_cast<double>(rows);
  for (int64_t c = 0; c < pairs; ++c) {
    mean[c] = sum[c] * inverse;
    m2[c] = square[c] - sum[c] * mean[c];
  }
  bool exact = true;
  const double size = static_cast<double>(2 * rows * of_group);
  for (int64_t g = 0; g < groups; ++g) {
    const Moments all = fold(mean + g * of_group, m2 + g * of_group, of_group, 2 * rows);
    exact &= all.mean * all.mean * size <= kFarMean * all.m2;  // false for NaN
    out[g * pitch] = all;
  }
  return exact;
}
#endif

template <class T>
PALETTE_LEAF void moments(Rows<const T> x, int64_t rows, int64_t width, int64_t groups,
                          double* scratch, Moments* out, int64_t pitch) {
#ifdef PALETTE_BF16
  if constexpr (std::is_same_v<T, BFloat16>) {
    const bool pairs = width % kPairLanes == 0 && width / groups % 2 == 0;
    if (pairs && moments_of_pairs(x, rows, width, groups, scratch, out, pitch)) return;
  }
#endif
  double *mean = scratch, *m2 = scratch + width;
  Wide<T>* shift = reinterpret_cast<Wide<T>*>(scratch + 2 * width);
  Wide<T>*sum = shift + width, *square = shift + 2 * width;
  sum_columns(x, rows, width, shift, sum, square);
  center_columns(shift, sum, square, width, rows, mean, m2);
  const int64_t channels = width / groups;
  for (int64_t g = 0; g < groups; ++g) {
    out[g * pitch] = fold(mean + g * channels, m2 + g * channels, channels, rows);
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
    sum_columns<T>({x, kWidth}, rows, kWidth, shift, sum, square);
    double mean[kWidth], m2[kWidth];
    center_columns(shift, sum, square, kWidth, rows, mean, m2);
    result = fold(mean, m2, kWidth, rows);
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

// z = d * gain + offset and what follows; `of_exponent` it is t = kExponent * z that they give:
// z / (1 + e^-z) = t / (kExponent + kExponent * e^-z).
template <class T, Silu kSilu, class V>
PALETTE_INLINE V transform(V d, V center, V gain, V offset) {
  using A = Wide<T>;
  constexpr A kScale = kExponent<A>;
  if constexpr (kCentred<T>) d -= center;
  const V z = fma(d, gain, offset);
  if constexpr (kSilu == Silu::of_exponent) {
    return z / (kScale + scaled_power<T>(z, kScale));
  } else if constexpr (kSilu == Silu::of_z) {
    return z / (A(1) + scaled_power<T>(z * kScale, A(1)));
  } else {
    return z;
  }
}

// Some columns of some rows, their coefficients held in registers.
template <class T, Silu kSilu, int kVectors, bool kPart, bool kStream>
PALETTE_INLINE void apply_columns(Rows<const T> x, Rows<T> y, int64_t rows, int64_t count,
                                  const Affine<Wide<T>*>& by, int64_t at) {
  using V = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kLanes;
  V center[kVectors], gain[kVectors], offset[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    center[v] = load(by.center + at + v * kLanes);
    gain[v] = load(by.gain + at + v * kLanes);
    offset[v] = load(by.offset + at + v * kLanes);
  }
  for (int64_t row = 0; row < rows; ++row) {
    V values[kVectors];
    if constexpr (kStream) {
      prefetch_behind<kVectors * kLanes * sizeof(T)>(x.data + row * x.stride + at);
    }
    load_columns<T, kVectors, kPart>(x.data + row * x.stride + at, count, values);
    for (int v = 0; v < kVectors; ++v) {
      values[v] = transform<T, kSilu>(values[v], center[v], gain[v], offset[v]);
    }
    store_columns<T, kVectors, kPart, kStream>(y.data + row * y.stride + at, count, values);
  }
}

template <class T, Silu kSilu, bool kStream>
PALETTE_INLINE void apply_rows(Rows<const T> x, Rows<T> y, int64_t rows, int64_t width,
                               const Affine<Wide<T>*>& by) {
  constexpr int kLanes = Lanes<T>::kLanes;
  int64_t at = 0;
  for (; at + kHeld * kLanes <= width; at += kHeld * kLanes) {
    apply_columns<T, kSilu, kHeld, false, kStream>(x, y, rows, kLanes, by, at);
  }
  for (; at + kLanes <= width; at += kLanes) {
    apply_columns<T, kSilu, 1, false, false>(x, y, rows, kLanes, by, at);
  }
  if (at < width) apply_columns<T, kSilu, 1, true, false>(x, y, rows, width - at, by, at);
}

// Several rows for each load of the coefficients; few where a row is wider than what registers
// hold, so that memory is still walked through almost in order.
template <class T, Silu kSilu>
PALETTE_LEAF void apply(Rows<const T> x, Rows<T> y, int64_t rows, int64_t width,
                        Affine<Wide<T>*> by, bool stream) {
  const int64_t tile = width <= kHeld * Lanes<T>::kLanes ? rows : kWideTileRows<T>;
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t some = row + tile < rows ? tile : rows - row;
    const Rows<const T> from = {x.data + row * x.stride, x.stride};
    const Rows<T> to = {y.data + row * y.stride, y.stride};
    if (stream) {
      apply_rows<T, kSilu, true>(from, to, some, width, by);
    } else {
      apply_rows<T, kSilu, false>(from, to, some, width, by);
    }
  }
  if (stream) finish_stream();
}

template <class T, Silu kSilu>
PALETTE_LEAF void apply_run(const T* x, T* y, int64_t count, Affine<Wide<T>> by) {
  constexpr int kLanes = Lanes<T>::kLanes;
  const auto center = broadcast(by.center), gain = broadcast(by.gain),
             offset = broadcast(by.offset);
  int64_t at = 0;
  for (; at + 2 * kLanes <= count; at += 2 * kLanes) {
    const auto d = load_pair(x + at);
    store_pair(y + at, {transform<T, kSilu>(d.low, center, gain, offset),
                        transform<T, kSilu>(d.high, center, gain, offset)});
  }
  for (; at < count; at += kLanes) {
    const int64_t some = at + kLanes < count ? kLanes : count - at;
    const auto d = load_part(x + at, some);
    store_part(y + at, some, transform<T, kSilu>(d, center, gain, offset));
  }
}

template <class T>
constexpr Loops<T> kLoops = {
    moments<T>,
    moments_run<T>,
    {apply<T, Silu::none>, apply<T, Silu::of_z>, apply<T, Silu::of_exponent>},
    {apply_run<T, Silu::none>, apply_run<T, Silu::of_z>, apply_run<T, Silu::of_exponent>}};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
