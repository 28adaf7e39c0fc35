// The gradients of group_norm_silu on the CPU: one pass over x and the gradient for two sums per
// channel, one to write dx. z and its sigmoid are computed again in each.

#include "cpu/group_norm_silu.h"

#include "cpu/ops.h"

namespace palette::cpu {
namespace {

// Leaf functions of one instruction set, on rows or on a run of one channel.
template <class T>
struct Loops {
  using A = Wide<T>;
  // sum(dz) and sum(dz * d) per channel, with dz the gradient for z.
  void (*sums)(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t channels, Affine<A*> by,
               bool silu, A* dz, A* dz_d);
  void (*sums_run)(const T* grad, const T* x, int64_t count, Affine<A> by, bool silu, A* dz,
                   A* dz_d);
  void (*input)(Rows<const T> grad, Rows<const T> x, Rows<T> dx, int64_t rows, int64_t channels,
                Affine<A*> by, bool silu);
  void (*input_run)(const T* grad, const T* x, T* dx, int64_t count, Affine<A> by, bool silu);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/group_norm_silu_backward_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

// sum(dz) and sum(dz * d) of every (sample, channel), [N, C]; d = x - mean.
struct Sums {
  std::vector<double> dz, dz_d;

  explicit Sums(int64_t size) : dz(size), dz_d(size) {}
};

// All that the gradients depend on but the data.
struct Normalisation {
  const Parameters& parameters;
  std::vector<double> mean, rstd;  // [N, groups]
  int64_t groups;
  bool silu;
};

// Coefficients of sample n, but slope and base, which need its sums.
template <class A>
void start_sample(int64_t n, int64_t channels, const Normalisation& norm, const Affine<A*>& by) {
  const double* gain = norm.parameters.gain.data() + n * norm.parameters.stride;
  const double* offset = norm.parameters.offset.data() + n * norm.parameters.stride;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t group = n * norm.groups + c / (channels / norm.groups);
    by.center[c] = static_cast<A>(norm.mean[group]);
    by.gain[c] = static_cast<A>(gain[c] * norm.rstd[group]);
    by.offset[c] = static_cast<A>(offset[c]);
  }
}

template <class T>
Sums sums_of_rows(const Image& grad, const Image& x, const Coefficients<Wide<T>>& by, bool silu,
                  const Loops<T>& kernels) {
  using A = Wide<T>;
  const Pieces pieces = pieces_of_rows(x);
  const int64_t channels = x.channels;
  const auto parts = buffer<A>(x.batch * pieces.count * 2 * channels);
  const T *gradient = grad.tensor.const_data_ptr<T>(), *from = x.tensor.const_data_ptr<T>();
  for_pieces(x.batch, pieces, channels, false, [&](int64_t n, int64_t piece) {
    const int64_t row = pieces.begin(piece);
    A* out = parts.get() + (n * pieces.count + piece) * 2 * channels;
    kernels.sums({gradient + n * grad.batch_stride + row * grad.pixel_stride, grad.pixel_stride},
                 {from + n * x.batch_stride + row * x.pixel_stride, x.pixel_stride},
                 pieces.size(piece), channels, by.row(n), silu, out, out + channels);
  });
  Sums sums(x.batch * channels);
  for_pieces(x.batch, Pieces(1, 1), pieces.count * channels, false, [&](int64_t n, int64_t) {
    double *dz = sums.dz.data() + n * channels, *dz_d = sums.dz_d.data() + n * channels;
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const A* part = parts.get() + (n * pieces.count + piece) * 2 * channels;
      for (int64_t c = 0; c < channels; ++c) dz[c] += part[c];
      for (int64_t c = 0; c < channels; ++c) dz_d[c] += part[channels + c];
    }
  });
  return sums;
}

template <class T>
Sums sums_of_runs(const Image& grad, const Image& x, const Coefficients<Wide<T>>& by, bool silu,
                  const Loops<T>& kernels) {
  using A = Wide<T>;
  const Pieces pieces = pieces_of_run(x.pixels);
  const int64_t units = x.batch * x.channels * pieces.count;
  const auto parts = buffer<A>(2 * units);
  const T *gradient = grad.tensor.const_data_ptr<T>(), *from = x.tensor.const_data_ptr<T>();
  for_pieces(x.batch * x.channels, pieces, 1, false, [&](int64_t channel, int64_t piece) {
    const int64_t n = channel / x.channels, c = channel % x.channels;
    const int64_t at = c * x.pixels + pieces.begin(piece);
    A* out = parts.get() + 2 * (channel * pieces.count + piece);
    kernels.sums_run(gradient + n * grad.batch_stride + at, from + n * x.batch_stride + at,
                     pieces.size(piece), by.at(n, c), silu, out, out + 1);
  });
  Sums sums(x.batch * x.channels);
  for (int64_t unit = 0; unit < units; ++unit) {
    sums.dz[unit / pieces.count] += parts[2 * unit];
    sums.dz_d[unit / pieces.count] += parts[2 * unit + 1];
  }
  return sums;
}

// With x^ = d * rstd and both means over the group:
// dx = rstd * (gain * dz - x^ * mean(gain * dz * x^) - mean(gain * dz)).
template <class A>
void finish_sample(int64_t n, const Image& x, const Normalisation& norm, const Sums& sums,
                   const Affine<A*>& by) {
  const int64_t channels = x.channels / norm.groups;
  const double size = static_cast<double>(channels * x.pixels);
  const double* gain = norm.parameters.gain.data() + n * norm.parameters.stride;
  const double* dz = sums.dz.data() + n * x.channels;
  const double* dz_d = sums.dz_d.data() + n * x.channels;
  for (int64_t g = 0; g < norm.groups; ++g) {
    const double rstd = norm.rstd[n * norm.groups + g];
    double mean = 0.0, mean_d = 0.0;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      mean += gain[c] * dz[c];
      mean_d += gain[c] * dz_d[c];
    }
    std::fill_n(by.slope + g * channels, channels,
                static_cast<A>(-rstd * rstd * rstd * (mean_d / size)));
    std::fill_n(by.base + g * channels, channels, static_cast<A>(-rstd * (mean / size)));
  }
}

