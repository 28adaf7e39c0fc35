// GroupNorm, FiLM and SiLU on the CPU: one pass over x for the statistics, one to write y.

#include "cpu/group_norm_silu.h"

#include <cmath>
#include <limits>

#include "cpu/ops.h"

namespace palette::cpu {
namespace {

// Statistics of one group over one piece of a sample; m2 is the sum of squared deviations.
struct Moments {
  double mean, m2;
};

// What follows the normalisation: nothing, or SiLU. It is cheaper of kExponent * z, which the
// coefficients then give, but that exceeds float32 a little before z does.
enum class Silu : int { none, of_z, of_exponent };

// Leaf functions of one instruction set. `moments` and `apply` work on rows, with arrays over the
// channels that are padded to whole vectors; moments_run on adjacent elements of one group,
// apply_run of one channel. The last two are arrays by Silu.
template <class T>
struct Loops {
  using A = Wide<T>;
  // One result per group, `pitch` apart; scratch holds 5 * channels.
  void (*moments)(Rows<const T> x, int64_t rows, int64_t channels, int64_t groups, double* scratch,
                  Moments* out, int64_t pitch);
  Moments (*moments_run)(const T* x, int64_t count);
  void (*apply[3])(Rows<const T> x, Rows<T> y, int64_t rows, int64_t channels, Affine<A*> by,
                   bool stream);
  void (*apply_run[3])(const T* x, T* y, int64_t count, Affine<A> by);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/group_norm_silu_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

// Moments of every (sample, group, piece), and the pieces they belong to.
struct Partials {
  std::unique_ptr<Moments[]> moments;
  Pieces pieces;
};

template <class T>
Partials moments_of_rows(const Image& x, int64_t groups, const Loops<T>& kernels) {
  const Pieces pieces = pieces_of_rows(x);
  auto moments = buffer<Moments>(x.batch * groups * pieces.count);
  const T* data = x.tensor.const_data_ptr<T>();
  for_pieces(x.batch, pieces, x.channels, false, [&](int64_t n, int64_t piece) {
    const auto scratch = buffer<double>(5 * x.channels);
    const T* from = data + n * x.batch_stride + pieces.begin(piece) * x.pixel_stride;
    Moments* out = moments.get() + n * groups * pieces.count + piece;
    kernels.moments({from, x.pixel_stride}, pieces.size(piece), x.channels, groups, scratch.get(),
                    out, pieces.count);
  });
  return {std::move(moments), pieces};
}

template <class T>
Partials moments_of_runs(const Image& x, int64_t groups, const Loops<T>& kernels) {
  const int64_t run = x.channels / groups * x.pixels;
  const Pieces pieces = pieces_of_run(run);
  auto moments = buffer<Moments>(x.batch * groups * pieces.count);
  const T* data = x.tensor.const_data_ptr<T>();
  for_pieces(x.batch * groups, pieces, 1, false, [&](int64_t group, int64_t piece) {
    const T* from = data + group / groups * x.batch_stride + group % groups * run;
    moments[group * pieces.count + piece] =
        kernels.moments_run(from + pieces.begin(piece), pieces.size(piece));
  });
  return {std::move(moments), pieces};
}

// The moments of all pieces together, which have `width` elements per unit of length: the pairwise
// rule of Chan, Golub and LeVeque (The American Statistician 37, 1983) for all pairs at once.
Moments merge(const Moments* parts, const Pieces& pieces, int64_t width) {
  double mean = 0.0, m2 = 0.0;
  for (int64_t k = 0; k < pieces.count; ++k) {
    mean += parts[k].mean * static_cast<double>(pieces.size(k));
  }
  mean /= static_cast<double>(pieces.total);
  for (int64_t k = 0; k < pieces.count; ++k) {
    const double d = parts[k].mean - mean;
    m2 += parts[k].m2 + d * d * static_cast<double>(pieces.size(k) * width);
  }
  return {mean, m2};
}

template <class A>
struct Statistics {
  A *mean, *rstd;  // [N, groups]
};

// How SiLU is made of results with these parameters, whose deviations are below 2^20 standard ones.
Silu silu_by(const Parameters& parameters) {
  bool large = false;
  for (size_t c = 0; c < parameters.gain.size(); ++c) {  // no early end: in vectors
    large |= !(std::abs(parameters.gain[c]) < 1e30) | !(std::abs(parameters.offset[c]) < 1e38);
  }
  return large ? Silu::of_z : Silu::of_exponent;
}

// Mean and rstd of sample n, and with them the coefficients of its channels.
template <class A>
void finish_sample(int64_t n, const Partials& partials, const Image& x, int64_t groups, double eps,
                   const Parameters& parameters, bool centred, Silu silu, Statistics<A> out,
                   const Affine<A*>& by) {
  const int64_t channels = x.channels / groups;
  const double size = static_cast<double>(channels * x.pixels),
               unit = silu == Silu::of_exponent ? kExponent<A> : 1;
  const double* gain = parameters.gain.data() + n * parameters.stride;
  const double* offset = parameters.offset.data() + n * parameters.stride;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = n * groups + g;
    const Moments total = merge(partials.moments.get() + at * partials.pieces.count,
                                partials.pieces, x.rows ? channels : 1);
    const double variance = total.m2 < 0.0 ? 0.0 : total.m2 / size;  // NaN stays NaN
    const double rstd = 1.0 / std::sqrt(variance + eps);
    out.mean[at] = static_cast<A>(total.mean);
    out.rstd[at] = static_cast<A>(rstd);
    const A center = centred ? out.mean[at] : 0;
    const double rest = (center - total.mean) * rstd;  // what rounding the mean to A lost
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      by.center[c] = center;
      by.gain[c] = static_cast<A>(unit * (gain[c] * rstd));
      by.offset[c] = static_cast<A>(unit * (offset[c] + gain[c] * rest));
    }
  }
}

// Whether y is written past the caches: where little of it would still be in them when it is read,
// and every row starts a line.
bool streams(const Tensor& y) {
  const auto start = reinterpret_cast<uintptr_t>(y.const_data_ptr());
  const size_t row = y.size(1) * y.element_size();
  return y.numel() > kStreamedElements && (start | row) % kLineBytes == 0;
}

template <class T>
void apply_rows(const Image& x, const Tensor& y, const Coefficients<Wide<T>>& by, Silu silu,
                const Loops<T>& kernels) {
  const Pieces pieces = pieces_of_rows(x);
  const auto apply = kernels.apply[static_cast<int>(silu)];
  const bool stream = streams(y);
  const T* from = x.tensor.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  for_pieces(x.batch, pieces, x.channels, true, [&](int64_t n, int64_t piece) {
    const int64_t row = pieces.begin(piece);
    apply({from + n * x.batch_stride + row * x.pixel_stride, x.pixel_stride},
          {to + (n * x.pixels + row) * x.channels, x.channels}, pieces.size(piece), x.channels,
          by.row(n), stream);
  });
}

template <class T>
void apply_runs(const Image& x, const Tensor& y, const Coefficients<Wide<T>>& by, Silu silu,
                const Loops<T>& kernels) {
  const Pieces pieces = pieces_of_run(x.pixels);
  const auto apply = kernels.apply_run[static_cast<int>(silu)];
  const T* from = x.tensor.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  for_pieces(x.batch * x.channels, pieces, 1, true, [&](int64_t channel, int64_t piece) {
    const int64_t n = channel / x.channels, c = channel % x.channels, start = pieces.begin(piece);
    apply(from + n * x.batch_stride + c * x.pixels + start, to + channel * x.pixels + start,
          pieces.size(piece), by.at(n, c));
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Parameters& parameters,
                                           int64_t groups, double eps, Silu silu) {
  using A = Wide<T>;
  const Loops<T>& kernels = loops<T>();
  const bool last = channels_last(input);
  const Tensor y = empty_dense(input, last);
  constexpr ScalarType kWide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor mean = empty({input.size(0), groups}, kWide);
  const Tensor rstd = empty({input.size(0), groups}, kWide);
  const Statistics<A> statistics = {mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>()};
  if (input.numel() == 0) {  // as torch.native_group_norm
    std::fill_n(statistics.mean, mean.numel(), A(0));
    std::fill_n(statistics.rstd, rstd.numel(), std::numeric_limits<A>::quiet_NaN());
    return {y, mean, rstd};
  }
  const Image x = image(input, last || pixels_of(input) == 1);
  const Partials partials =
      x.rows ? moments_of_rows(x, groups, kernels) : moments_of_runs(x, groups, kernels);
  const Coefficients<A> by(x.batch, x.channels);
  for_pieces(x.batch, Pieces(1, 1), x.channels * 4, false, [&](int64_t n, int64_t) {
    finish_sample(n, partials, x, groups, eps, parameters, kCentred<T>, silu, statistics,
                  by.row(n));
  });
  if (x.rows) {
    apply_rows(x, y, by, silu, kernels);
  } else {
    apply_runs(x, y, by, silu, kernels);
  }
  return {y, mean, rstd};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias,
                                                   int64_t groups, double eps,
                                                   const std::optional<Tensor>& scale,
                                                   const std::optional<Tensor>& shift, bool silu) {
  STD_TORCH_CHECK(checks::group_norm_silu(device_of(x), x, weight, bias, groups, eps, scale, shift),
                  "group_norm_silu: arguments that do not fit each other");
  const Parameters parameters(x.size(0), x.size(1), weight, bias, scale, shift);
  const Silu how = silu ? silu_by(parameters) : Silu::none;
  return by_dtype(x, [&]<class T>(T) { return forward<T>(x, parameters, groups, eps, how); });
}

}  // namespace palette::cpu
