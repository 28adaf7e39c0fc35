// Whether the arguments of an op fit each other: both libraries ask before they read anything,
// whoever calls. What is wrong with them palette/ops says, and only where something is.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>

namespace palette {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Positions per channel of x [N, C, ...].
inline int64_t pixels_of(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  return pixels;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline bool is_legacy(const std::string& order) {
  STD_TORCH_CHECK(order == "legacy" || order == "new", "attention: order is '", order,
                  "', wanted 'legacy' or 'new'");
  return order == "legacy";
}

// The device whose memory a kernel reads: a kind (aoti_torch_device_type_...), and which of them.
struct Device {
  int32_t type, index;

  bool has(const Tensor& tensor) const {
    int32_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &found));
    return found == type && tensor.get_device_index() == index;
  }
  bool has(const Tensor& tensor, ScalarType dtype) const {
    return has(tensor) && tensor.scalar_type() == dtype;
  }
  bool has_floating(const Tensor& tensor) const {
    constexpr ScalarType kFloating[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                        ScalarType::Double};
    return has(tensor) && std::ranges::find(kFloating, tensor.scalar_type()) != std::end(kFloating);
  }
};

namespace checks {

// Whether there is an integer for each of so many samples, or one for all.
inline bool counts(const Device& device, const Tensor& numbers, int64_t samples, bool scalar) {
  if (!device.has(numbers, ScalarType::Long)) return false;
  return numbers.dim() == 0 ? scalar : numbers.dim() == 1 && numbers.size(0) == samples;
}

// --- attention ---

inline bool attention(const Device& device, const Tensor& qkv, int64_t heads) {
  return device.has_floating(qkv) && heads >= 1 && (qkv.dim() == 3 || qkv.dim() == 4) &&
         qkv.size(1) > 0 && qkv.size(1) % (3 * heads) == 0;
}

// Whether a tensor is like the result of attention on qkv.
inline bool attended(const Device& device, const Tensor& tensor, const Tensor& qkv) {
  return device.has(tensor, qkv.scalar_type()) && tensor.dim() == qkv.dim() &&
         tensor.size(0) == qkv.size(0) && tensor.size(1) * 3 == qkv.size(1) &&
         pixels_of(tensor) == pixels_of(qkv);
}

inline bool attention_backward(const Device& device, const Tensor& grad, const Tensor& qkv,
                               const Tensor& out, const Tensor& lse, int64_t heads) {
  const ScalarType wide =
      qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return attention(device, qkv, heads) && attended(device, grad, qkv) &&
         attended(device, out, qkv) && device.has(lse, wide) &&
         lse.numel() == qkv.size(0) * heads * pixels_of(qkv);
}

// --- group_norm_silu ---

// Whether a parameter has the sizes of x from dimension `first` to the channels, and a dtype to go
// with x.
inline bool parameter(const Device& device, const std::optional<Tensor>& value, const Tensor& x,
                      int64_t first) {
  if (!value.has_value()) return true;
  const ScalarType dtype = value->scalar_type();
  bool fits = device.has(*value) && value->dim() == 2 - first &&
              (dtype == x.scalar_type() || dtype == ScalarType::Float);
  for (int64_t d = first; fits && d < 2; ++d) fits = value->size(d - first) == x.size(d);
  return fits;
}

inline bool alike(const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  return !a.has_value() || !b.has_value() || a->scalar_type() == b->scalar_type();
}

inline bool group_norm_silu(const Device& device, const Tensor& x,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            int64_t groups, double eps, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& shift) {
  return device.has(x) && x.dim() >= 2 && groups >= 1 && x.size(1) % groups == 0 && eps >= 0.0 &&
         std::isfinite(eps) && parameter(device, weight, x, 1) && parameter(device, bias, x, 1) &&
         alike(weight, bias) && parameter(device, scale, x, 0) && parameter(device, shift, x, 0) &&
         alike(scale, shift);
}

// Whether there is a number for each group of each sample, in the dtype that x is computed in.
inline bool of_groups(const Device& device, const Tensor& statistic, const Tensor& x,
                      int64_t groups) {
  const ScalarType wide =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return device.has(statistic, wide) && statistic.dim() == 2 && statistic.size(0) == x.size(0) &&
         statistic.size(1) == groups;
}

inline bool group_norm_silu_backward(const Device& device, const Tensor& grad, const Tensor& x,
                                     const Tensor& mean, const Tensor& rstd,
                                     const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, int64_t groups,
                                     const std::optional<Tensor>& scale,
                                     const std::optional<Tensor>& shift) {
  return group_norm_silu(device, x, weight, bias, groups, 0.0, scale, shift) &&
         device.has(grad, x.scalar_type()) && same_shape(grad, x) &&
         of_groups(device, mean, x, groups) && of_groups(device, rstd, x, groups);
}

// --- dropout and noise ---

inline bool dropout(const Device& device, const Tensor& x, const Tensor& seeds, double p,
                    int64_t layer) {
  const bool fits = device.has_floating(x) && x.dim() >= 2 &&
                    counts(device, seeds, x.size(0), false) && p >= 0.0 && p < 1.0 && layer >= 0 &&
                    layer < int64_t{1} << 32;
  int64_t elements = 1;
  for (int64_t d = 1; fits && d < x.dim(); ++d) elements *= x.size(d);
  return fits && elements <= int64_t{1} << 34;
}

inline bool noise(const Device& device, const Tensor& seeds, const Tensor& step) {
  return seeds.dim() == 1 && counts(device, seeds, seeds.size(0), false) &&
         counts(device, step, seeds.size(0), true);
}

// --- reverse_step ---

// Whether a picture, where there is one, has the shape and the dtype of the state.
inline bool like(const Device& device, const std::optional<Tensor>& picture, const Tensor& state) {
  return !picture || (device.has(*picture, ScalarType::Float) && same_shape(*picture, state));
}

// Whether every element has its own place in memory, as far as strides of zero tell.
inline bool writable(const std::optional<Tensor>& tensor) {
  bool each = true;
  for (int64_t d = 0; tensor && d < tensor->dim(); ++d) {
    each = each && (tensor->size(d) <= 1 || tensor->stride(d) != 0);
  }
  return each;
}

inline bool broadcasts(const Device& device, const std::optional<Tensor>& mask,
                       const Tensor& state) {
  if (!mask.has_value()) return true;
  bool fits = device.has(*mask, ScalarType::Float) && mask->dim() <= 4;
  for (int64_t d = 1; fits && d <= mask->dim(); ++d) {
    const int64_t size = mask->size(mask->dim() - d);
    fits = size == 1 || size == state.size(4 - d);
  }
  return fits;
}

inline bool reverse_step(const Device& device, const Tensor& state, const Tensor& output,
                         const Tensor& table, const Tensor& step,
                         const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise,
                         const std::optional<Tensor>& history, const std::optional<Tensor>& known,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& slot) {
  return device.has(state, ScalarType::Float) && state.dim() == 4 && device.has_floating(output) &&
         same_shape(output, state) && device.has(table, ScalarType::Float) && table.dim() == 2 &&
         table.size(0) >= 1 && table.size(1) == 6 && counts(device, step, state.size(0), true) &&
         (!seeds || (counts(device, *seeds, state.size(0), false) && !noise)) &&
         like(device, noise, state) && like(device, history, state) && like(device, known, state) &&
         known.has_value() == mask.has_value() && broadcasts(device, mask, state) &&
         (!slot || (device.has_floating(*slot) && same_shape(*slot, state))) && writable(state) &&
         writable(history) && writable(slot);
}

}  // namespace checks
}  // namespace palette
