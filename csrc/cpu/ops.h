// The CPU implementations that csrc/ops.cpp binds to the schemas of palette/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace palette::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias,
                                                   int64_t groups, double eps,
                                                   const std::optional<Tensor>& scale,
                                                   const std::optional<Tensor>& shift, bool silu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t groups,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu);

Tensor noise(const Tensor& seeds, const Tensor& step, const std::vector<int64_t>& shape,
             int64_t stream, int64_t layer);

}  // namespace palette::cpu
