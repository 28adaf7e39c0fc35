// palette::adamw on the CPU: the norm of all gradients in one pass over them, and in another the
// step, the average and the rounded copy. Every tensor is walked through as it lies in memory.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace palette::cpu {
namespace {

constexpr int64_t kBlock = 8192;   // elements that stay in the nearest cache from loop to loop
constexpr int64_t kPiece = 65536;  // elements of one tensor that a thread takes at a time

// What all elements of a tensor are advanced by.
struct Factors {
  float fresh1, beta2, fresh2, root, eps, kept, rate;
};

// Leaf functions of one instruction set; T is the dtype of a gradient or of a copy.
template <class T>
struct Loops {
  double (*squares)(const T* from, int64_t count);
  void (*read)(const T* from, int64_t count, float scale, float* to);
  void (*write)(const float* from, int64_t count, T* to);
  void (*advance)(const Factors& by, int64_t count, const float* grad, float* weight, float* mean,
                  float* square);
  void (*average)(float take, int64_t count, const float* weight, float* average);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/adamw_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

using Tensors = std::vector<Tensor>;

bool narrow(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 || tensor.scalar_type() == ScalarType::Half;
}

// body(T()) for the dtypes of gradients and copies.
template <class F>
auto by_float(const Tensor& x, const F& body) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return body(BFloat16());
    case ScalarType::Half:
      return body(Half());
    default:
      return body(float());
  }
}

// Whether the elements fill a run of memory, each with its own place.
bool dense(const Tensor& tensor) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.push_back(d);
  }
  std::ranges::sort(dims, {}, [&](int64_t d) { return tensor.stride(d); });
  int64_t next = 1;
  for (const int64_t d : dims) {
    if (tensor.stride(d) != next) return false;
    next *= tensor.size(d);
  }
  return true;
}

// Whether two tensors have their elements in the same order in memory.
bool alike(const Tensor& a, const Tensor& b) {
  bool same = a.is_cpu() && same_shape(a, b);
  for (int64_t d = 0; same && d < a.dim(); ++d) {
    same = a.size(d) <= 1 || a.stride(d) == b.stride(d);
  }
  return same;
}

bool wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

bool fit(const Tensors& weights, const Tensors& grads, const Tensors& means, const Tensors& squares,
         const Tensors& steps, const Tensors& averages, const Tensors& copies) {
  const size_t count = weights.size();
  if (grads.size() != count || means.size() != count || squares.size() != count ||
      steps.size() != count || (!averages.empty() && averages.size() != count) ||
      (!copies.empty() && copies.size() != count)) {
    return false;
  }
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const auto like = [&](const Tensor& tensor) { return wide(tensor) && alike(tensor, weight); };
    if (!like(weight) || !dense(weight) || !like(means[i]) || !like(squares[i])) return false;
    if (!(narrow(grads[i]) ? alike(grads[i], weight) : like(grads[i]))) return false;
    if (!steps[i].is_cpu() || !wide(steps[i]) || steps[i].dim() != 0) return false;
    if (!averages.empty() && !like(averages[i])) return false;
    if (!copies.empty() && copies[i].numel() > 0 &&
        !(narrow(copies[i]) && alike(copies[i], weight))) {
      return false;
    }
  }
  return true;
}

// The pieces of all tensors, one after another.
class Cut {
 public:
  explicit Cut(const Tensors& tensors) : first_{0} {
    for (const Tensor& tensor : tensors) {
      sizes_.push_back(tensor.numel());
      first_.push_back(first_.back() + (sizes_.back() + kPiece - 1) / kPiece);
    }
  }
  int64_t pieces() const { return first_.back(); }

  // body(piece, tensor, begin, count) for every piece, in parallel.
  template <class Body>
  void each(const Body& body) const {
    torch::stable::parallel_for(0, pieces(), 1, [&](int64_t from, int64_t to) {
      for (int64_t piece = from; piece < to; ++piece) {
        const int64_t tensor = std::ranges::upper_bound(first_, piece) - first_.begin() - 1;
        const int64_t begin = (piece - first_[tensor]) * kPiece;
        body(piece, tensor, begin, std::min(kPiece, sizes_[tensor] - begin));
      }
    });
  }

 private:
  std::vector<int64_t> sizes_, first_;  // first_: of each tensor's pieces, and their number
};

double norm_of(const Tensors& grads, const Cut& cut) {
  std::vector<double> parts(cut.pieces());
  cut.each([&](int64_t piece, int64_t tensor, int64_t begin, int64_t count) {
    by_float(grads[tensor], [&]<class T>(T) {
      const T* grad = grads[tensor].const_data_ptr<T>() + begin;
      for (int64_t at = 0; at < count; at += kBlock) {
        parts[piece] += loops<T>().squares(grad + at, std::min(kBlock, count - at));
      }
    });
  });
  double sum = 0.0;
  for (const double part : parts) sum += part;
  return std::sqrt(sum);
}

}  // namespace

Tensor adamw(const Tensors& weights, const Tensors& grads, const Tensors& means,
             const Tensors& squares, const Tensors& steps, const Tensors& averages,
             const Tensors& copies, double lr, double beta1, double beta2, double eps,
             double weight_decay, double limit, double take) {
  STD_TORCH_CHECK(fit(weights, grads, means, squares, steps, averages, copies),
                  "adamw: arguments that do not fit each other");
  const Cut cut(weights);
  const double norm = norm_of(grads, cut);
  const Tensor result = empty({}, ScalarType::Float);
  *result.mutable_data_ptr<float>() = static_cast<float>(norm);
  if (!std::isfinite(static_cast<float>(norm))) return result;

  const float scale = limit > 0.0 ? static_cast<float>(std::min(1.0, limit / (norm + 1e-6))) : 1.0f;
  std::vector<Factors> factors;
  for (const Tensor& step : steps) {
    const double n = *step.mutable_data_ptr<float>() += 1.0f;
    const double first = 1.0 - std::pow(beta1, n), second = 1.0 - std::pow(beta2, n);
    factors.push_back({static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
                       static_cast<float>(1.0 - beta2), static_cast<float>(1.0 / std::sqrt(second)),
                       static_cast<float>(eps), static_cast<float>(1.0 - lr * weight_decay),
                       static_cast<float>(lr / first)});
  }
  const Loops<float>& kernels = loops<float>();
  cut.each([&](int64_t, int64_t i, int64_t begin, int64_t length) {
    float buffer[kBlock];
    for (int64_t at = begin; at < begin + length; at += kBlock) {
      const int64_t count = std::min(kBlock, begin + length - at);
      by_float(grads[i], [&]<class T>(T) {
        loops<T>().read(grads[i].const_data_ptr<T>() + at, count, scale, buffer);
      });
      float* weight = weights[i].mutable_data_ptr<float>() + at;
      kernels.advance(factors[i], count, buffer, weight, means[i].mutable_data_ptr<float>() + at,
                      squares[i].mutable_data_ptr<float>() + at);
      if (!averages.empty()) {
        kernels.average(static_cast<float>(take), count, weight,
                        averages[i].mutable_data_ptr<float>() + at);
      }
      if (copies.empty() || copies[i].numel() == 0) continue;
      by_float(copies[i], [&]<class T>(T) {
        loops<T>().write(weight, count, copies[i].mutable_data_ptr<T>() + at);
      });
    }
  });
  return result;
}

}  // namespace palette::cpu
