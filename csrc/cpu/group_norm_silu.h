// What both directions of group_norm_silu share: how the work is cut, its parameters, and what the
// inner loops take and give.
//
// Work is cut by the shape of a sample alone, and partial results are added up in the order of the
// pieces, so neither the number of threads nor the place in the batch changes a bit.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace palette::cpu {

constexpr int64_t kPieceElements = 32768;       // elements between two partial results,
constexpr int64_t kPieceRows = 64;              // but at least so many rows
constexpr int64_t kTileBytes = 16384;           // read before the next column of a tile of rows,
constexpr int64_t kTileRows = 64;               // which is also how many values one sum adds up
constexpr int64_t kParallelElements = 16384;    // work worth a thread
constexpr int64_t kStreamedElements = 1 << 20;  // larger results are written past the caches
constexpr int64_t kPadding = 16;                // lanes of the widest vector

// The dtype of all arithmetic on elements of T. What there is one of per channel is float64.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether `apply` takes the center off x first, which is exact where the mean is far from zero.
// Values of 16 bits have no mean so many standard deviations away that it matters: their center is
// folded into the offset.
template <class T>
constexpr bool kCentred = sizeof(T) > 2;

// e^-z = scaled_power(kExponent * z, 1), which is a power of 2, in float64 of e.
template <class A>
constexpr A kExponent = std::is_same_v<A, double> ? -1 : -1.4426950408889634;

// With d = x - center:  z = d * gain + offset,  dx = dz * gain + d * slope + base.
template <class A>
struct Affine {
  A center, gain, offset, slope, base;
};

// Rows of adjacent channels, one row per pixel, `stride` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// One dimension of `total` cut into pieces of equal length, but for the last.
struct Pieces {
  int64_t total, length, count;

  Pieces(int64_t total, int64_t longest)
      : total(total),
        length((total + parts(total, longest) - 1) / parts(total, longest)),
        count(parts(total, length)) {}
  int64_t begin(int64_t piece) const { return piece * length; }
  int64_t size(int64_t piece) const { return std::min(length, total - piece * length); }

 private:
  static int64_t parts(int64_t total, int64_t length) { return (total + length - 1) / length; }
};

inline Pieces pieces_of_rows(const Image& x) {
  return {x.pixels, std::max(kPieceRows, kPieceElements / x.channels)};
}

inline Pieces pieces_of_run(int64_t count) { return {count, kPieceElements}; }

// Rows that stay in the nearest cache while all their channels are summed up.
inline int64_t tile_rows(int64_t row_bytes) {
  return std::clamp<int64_t>(kTileBytes / row_bytes, 4, kTileRows);
}

// body(item, piece) for every piece of every item, in parallel; `width` is the elements per unit of
// a piece's length. A second pass goes backwards: the caches still hold the end of x.
template <class Body>
void for_pieces(int64_t items, const Pieces& pieces, int64_t width, bool backwards,
                const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kParallelElements / (pieces.length * width));
  torch::stable::parallel_for(0, items * pieces.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = backwards ? begin + end - 1 - i : i;
      body(unit / pieces.count, unit % pieces.count);
    }
  });
}

// z before SiLU is x^ * gain + offset, one row per sample, or one for all where there is no FiLM:
// gain = weight * film, offset = bias * film + shift, film = 1 + scale.
struct Parameters {
  std::vector<double> weight, bias, film, gain, offset;
  int64_t stride;  // between the rows of film, gain and offset: the channels, or 0

  Parameters(int64_t batch, int64_t channels, const std::optional<Tensor>& weight,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
             const std::optional<Tensor>& shift);
};

inline Parameters::Parameters(int64_t batch, int64_t channels,
                              const std::optional<Tensor>& weight_tensor,
                              const std::optional<Tensor>& bias_tensor,
                              const std::optional<Tensor>& scale,
                              const std::optional<Tensor>& shift)
    : weight(values<double>(weight_tensor)), bias(values<double>(bias_tensor)) {
  const bool each = scale.has_value() || shift.has_value();
  stride = each ? channels : 0;
  weight.resize(channels, 1.0);
  bias.resize(channels, 0.0);
  const int64_t rows = each ? batch : 1;
  film = values<double>(scale);
  for (double& value : film) value += 1.0;
  film.resize(rows * channels, 1.0);
  offset = values<double>(shift);
  offset.resize(rows * channels, 0.0);
  gain.resize(rows * channels);
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t row = n * channels;
    for (int64_t c = 0; c < channels; ++c) {
      gain[row + c] = weight[c] * film[row + c];
      offset[row + c] += bias[c] * film[row + c];
    }
  }
}

// Uninitialised memory.
template <class T>
std::unique_ptr<T[]> buffer(int64_t size) {
  return std::make_unique_for_overwrite<T[]>(size);
}

// Affine coefficients of every (sample, channel), rows padded to whole vectors.
template <class A>
class Coefficients {
 public:
  Coefficients(int64_t batch, int64_t channels)
      : pitch_((channels + kPadding - 1) / kPadding * kPadding),
        data_(buffer<A>(batch * 5 * pitch_)) {}

  Affine<A*> row(int64_t n) const {
    A* at = data_.get() + n * 5 * pitch_;
    return {at, at + pitch_, at + 2 * pitch_, at + 3 * pitch_, at + 4 * pitch_};
  }
  Affine<A> at(int64_t n, int64_t c) const {
    const Affine<A*> all = row(n);
    return {all.center[c], all.gain[c], all.offset[c], all.slope[c], all.base[c]};
  }

 private:
  int64_t pitch_;
  std::unique_ptr<A[]> data_;
};

}  // namespace palette::cpu