template <class T>
void input_of_rows(const Image& grad, const Image& x, const Tensor& dx,
                   const Coefficients<Wide<T>>& by, bool silu, const Loops<T>& kernels) {
  const Pieces pieces = pieces_of_rows(x);
  const T *gradient = grad.tensor.const_data_ptr<T>(), *from = x.tensor.const_data_ptr<T>();
  T* to = dx.mutable_data_ptr<T>();
  for_pieces(x.batch, pieces, x.channels, true, [&](int64_t n, int64_t piece) {
    const int64_t row = pieces.begin(piece);
    kernels.input({gradient + n * grad.batch_stride + row * grad.pixel_stride, grad.pixel_stride},
                  {from + n * x.batch_stride + row * x.pixel_stride, x.pixel_stride},
                  {to + (n * x.pixels + row) * x.channels, x.channels}, pieces.size(piece),
                  x.channels, by.row(n), silu);
  });
}

template <class T>
void input_of_runs(const Image& grad, const Image& x, const Tensor& dx,
                   const Coefficients<Wide<T>>& by, bool silu, const Loops<T>& kernels) {
  const Pieces pieces = pieces_of_run(x.pixels);
  const T *gradient = grad.tensor.const_data_ptr<T>(), *from = x.tensor.const_data_ptr<T>();
  T* to = dx.mutable_data_ptr<T>();
  for_pieces(x.batch * x.channels, pieces, 1, true, [&](int64_t channel, int64_t piece) {
    const int64_t n = channel / x.channels, c = channel % x.channels, start = pieces.begin(piece);
    const int64_t at = c * x.pixels + start;
    kernels.input_run(gradient + n * grad.batch_stride + at, from + n * x.batch_stride + at,
                      to + channel * x.pixels + start, pieces.size(piece), by.at(n, c), silu);
  });
}

