// Moves, products and exponentials of small matrices, included once per instruction set by the
// loops of attention and of its backward.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// The block of a product that is summed up in registers: rows, and vectors of columns.
#if PALETTE_LANES == 16
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// to[i][j] = from[i][j]; columns from `columns` to `padded` become zero.
template <class From, class To>
PALETTE_INLINE void copy(const From* from, int64_t from_row, int64_t rows, int64_t columns,
                         int64_t padded, To* to, int64_t to_row) {
  constexpr int kLanes = Lanes<From>::kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    const From* source = from + i * from_row;
    To* target = to + i * to_row;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(target + j, load(source + j));
    if (j < columns) store_part(target + j, columns - j, load_part(source + j, columns - j));
    for (j = columns; j < padded; ++j) target[j] = To(0);
  }
}

// Swaps lane l + kStep of row i with lane l of row i + kStep, for all i and l without that bit.
template <int kStep>
PALETTE_INLINE void exchange(Floats* rows) {
  Words low, high;
  for (unsigned l = 0; l < PALETTE_LANES; ++l) {
    low[l] = (l & kStep) == 0 ? l : l - kStep + PALETTE_LANES;
    high[l] = (l & kStep) == 0 ? l + kStep : l + PALETTE_LANES;
  }
#pragma GCC unroll 16
  for (int i = 0; i < PALETTE_LANES; ++i) {
    if ((i & kStep) != 0) continue;
    const Floats a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// to[j][i] = from[i][j] for a square of one vector by one vector.
template <class From, class To>
PALETTE_INLINE void transpose_square(const From* from, int64_t from_row, To* to, int64_t to_row) {
  Floats rows[PALETTE_LANES];
#pragma GCC unroll 16
  for (int i = 0; i < PALETTE_LANES; ++i) rows[i] = load(from + i * from_row);
  exchange<1>(rows);
  exchange<2>(rows);
#if PALETTE_LANES >= 8
  exchange<4>(rows);
#endif
#if PALETTE_LANES >= 16
  exchange<8>(rows);
#endif
#pragma GCC unroll 16
  for (int i = 0; i < PALETTE_LANES; ++i) store(to + i * to_row, rows[i]);
}

// to[j][i] = from[i][j]; columns of `to` from `rows` to `padded` become zero.
template <class From, class To>
PALETTE_INLINE void transpose(const From* from, int64_t from_row, int64_t rows, int64_t columns,
                              int64_t padded, To* to, int64_t to_row) {
  constexpr int kLanes = Lanes<From>::kLanes;
  const int64_t whole_rows = kLanes == 1 ? 0 : rows / kLanes * kLanes;
  const int64_t whole_columns = kLanes == 1 ? 0 : columns / kLanes * kLanes;
  if constexpr (kLanes > 1) {
    for (int64_t i = 0; i < whole_rows; i += kLanes) {
      for (int64_t j = 0; j < whole_columns; j += kLanes) {
        transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      to[j * to_row + i] = static_cast<To>(from[i * from_row + j]);
    }
    for (int64_t i = rows; i < padded; ++i) to[j * to_row + i] = To(0);
  }
}

// `count` tokens as the rows of `to`, padded with zeros to `padded` columns.
template <class T>
PALETTE_INLINE void read_tokens(Head<const T> from, int64_t count, int64_t dims, int64_t padded,
                                const Matrix<Wide<T>>& to) {
  if (from.dim_stride == 1) {
    copy(from.data, from.token_stride, count, dims, padded, to.data, to.pitch);
    return;
  }
  transpose(from.data, from.dim_stride, dims, count, padded, to.data, to.pitch);
}

// `count` tokens as the columns of `to`, padded with zeros to `padded` columns.
template <class T>
PALETTE_INLINE void read_dims(Head<const T> from, int64_t count, int64_t dims, int64_t padded,
                              const Matrix<Wide<T>>& to) {
  if (from.dim_stride == 1) {
    transpose(from.data, from.token_stride, count, dims, padded, to.data, to.pitch);
    return;
  }
  copy(from.data, from.dim_stride, dims, count, padded, to.data, to.pitch);
}

template <class T>
PALETTE_INLINE void write_tokens(const Matrix<Wide<T>>& from, int64_t count, int64_t dims,
                                 Head<T> to) {
  if (to.dim_stride == 1) {
    copy(from.data, from.pitch, count, dims, dims, to.data, to.token_stride);
    return;
  }
  transpose(from.data, from.pitch, count, dims, count, to.data, to.dim_stride);
}

// The left factor of a product: element (i, k) lies at i * row + k * step.
template <class A>
struct Left {
  const A* data;
  int64_t row, step;
};

template <class A>
PALETTE_INLINE Left<A> plain(const Matrix<A>& m) {
  return {m.data, m.pitch, 1};
}

template <class A>
PALETTE_INLINE Left<A> transposed(const Matrix<A>& m) {
  return {m.data, 1, m.pitch};
}

template <class A, int kRows, int kVectors, bool kAdd>
PALETTE_INLINE void tile(Left<A> a, const A* b, int64_t b_row, int64_t depth, A* c, int64_t c_row) {
  using V = typename Lanes<A>::Vector;
  constexpr int kLanes = Lanes<A>::kLanes;
  V sum[kRows][kVectors] = {};
#pragma GCC unroll 16
  for (int i = 0; kAdd && i < kRows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load(c + i * c_row + v * kLanes);
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V left = broadcast(a.data[i * a.row + k * a.step]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(c + i * c_row + v * kLanes, sum[i][v]);
  }
}

template <class A, int kVectors, bool kAdd>
PALETTE_INLINE void column(int64_t rows, Left<A> a, const A* b, int64_t b_row, int64_t depth, A* c,
                           int64_t c_row) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const Left<A> from = {a.data + i * a.row, a.row, a.step};
    tile<A, kTileRows, kVectors, kAdd>(from, b, b_row, depth, c + i * c_row, c_row);
  }
}

// c = a b, or c += a b, for whole tiles of rows and whole vectors of columns.
template <class A, bool kAdd>
PALETTE_LEAF void multiply(int64_t rows, int64_t columns, int64_t depth, Left<A> a,
                           const Matrix<A>& b, const Matrix<A>& c) {
  constexpr int kLanes = Lanes<A>::kLanes;
  int64_t j = 0;
  for (; j + kTileVectors * kLanes <= columns; j += kTileVectors * kLanes) {
    column<A, kTileVectors, kAdd>(rows, a, b.data + j, b.pitch, depth, c.data + j, c.pitch);
  }
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
    column<A, 2, kAdd>(rows, a, b.data + j, b.pitch, depth, c.data + j, c.pitch);
  }
  for (; j < columns; j += kLanes) {
    column<A, 1, kAdd>(rows, a, b.data + j, b.pitch, depth, c.data + j, c.pitch);
  }
}

// 2^t for t up to 1, as exact as results of dtype T need it; 0 far below zero. NaN stays NaN.
template <class T>
PALETTE_INLINE Floats exp2(Floats t) {
  constexpr float kLowest = PALETTE_LANES == 16 ? -160.0f : -126.5f;  // its floor gives 0
  t = t < kLowest ? broadcast(kLowest) : t;
  const Floats n = floor(t), f = t - n;
  return scale_by_power(exp2_fraction<std::conditional_t<sizeof(T) == 2, Half, T>>(f), n);
}

template <class T>
PALETTE_INLINE double exp2(double t) {
  return std::exp2(t);
}

PALETTE_INLINE double largest(double a, double b) { return b > a ? b : a; }
PALETTE_INLINE Floats largest(Floats a, Floats b) { return b > a ? b : a; }

PALETTE_INLINE double sum_of(double v) { return v; }
PALETTE_INLINE float sum_of(Floats v) {
  for (int step = PALETTE_LANES / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) v[l] += v[l + step];
  }
  return v[0];
}

PALETTE_INLINE double largest_of(double v) { return v; }
PALETTE_INLINE float largest_of(Floats v) {
  float result = v[0];
  for (int l = 1; l < PALETTE_LANES; ++l) result = v[l] > result ? v[l] : result;
  return result;
}

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
