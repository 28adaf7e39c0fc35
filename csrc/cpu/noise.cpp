// palette::noise on the CPU: Philox4x32-10 words (Salmon et al., SC 2011) and Box-Muller normals.
//
// The counters of a run are worked on side by side. No step is contracted or reordered, so the
// instruction sets agree in every bit.

#include "cpu/noise.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace palette::cpu {
namespace {

// The leaf function of one instruction set; there is one dtype only.
template <class T>
struct Loops {
  FillNoise fill;
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/noise_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {

FillNoise fill_noise() { return loops<float>().fill; }

Tensor noise(const Tensor& seeds, const Tensor& step, const std::vector<int64_t>& shape,
             int64_t stream, int64_t layer) {
  STD_TORCH_CHECK(checks::noise(device_of(seeds), seeds, step), "noise: seeds and step do not fit");
  const Tensor keys = torch::stable::contiguous(seeds);
  const Tensor steps = torch::stable::contiguous(step);
  const int64_t images = keys.numel();
  std::vector<int64_t> sizes{images};
  int64_t elements = 1;
  for (const int64_t size : shape) {
    sizes.push_back(size);
    elements *= size;
  }
  Tensor out = torch::stable::new_empty(keys, sizes, torch::headeronly::ScalarType::Float);
  if (images * elements == 0) return out;

  const FillNoise fill_run = fill_noise();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int64_t* step_of = steps.const_data_ptr<int64_t>();
  const int64_t step_stride = steps.numel() == 1 ? 0 : 1;
  float* target = out.mutable_data_ptr<float>();
  const int64_t runs = (elements + kNormals - 1) / kNormals;
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / runs;
      const int64_t first = i % runs * kNormals;
      const NoiseStream one{static_cast<uint64_t>(key[image]),
                            static_cast<uint32_t>(step_of[image * step_stride]),
                            static_cast<uint32_t>(stream), static_cast<uint32_t>(layer)};
      float* place = target + image * elements + first;
      if (first + kNormals <= elements) {
        fill_run(one, static_cast<uint32_t>(first / 4), place);
      } else {
        float last[kNormals];
        fill_run(one, static_cast<uint32_t>(first / 4), last);
        std::copy_n(last, elements - first, place);
      }
    }
  };
  constexpr int64_t kRunsPerTask = 32;  // 8192 normals, about 8 us of work
  torch::stable::parallel_for(0, images * runs, kRunsPerTask, work);
  return out;
}

}  // namespace palette::cpu
