// The CPU implementations that csrc/ops.cpp binds to the schemas of palette/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
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

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, int64_t heads, const std::string& order);

Tensor attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, int64_t heads, const std::string& order);

Tensor adamw(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
             const std::vector<Tensor>& means, const std::vector<Tensor>& squares,
             const std::vector<Tensor>& steps, const std::vector<Tensor>& averages,
             const std::vector<Tensor>& copies, double lr, double beta1, double beta2, double eps,
             double weight_decay, double limit, double take);

Tensor dropout(const Tensor& x, const Tensor& seeds, double p, int64_t layer);

Tensor noise(const Tensor& seeds, const Tensor& step, const std::vector<int64_t>& shape,
             int64_t stream, int64_t layer);

void reverse_step(const Tensor& state, const Tensor& output, const Tensor& table,
                  const Tensor& step, const std::optional<Tensor>& seeds,
                  const std::optional<Tensor>& noise, const std::optional<Tensor>& history,
                  const std::optional<Tensor>& known, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& slot);

}  // namespace palette::cpu
