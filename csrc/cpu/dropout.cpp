// palette::dropout on the CPU: the words of Philox4x32-10 are made and compared in registers, so
// that no mask is ever stored.
//
// Contiguous, the four words of a counter are neighbours. Channels-last, the counters of one vector
// belong to neighbouring channels, and their words to four pixels; that wants a number of pixels
// that four divides, and other images take the contiguous way through copies.

#include "dropout.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace palette::cpu {
namespace {

constexpr uint32_t kStream = 3;           // of dropout, palette/ops/philox.py
constexpr int64_t kElementsOfRun = 8192;  // worth a thread, some microseconds

// What all elements of an image share.
struct Drop {
  NoiseStream stream;
  uint32_t first;
  double scale;
};

// `count` times four pixels from quad `first` on, of the `plane` quads that a channel has.
struct Quads {
  int64_t first, count, plane, channels, from_stride;
};

// The leaf functions of one instruction set.
template <class T>
struct Loops {
  // Elements in [C, H, W] order, from the first one of a counter on.
  void (*run)(const Drop& drop, uint32_t counter, const T* from, int64_t count, T* to);
  // Pixels with their channels side by side.
  void (*rows)(const Drop& drop, const Quads& quads, const T* from, T* to);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/dropout_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

template <class T>
void apply(const Image& x, const std::vector<Drop>& drops, const Tensor& out) {
  const Loops<T>& kernels = loops<T>();
  const T* from = x.tensor.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t elements = x.channels * x.pixels;
  // An image is cut into runs of `length`: of elements, or of quads of pixels.
  const int64_t whole = x.rows ? x.pixels / 4 : elements;
  const int64_t length =
      x.rows ? std::max<int64_t>(1, kElementsOfRun / (4 * x.channels)) : kElementsOfRun;
  const int64_t runs = (whole + length - 1) / length;
  torch::stable::parallel_for(0, x.batch * runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / runs, first = i % runs * length;
      const int64_t count = std::min(length, whole - first);
      const T* image = from + n * x.batch_stride;
      T* place = to + n * elements;
      if (x.rows) {
        const Quads quads{first, count, whole, x.channels, x.pixel_stride};
        kernels.rows(drops[n], quads, image + 4 * first * x.pixel_stride,
                     place + 4 * first * x.channels);
      } else {
        kernels.run(drops[n], static_cast<uint32_t>(first / 4), image + first, count,
                    place + first);
      }
    }
  });
}

}  // namespace

Tensor dropout(const Tensor& x, const Tensor& seeds, double p, int64_t layer) {
  STD_TORCH_CHECK(checks::dropout(device_of(x), x, seeds, p, layer),
                  "dropout: arguments that do not fit each other");
  const bool rows = channels_last(x);
  Tensor out = empty_dense(x, rows);
  if (x.numel() == 0) return out;
  const Tensor keys = torch::stable::contiguous(seeds);
  std::vector<Drop> drops;
  for (int64_t n = 0; n < keys.numel(); ++n) {
    const uint64_t seed = static_cast<uint64_t>(keys.const_data_ptr<int64_t>()[n]);
    drops.push_back({{seed, 0, kStream, static_cast<uint32_t>(layer)}, first_kept(p), 1 / (1 - p)});
  }
  const bool direct = !rows || pixels_of(x) % 4 == 0;
  const Image from = image(x, rows && direct);
  const Tensor target = direct ? out : empty_dense(x, false);
  by_dtype(x, [&]<class T>(T) { apply<T>(from, drops, target); });
  if (!direct) torch::stable::copy_(out, target);
  return out;
}

}  // namespace palette::cpu
