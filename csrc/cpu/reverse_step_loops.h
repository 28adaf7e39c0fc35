// The inner loops of reverse_step, included once per instruction set by each_isa.h.

namespace palette::cpu {
namespace {
namespace PALETTE_ISA {

template <bool kPart>
PALETTE_INLINE Floats get(const float* from, int64_t count) {
  return kPart ? load_part(from, count) : load(from);
}

template <bool kPart>
PALETTE_INLINE void put(float* to, int64_t count, Floats value) {
  if constexpr (kPart) {
    store_part(to, count, value);
  } else {
    store(to, value);
  }
}

template <bool kPart>
PALETTE_INLINE void advance_vector(const Run& run, const Row& row, int64_t at, int64_t count) {
  const Floats before = get<kPart>(run.state + at, count);
  const Floats output = get<kPart>(run.output + at, count);
  Floats x0 = row.a * before + row.b * output;
  x0 = x0 < -1.0f ? broadcast(-1.0f) : x0;  // NaN stays NaN
  x0 = x0 > 1.0f ? broadcast(1.0f) : x0;
  Floats y = row.c1 * x0 + row.c2 * before;
  if (run.history != nullptr) {
    y = y + row.c3 * get<kPart>(run.history + at, count);
    put<kPart>(run.history + at, count, x0);
  }
  if (run.noise != nullptr) y = y + row.sigma * get<kPart>(run.noise + at, count);
  if (run.mask != nullptr) {
    const Floats mask = get<kPart>(run.mask + at, count);
    y = get<kPart>(run.known + at, count) * (1.0f - mask) + mask * y;
  }
  put<kPart>(run.state + at, count, y);
}

PALETTE_LEAF void advance(const Run& run, const Row& row, int64_t count) {
  int64_t at = 0;
  for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) {
    advance_vector<false>(run, row, at, PALETTE_LANES);
  }
  if (at < count) advance_vector<true>(run, row, at, count - at);
}

template <class T>
PALETTE_LEAF void widen_run(const T* from, int64_t count, float* to) {
  int64_t at = 0;
  if constexpr (!std::is_same_v<T, double>) {
    for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) store(to + at, load(from + at));
  }
  for (; at < count; ++at) to[at] = static_cast<float>(from[at]);
}

template <class T>
PALETTE_LEAF void narrow_run(const float* from, int64_t count, T* to) {
  int64_t at = 0;
  if constexpr (!std::is_same_v<T, double>) {
    for (; at + PALETTE_LANES <= count; at += PALETTE_LANES) store(to + at, load(from + at));
  }
  for (; at < count; ++at) to[at] = static_cast<T>(from[at]);
}

template <class T>
constexpr Loops<T> kLoops = {advance, widen_run<T>, narrow_run<T>};

}  // namespace PALETTE_ISA
}  // namespace
}  // namespace palette::cpu
