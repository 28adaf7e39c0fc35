// The inner loops of adamw, included once per instruction set by each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

// The sum of squares, of few enough elements for one float32 per lane.
template <class T>
PALETTE_LEAF double squares(const T* from, int64_t count) {
  Floats sums[2] = {};
  int64_t at = 0;
  for (; at + 2 * PALETTE_LANES <= count; at += 2 * PALETTE_LANES) {
    const auto pair = load_pair(from + at);
    sums[0] = fma(pair.low, pair.low, sums[0]);
    sums[1] = fma(pair.high, pair.high, sums[1]);
  }
  for (; at < count; at += PALETTE_LANES) {
    const Floats rest = load_part(from + at, std::min<int64_t>(PALETTE_LANES, count - at));
    sums[0] = fma(rest, rest, sums[0]);
  }
  const Floats both = sums[0] + sums[1];
  double sum = 0.0;
  for (int i = 0; i < PALETTE_LANES; ++i) sum += both[i];
  return sum;
}

// to[i] = from[i] * scale
template <class T>
PALETTE_LEAF void read(const T* from, int64_t count, float scale, float* to) {
  int64_t at = 0;
  for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) store(to + at, load(from + at) * scale);
  if (at < count) store_part(to + at, count - at, load_part(from + at, count - at) * scale);
}

// to[i] = from[i], rounded; past the caches, which hold little of what a step walks through.
template <class T>
PALETTE_LEAF void write(const float* from, int64_t count, T* to) {
  int64_t at = 0;
  if (reinterpret_cast<uintptr_t>(to) % kLineBytes == 0) {
    for (; at + 2 * PALETTE_LANES <= count; at += 2 * PALETTE_LANES) {
      stream_pair(to + at, load_pair(from + at));
    }
    finish_stream();
  }
  for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) store(to + at, load(from + at));
  if (at < count) store_part(to + at, count - at, load_part(from + at, count - at));
}

PALETTE_LEAF void advance(const Factors& by, int64_t count, const float* __restrict__ grad,
                          float* __restrict__ weight, float* __restrict__ mean,
                          float* __restrict__ square) {
  for (int64_t i = 0; i < count; ++i) {
    mean[i] += by.fresh1 * (grad[i] - mean[i]);
    square[i] = by.beta2 * square[i] + by.fresh2 * (grad[i] * grad[i]);
    const float spread = std::sqrt(square[i]) * by.root + by.eps;
    weight[i] = by.kept * weight[i] - by.rate * (mean[i] / spread);
  }
}

PALETTE_LEAF void average(float take, int64_t count, const float* __restrict__ weight,
                          float* __restrict__ average) {
  for (int64_t i = 0; i < count; ++i) average[i] += take * (weight[i] - average[i]);
}

template <class T>
constexpr Loops<T> kLoops = {squares<T>, read<T>, write<T>, advance, average};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
