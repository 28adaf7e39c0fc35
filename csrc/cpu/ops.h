// The CPU implementations that csrc/ops.cpp binds to the schemas of palette/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace palette::cpu {

using torch::stable::Tensor;

Tensor noise(const Tensor& seeds, const Tensor& step, const std::vector<int64_t>& shape,
             int64_t stream, int64_t layer);

}  // namespace palette::cpu
