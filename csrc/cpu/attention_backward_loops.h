// The inner loops of attention's backward, included once per instruction set by each_isa.h.

#include "cpu/attention_tiles.h"

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// With weight = 2^(score * scale - lse): turns scores into weights, and the gradient for the
// weights into that for the scores.
template <class T>
PALETTE_INLINE void differentiate(Wide<T>* scores, Wide<T>* slopes, int64_t count, int64_t padded,
                                  Wide<T> scale, Wide<T> lse, Wide<T> delta, Wide<T> factor) {
  using A = Wide<T>;
  using V = typename Lanes<A>::Vector;
  constexpr int kLanes = Lanes<A>::kLanes;
  for (int64_t j = 0; j < padded; j += kLanes) {
    const V weight = exp2<T>(fma(load(scores + j), broadcast(scale), broadcast(-lse)));
    store(scores + j, weight);
    store(slopes + j, weight * (load(slopes + j) - delta) * factor);
  }
  std::fill(scores + count, scores + padded, A(0));
  std::fill(slopes + count, slopes + padded, A(0));
}

// The queries' gradients and results, and per query the sum of their products; `out` is left free.
template <class T>
PALETTE_INLINE void start(const Heads<T>& head, const Sizes& sizes, const Scratch<Wide<T>>& at) {
  using A = Wide<T>;
  using V = typename Lanes<A>::Vector;
  constexpr int kLanes = Lanes<A>::kLanes;
  read_tokens<T>(head.q, sizes.tokens, sizes.dims, sizes.width, at.q);
  read_tokens<T>(head.grad, sizes.tokens, sizes.dims, sizes.width, at.grad);
  read_tokens<T>(head.out, sizes.tokens, sizes.dims, sizes.width, at.dq);
  for (int64_t i = 0; i < sizes.tokens; ++i) {
    V total = {};
    for (int64_t j = 0; j < sizes.width; j += kLanes) {
      total = fma(load(at.grad.row(i) + j), load(at.dq.row(i) + j), total);
    }
    at.delta[i] = sum_of(total);
  }
  for (int64_t i = sizes.tokens; i < padded(sizes.tokens, kGroup); ++i) {
    std::fill_n(at.q.row(i), sizes.width, A(0));
    std::fill_n(at.grad.row(i), sizes.width, A(0));
  }
}

// c += a b, or c = a b where it is the first product for c.
template <class A>
PALETTE_INLINE void accumulate(bool first, int64_t rows, int64_t columns, int64_t depth, Left<A> a,
                               const Matrix<A>& b, const Matrix<A>& c) {
  if (first) {
    multiply<A, false>(rows, columns, depth, a, b, c);
  } else {
    multiply<A, true>(rows, columns, depth, a, b, c);
  }
}

// The gradients of one head. The weights of a group of queries and a block of keys are made again
// from the log-sum-exp, and spent on all three gradients at once.
template <class T>
PALETTE_LEAF void attend_backward(const Heads<T>& head, const Sizes& sizes,
                                  const Scratch<Wide<T>>& at, const Wide<T>* lse) {
  using A = Wide<T>;
  constexpr A kLog2e = 1.44269504088896340736;
  const A factor = A(1) / std::sqrt(static_cast<A>(sizes.dims)), scale = kLog2e * factor;
  const int64_t width = sizes.width;
  start<T>(head, sizes, at);
  for (int64_t key = 0; key < sizes.tokens; key += kKeys) {
    const int64_t keys = std::min(kKeys, sizes.tokens - key), wide = padded(keys, kPadding);
    read_tokens<T>(head.k.from_token(key), keys, sizes.dims, width, at.k);
    read_dims<T>(head.k.from_token(key), keys, sizes.dims, wide, at.k_columns);
    read_dims<T>(head.v.from_token(key), keys, sizes.dims, wide, at.v_columns);
    for (int64_t row = 0; row < sizes.tokens; row += kGroup) {
      const int64_t rows = std::min(kGroup, sizes.tokens - row), whole = padded(rows, kRows);
      const Matrix<A> q = {at.q.row(row), width}, grad = {at.grad.row(row), width};
      multiply<A, false>(whole, wide, sizes.dims, plain(q), at.k_columns, at.scores);
      multiply<A, false>(whole, wide, sizes.dims, plain(grad), at.v_columns, at.slopes);
      for (int64_t i = 0; i < rows; ++i) {
        differentiate<T>(at.scores.row(i), at.slopes.row(i), keys, wide, scale,
                         lse[row + i] * kLog2e, at.delta[row + i], factor);
      }
      accumulate(row == 0, wide, width, rows, transposed(at.scores), grad, at.dv);
      accumulate(row == 0, wide, width, rows, transposed(at.slopes), q, at.dk);
      accumulate<A>(key == 0, whole, width, keys, plain(at.slopes), at.k, {at.dq.row(row), width});
    }
    write_tokens<T>(at.dk, keys, sizes.dims, head.dk.from_token(key));
    write_tokens<T>(at.dv, keys, sizes.dims, head.dv.from_token(key));
  }
  write_tokens<T>(at.dq, sizes.tokens, sizes.dims, head.dq);
}

template <class T>
constexpr Loops<T> kLoops = {attend_backward<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
