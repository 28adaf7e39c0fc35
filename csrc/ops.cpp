// Binds the C++ functions to the schemas that palette/ops defines in Python, in one place.
//
// Compiled into two libraries: palette/_ops_cpu.so, and with PALETTE_CUDA into
// palette/_ops_cuda.so. Only torch's stable ABI is used, so one binary serves every torch from the
// release named by TORCH_TARGET_VERSION on.

#include <torch/csrc/stable/library.h>

#ifdef PALETTE_CUDA

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(palette, CUDA, m) {
  m.impl("attention", TORCH_BOX(&palette::cuda::attention));
  m.impl("attention_backward", TORCH_BOX(&palette::cuda::attention_backward));
  m.impl("dropout", TORCH_BOX(&palette::cuda::dropout));
  m.impl("group_norm_silu", TORCH_BOX(&palette::cuda::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&palette::cuda::group_norm_silu_backward));
  m.impl("noise", TORCH_BOX(&palette::cuda::noise));
  m.impl("reverse_step", TORCH_BOX(&palette::cuda::reverse_step));
}

#else

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(palette, CPU, m) {
  m.impl("adamw", TORCH_BOX(&palette::cpu::adamw));
  m.impl("attention", TORCH_BOX(&palette::cpu::attention));
  m.impl("attention_backward", TORCH_BOX(&palette::cpu::attention_backward));
  m.impl("dropout", TORCH_BOX(&palette::cpu::dropout));
  m.impl("group_norm_silu", TORCH_BOX(&palette::cpu::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&palette::cpu::group_norm_silu_backward));
  m.impl("noise", TORCH_BOX(&palette::cpu::noise));
  m.impl("reverse_step", TORCH_BOX(&palette::cpu::reverse_step));
}

#endif
