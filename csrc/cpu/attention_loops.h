// The inner loops of attention, included once per instruction set by each_isa.h.

#include "cpu/attention_tiles.h"

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// Turns `count` scores into weights 2^(score * scale - m), m the running maximum of the row, and
// adds them to its running sum. Returns what earlier weights must be multiplied by.
template <class T>
PALETTE_INLINE Wide<T> weigh(Wide<T>* scores, int64_t count, int64_t padded, Wide<T> scale,
                             Wide<T>* maximum, Wide<T>* sum) {
  using A = Wide<T>;
  using V = typename Lanes<A>::Vector;
  constexpr int kLanes = Lanes<A>::kLanes;
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  for (int64_t j = count; j < padded; ++j) scores[j] = kLowest;
  V top = broadcast(kLowest);
  for (int64_t j = 0; j < padded; j += kLanes) top = largest(top, load(scores + j));
  const A before = *maximum, now = largest_of(top) * scale;
  const bool grown = now > before;
  if (grown) *maximum = now;
  // A row of nothing but -inf is shifted by nothing: -inf - -inf would be NaN.
  const A shift = *maximum == kLowest ? A(0) : *maximum;
  V total = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const V weight = exp2<T>(fma(load(scores + j), broadcast(scale), broadcast(-shift)));
    store(scores + j, weight);
    total += weight;
  }
  const A factor = grown ? std::exp2(before - now) : A(1);
  *sum = *sum * factor + sum_of(total);
  return factor;
}

template <class A>
PALETTE_INLINE void scale_row(A* row, int64_t columns, A factor) {
  constexpr int kLanes = Lanes<A>::kLanes;
  for (int64_t j = 0; j < columns; j += kLanes) store(row + j, load(row + j) * factor);
}

// All keys' share of `count` query rows, a block of keys after the other (the running maximum and
// sum of Milakov and Gimelshein, arXiv:1805.02867).
template <class T>
PALETTE_LEAF void attend(const Heads<T>& head, const Sizes& sizes, int64_t count,
                         const Scratch<Wide<T>>& at, Wide<T>* lse) {
  using A = Wide<T>;
  constexpr A kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;
  const A scale = kLog2e / std::sqrt(static_cast<A>(sizes.dims));
  const int64_t width = sizes.width;
  read_tokens<T>(head.q, count, sizes.dims, width, at.q);
  for (int64_t i = count; i < padded(count, kGroup); ++i) std::fill_n(at.q.row(i), width, A(0));
  std::fill_n(at.maximum, count, -std::numeric_limits<A>::infinity());
  std::fill_n(at.sum, count, A(0));
  for (int64_t key = 0; key < sizes.tokens; key += kKeys) {
    const int64_t keys = std::min(kKeys, sizes.tokens - key), wide = padded(keys, kPadding);
    read_dims<T>(head.k.from_token(key), keys, sizes.dims, wide, at.k);
    read_tokens<T>(head.v.from_token(key), keys, sizes.dims, width, at.v);
    for (int64_t row = 0; row < count; row += kGroup) {
      const int64_t rows = std::min(kGroup, count - row), whole = padded(rows, kRows);
      const Matrix<A> out = {at.out.row(row), at.out.pitch};
      multiply<A, false>(whole, wide, sizes.dims, plain<A>({at.q.row(row), at.q.pitch}), at.k,
                         at.scores);
      for (int64_t i = 0; i < rows; ++i) {
        const A factor =
            weigh<T>(at.scores.row(i), keys, wide, scale, at.maximum + row + i, at.sum + row + i);
        if (key > 0 && factor != A(1)) scale_row(out.row(i), width, factor);
      }
      if (key == 0) {
        multiply<A, false>(whole, width, keys, plain(at.scores), at.v, out);
      } else {
        multiply<A, true>(whole, width, keys, plain(at.scores), at.v, out);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    scale_row(at.out.row(i), width, A(1) / at.sum[i]);
    lse[i] = (at.maximum[i] + std::log2(at.sum[i])) * kLn2;
  }
  write_tokens<T>(at.out, count, sizes.dims, head.out);
}

template <class T>
constexpr Loops<T> kLoops = {attend<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
