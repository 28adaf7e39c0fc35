// The Python module palette._build: what was compiled, with what and for what. No tensor code.

#include <pybind11/pybind11.h>

#include <string>

namespace {

// Instruction sets of the processor this runs on, among those that a kernel chooses from.
pybind11::list instruction_sets() {
  pybind11::list found;
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.append("avx2");
  if (__builtin_cpu_supports("fma")) found.append("fma");
  if (__builtin_cpu_supports("avx512f")) found.append("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.append("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.append("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.append("avx512dq");
  if (__builtin_cpu_supports("avx512bf16")) found.append("avx512bf16");
#elif defined(__aarch64__)
  found.append("neon");
#endif
  return found;
}

pybind11::dict facts() {
  pybind11::dict built;
  built["compiler"] = PALETTE_COMPILER;
  built["torch"] = PALETTE_TORCH_VERSION;
  built["torch_target"] = PALETTE_TORCH_TARGET;
  built["nvcc"] = PALETTE_NVCC;
  built["cuda_architectures"] = PALETTE_CUDA_ARCHITECTURES;
  built["cuda_absence"] = PALETTE_CUDA_ABSENCE;
  return built;
}

}  // namespace

PYBIND11_MODULE(_build, module) {
  module.doc() = "What was compiled, with what and for what.";
  module.def("facts", &facts, "Versions and targets of the compiled libraries.");
  module.def("instruction_sets", &instruction_sets, "Vector instruction sets of this processor.");
}
