// Runs CUDA kernels on a CPU, so that they can be proven where there is no GPU.
//
//     g++ -x c++ -std=c++20 -DPALETTE_EMULATE -include tests/cuda/emulate.h csrc/cuda/<op>.cu
//
// The blocks of a grid run one after the other, the threads of a block as fibers that give way only
// at barriers and warp exchanges. A barrier or exchange that some thread never reaches ends the
// program with a message. emulate_order, or EMULATE_ORDER in the environment, sets the order in
// which threads and blocks run: a kernel with a missing barrier, or with blocks that depend on one
// another, gives different bits in different orders. emulate_edges leaves out all but the first and
// last blocks of every grid, for tensors too large to walk through (is an address still right
// beyond 2^31?).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __builtin_assume(condition) (void)0

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "nothing fails here"; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

// A fiber is made once and runs the body of one thread after another: ucontext gives it its stack,
// and from then on it is switched to and from by jumps, which cost no system call.
struct Fiber {
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool finished = false;
};

inline Fiber fibers[kMaxThreads];
inline jmp_buf scheduler;
inline unsigned current, live;
inline bool progress;
inline Barrier block_barrier, warp_barriers[kMaxThreads / kWarp];
inline unsigned char exchanged[kMaxThreads][8];
inline std::function<void()> body;
// 0: first thread first, 1: last thread first, 2: differs from round to round.
inline int order = std::getenv("EMULATE_ORDER") ? std::atoi(std::getenv("EMULATE_ORDER")) : 0;
// Blocks at either end of a grid that run; 0: all.
inline unsigned edges = 0;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "emulate: %s (block %u, thread %u)\n", reason, blockIdx.x, current);
  std::abort();
}

inline void give_way() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  }
  while (barrier.generation == generation) give_way();
}

inline void wait_for_warp() {
  const unsigned warp = current / kWarp;
  const unsigned lanes = blockDim.x - warp * kWarp;
  wait(warp_barriers[warp], lanes < kWarp ? lanes : kWarp);
}

// The value that lane `source` of the same warp brought to the same exchange.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(exchanged[0]), "at most eight bytes a lane");
  if (mask != 0xffffffffu) fail("only whole warps may exchange values");
  std::memcpy(exchanged[current], &value, sizeof(T));
  wait_for_warp();
  const unsigned lane = current % kWarp;
  const unsigned from = current - lane + (source < kWarp ? source : lane);
  if (from >= blockDim.x) fail("a warp exchange reads a lane that does not exist");
  std::memcpy(&value, exchanged[from], sizeof(T));
  wait_for_warp();
  return value;
}

inline void run_fiber() {
  for (;;) {
    body();
    fibers[current].finished = true;
    --live;
    progress = true;
    give_way();
  }
}

inline void resume(unsigned thread) {
  current = threadIdx.x = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

inline void run_block() {
  for (unsigned t = 0; t < blockDim.x; ++t) fibers[t].finished = false;
  live = blockDim.x;
  for (unsigned round = 0; live > 0; ++round) {
    progress = false;
    const unsigned start = order == 2 ? (round * 2654435761u) % blockDim.x : 0;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      unsigned thread = (start + i) % blockDim.x;
      if (order == 1 || (order == 2 && round % 2)) thread = blockDim.x - 1 - thread;
      if (!fibers[thread].finished) resume(thread);
    }
    if (!progress) fail("threads wait at a barrier that others never reach");
  }
}

}  // namespace emulate

#define EMULATE_EXPORT extern "C" __attribute__((used)) inline
EMULATE_EXPORT void emulate_order(int order) { emulate::order = order; }
EMULATE_EXPORT void emulate_edges(unsigned blocks) { emulate::edges = blocks; }

namespace palette {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, cudaStream_t,
                   Arguments... arguments) {
  if (blocks < 1 || threads < 1 || threads > emulate::kMaxThreads) emulate::fail("bad launch");
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = threads;
  emulate::body = [=] { kernel(arguments...); };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = emulate::order == 0 ? block : gridDim.x - 1 - block;
    const bool edge = block < emulate::edges || gridDim.x - 1 - block < emulate::edges;
    if (emulate::edges == 0 || edge) emulate::run_block();
  }
  return cudaSuccess;
}

}  // namespace palette

inline void __syncthreads() { emulate::wait(emulate::block_barrier, blockDim.x); }
inline void __syncwarp() { emulate::wait_for_warp(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return emulate::exchange(mask, value, lane % emulate::kWarp);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return emulate::exchange(mask, value, threadIdx.x % emulate::kWarp + delta);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return emulate::exchange(mask, value, (threadIdx.x % emulate::kWarp) ^ lanes);
}

// Vectors and half types, with the names and the roundings of CUDA's headers.
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  _Float16 value;
};
inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 half) {
  const uint32_t bits = static_cast<uint32_t>(half.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Separately rounded operations (nothing here may be contracted: compiled with -ffp-contract=off),
// and the fast forms of CUDA, which are as good as the ones of the C library or worse.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x * (1.0f / y); }
