// The few words in which a kernel on a GPU and its emulation on a CPU differ.
//
// Every kernel of this folder also compiles as plain C++ against tests/cuda/emulate.h
// (g++ -x c++ -DPALETTE_EMULATE -include tests/cuda/emulate.h), which is how it is proven where
// there is no GPU. Kernels are launched through launch() instead of <<<>>>, and use no dynamic
// shared memory.
#pragma once

#ifndef PALETTE_EMULATE

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace palette {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
                   cudaStream_t stream, Arguments... arguments) {
  // The widest grid axis holds 2^31 - 1 blocks; kernels that could need more stride over the grid.
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace palette

#endif  // PALETTE_EMULATE