// dx, and the sums that the parameters' gradients are made of.
template <class T>
Tensor input_gradient(const Tensor& upstream, const Tensor& input, const Normalisation& norm,
                      Sums& sums) {
  const Loops<T>& kernels = loops<T>();
  const bool last = channels_last(input);
  const Tensor dx = empty_dense(input, last);
  if (input.numel() == 0) return dx;
  const Image x = image(input, last || pixels_of(input) == 1), grad = image(upstream, x.rows);
  const Coefficients<Wide<T>> by(x.batch, x.channels);
  for (int64_t n = 0; n < x.batch; ++n) start_sample(n, x.channels, norm, by.row(n));
  sums = x.rows ? sums_of_rows(grad, x, by, norm.silu, kernels)
                : sums_of_runs(grad, x, by, norm.silu, kernels);
  for (int64_t n = 0; n < x.batch; ++n) finish_sample(n, x, norm, sums, by.row(n));
  if (x.rows) {
    input_of_rows(grad, x, dx, by, norm.silu, kernels);
  } else {
    input_of_runs(grad, x, dx, by, norm.silu, kernels);
  }
  return dx;
}

// Of weight and bias [C] and, where there is FiLM, scale and shift [N, C].
struct ParameterGradients {
  std::vector<double> weight, bias, scale, shift;
};

ParameterGradients parameter_gradients(int64_t batch, int64_t channels, const Normalisation& norm,
                                       const Sums& sums) {
  const Parameters& parameters = norm.parameters;
  ParameterGradients result = {std::vector<double>(channels), std::vector<double>(channels),
                               std::vector<double>(batch * channels), sums.dz};
  for (int64_t n = 0; n < batch; ++n) {
    const double* film = parameters.film.data() + n * parameters.stride;
    for (int64_t c = 0; c < channels; ++c) {
      const double rstd = norm.rstd[n * norm.groups + c / (channels / norm.groups)];
      const double dz = sums.dz[n * channels + c];
      const double dz_hat = sums.dz_d[n * channels + c] * rstd;
      result.weight[c] += film[c] * dz_hat;
      result.bias[c] += film[c] * dz;
      result.scale[n * channels + c] = parameters.weight[c] * dz_hat + parameters.bias[c] * dz;
    }
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t groups,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu) {
  STD_TORCH_CHECK(checks::group_norm_silu_backward(device_of(x), grad, x, mean, rstd, weight, bias,
                                                   groups, scale, shift),
                  "group_norm_silu_backward: arguments that do not fit each other");
  const int64_t batch = x.size(0), channels = x.size(1);
  const Parameters parameters(batch, channels, weight, bias, scale, shift);
  Normalisation norm = {parameters, values<double>(mean), values<double>(rstd), groups, silu};
  if (x.numel() == 0) std::fill(norm.rstd.begin(), norm.rstd.end(), 0.0);  // it is NaN there
  Sums sums(batch * channels);
  const Tensor dx = by_dtype(x, [&]<class T>(T) { return input_gradient<T>(grad, x, norm, sums); });
  const ParameterGradients gradients = parameter_gradients(batch, channels, norm, sums);
  const ScalarType parameter = (weight.has_value() ? *weight : mean).scalar_type();
  const auto film = [&](const std::optional<Tensor>& like, const std::vector<double>& from) {
    return like.has_value() ? tensor_of(from, {batch, channels}, like->scalar_type())
                            : empty({0}, ScalarType::Float);
  };
  return {dx, tensor_of(gradients.weight, {channels}, parameter),
          tensor_of(gradients.bias, {channels}, parameter), film(scale, gradients.scale),
          film(shift, gradients.shift)};
}

}  // namespace palette::cpu
