// One solver step on the CPU, in one pass: the steps of a run of pixels happen in registers, its
// noise is made in the nearest cache, and operands in other layouts or dtypes pass through it.
//
// Every product and sum is rounded on its own, in the order of palette/ops/reverse_step.py.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
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

constexpr int64_t kPixels = 512;             // of one channel, worked on at a time
constexpr int64_t kParallelElements = 8192;  // work worth a thread

// A row of the table.
struct Row {
  float a, b, c1, c2, c3, sigma;
};

// The same pixels of one channel in every operand, adjacent; null where there is no such operand.
// `state` and `history` are read and written.
struct Run {
  float* state;
  float* history;
  const float *output, *noise, *known, *mask;
};

// Leaf functions of one instruction set; T is the dtype that a run is read from or written to.
template <class T>
struct Loops {
  void (*advance)(const Run& run, const Row& row, int64_t count);
  // At most kPixels elements, `step` apart in the operand.
  void (*read)(T* from, int64_t step, int64_t count, float* to);
  void (*write)(float* from, int64_t count, T* to, int64_t step);
  // Three channels, adjacent in the operand.
  void (*write_three)(const float* const* from, int64_t count, T* to, int64_t step);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/reverse_step_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

// An operand [N, C, H, W] of any strides. The pixels of a channel lie `step` apart, in lines of
// `width` pixels that start `line` apart: one line for all pixels where the strides allow.
struct Operand {
  const Tensor& tensor;
  void* data;
  int64_t sample, channel, line, step, width;

  // As `shape`, to which the tensor is broadcast.
  Operand(const Tensor& tensor, const Tensor& shape) : tensor(tensor), data(tensor.data_ptr()) {
    int64_t strides[4] = {};
    for (int64_t d = 1; d <= tensor.dim(); ++d) {
      const int64_t size = tensor.size(tensor.dim() - d);
      strides[4 - d] = size == 1 && shape.size(4 - d) != 1 ? 0 : tensor.stride(tensor.dim() - d);
    }
    const int64_t rows = shape.size(2), columns = shape.size(3);
    sample = strides[0], channel = strides[1];
    line = strides[2], step = columns == 1 ? strides[2] : strides[3], width = columns;
    if (rows == 1 || columns == 1 || line == columns * step) width = rows * columns;
  }

  // body(offset, first, length) for every part with one stride of `count` pixels from `begin` on:
  // its place in memory and its place among the `count`.
  template <class Body>
  void lines(int64_t n, int64_t c, int64_t begin, int64_t count, const Body& body) const {
    for (int64_t done = 0; done < count;) {
      const int64_t row = (begin + done) / width, column = (begin + done) % width;
      const int64_t length = std::min(count - done, width - column);
      body(n * sample + c * channel + row * line + column * step, done, length);
      done += length;
    }
  }
};

template <class T>
void read(const Operand& from, int64_t n, int64_t c, int64_t begin, int64_t count, float* to) {
  const Loops<T>& kernels = loops<T>();
  T* data = static_cast<T*>(from.data);
  from.lines(n, c, begin, count, [&](int64_t offset, int64_t first, int64_t length) {
    kernels.read(data + offset, from.step, length, to + first);
  });
}

template <class T>
void write(const Operand& to, int64_t n, int64_t c, int64_t begin, int64_t count, float* from) {
  const Loops<T>& kernels = loops<T>();
  T* data = static_cast<T*>(to.data);
  to.lines(n, c, begin, count, [&](int64_t offset, int64_t first, int64_t length) {
    kernels.write(from + first, length, data + offset, to.step);
  });
}

// The run of an operand as float32: in place where its memory allows, else in `buffer`.
float* run_of(const std::optional<Operand>& operand, int64_t n, int64_t c, int64_t begin,
              int64_t count, float* buffer) {
  if (!operand.has_value()) return nullptr;
  const bool whole = begin % operand->width + count <= operand->width;
  if (operand->tensor.scalar_type() == ScalarType::Float && operand->step == 1 && whole) {
    float* place = nullptr;
    operand->lines(n, c, begin, count, [&](int64_t offset, int64_t, int64_t) {
      place = static_cast<float*>(operand->data) + offset;
    });
    return place;
  }
  by_dtype(operand->tensor, [&]<class T>(T) { read<T>(*operand, n, c, begin, count, buffer); });
  return buffer;
}

void write_run(const std::optional<Operand>& operand, int64_t n, int64_t c, int64_t begin,
               int64_t count, float* from) {
  by_dtype(operand->tensor, [&]<class T>(T) { write<T>(*operand, n, c, begin, count, from); });
}

struct Operands {
  std::optional<Operand> state, output, noise, history, known, mask, slot;
};

// Whether the three channels of a picture can be written side by side, from where they lie.
bool as_three(const Operands& operands, int64_t channels, int64_t pixels) {
  if (!operands.slot.has_value() || channels != 3) return false;
  const Operand &state = *operands.state, &slot = *operands.slot;
  return slot.channel == 1 && slot.step > 1 && slot.width == pixels && state.step == 1 &&
         state.width == pixels;
}

// `count` pixels of all three channels from `begin` on.
void write_slot(const Operands& operands, int64_t n, int64_t begin, int64_t count) {
  const Operand &state = *operands.state, &slot = *operands.slot;
  const float* first = static_cast<float*>(state.data) + n * state.sample + begin;
  const float* from[3] = {first, first + state.channel, first + 2 * state.channel};
  by_dtype(slot.tensor, [&]<class T>(T) {
    T* to = static_cast<T*>(slot.data) + n * slot.sample + begin * slot.step;
    loops<T>().write_three(from, count, to, slot.step);
  });
}

// What one sample has to itself, but for its numbers.
struct Sample {
  int64_t number;
  Row row;
  std::optional<NoiseStream> noise;
};

// The noise of the elements from `first` on, in the memory of `buffer`.
const float* make_noise(FillNoise fill, const NoiseStream& stream, int64_t first, int64_t count,
                        float* buffer) {
  const int64_t skipped = first % 4;  // elements of the first counter
  for (int64_t made = 0; made < skipped + count; made += kNormals) {
    fill(stream, static_cast<uint32_t>((first + made) / 4), buffer + made);
  }
  return buffer + skipped;
}

// `count` pixels of channel c from `begin` on, in the slot too where that is wanted.
void advance_run(const Operands& operands, const Sample& sample, FillNoise fill, int64_t pixels,
                 int64_t c, int64_t begin, int64_t count, bool slot) {
  const int64_t n = sample.number;
  float buffers[5][kPixels], normals[kPixels + kNormals];
  const auto get = [&](const std::optional<Operand>& operand, float* buffer) {
    return run_of(operand, n, c, begin, count, buffer);
  };
  Run run = {get(operands.state, buffers[0]),  get(operands.history, buffers[1]),
             get(operands.output, buffers[2]), get(operands.noise, normals),
             get(operands.known, buffers[3]),  get(operands.mask, buffers[4])};
  if (sample.noise.has_value()) {
    run.noise = make_noise(fill, *sample.noise, c * pixels + begin, count, normals);
  }
  loops<float>().advance(run, sample.row, count);
  if (run.state == buffers[0]) write_run(operands.state, n, c, begin, count, run.state);
  if (run.history == buffers[1]) write_run(operands.history, n, c, begin, count, run.history);
  if (slot) write_run(operands.slot, n, c, begin, count, run.state);
}

// The index in the table of every sample.
std::vector<int64_t> steps_of(const Tensor& step, int64_t batch, int64_t rows) {
  const int64_t* data = step.const_data_ptr<int64_t>();
  std::vector<int64_t> steps(batch);
  for (int64_t n = 0; n < batch; ++n) {
    steps[n] = data[step.dim() == 0 ? 0 : n * step.stride(0)];
    STD_TORCH_CHECK(steps[n] >= 0 && steps[n] < rows, "reverse_step: step is ", steps[n],
                    ", wanted a number in [0, ", rows, ")");
  }
  return steps;
}

std::vector<Sample> samples_of(int64_t batch, const Tensor& table, const Tensor& step,
                               const std::optional<Tensor>& seeds) {
  const std::vector<float> rows = values<float>(table);
  const std::vector<int64_t> steps = steps_of(step, batch, table.size(0));
  std::vector<Sample> samples;
  for (int64_t n = 0; n < batch; ++n) {
    const float* row = rows.data() + steps[n] * 6;
    samples.push_back({n, {row[0], row[1], row[2], row[3], row[4], row[5]}, std::nullopt});
    if (!seeds.has_value()) continue;
    const int64_t seed = seeds->const_data_ptr<int64_t>()[n * seeds->stride(0)];
    samples.back().noise = {static_cast<uint64_t>(seed), static_cast<uint32_t>(steps[n] + 1), 0, 0};
  }
  return samples;
}

}  // namespace

void reverse_step(const Tensor& state, const Tensor& output, const Tensor& table,
                  const Tensor& step, const std::optional<Tensor>& seeds,
                  const std::optional<Tensor>& noise, const std::optional<Tensor>& history,
                  const std::optional<Tensor>& known, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& slot) {
  STD_TORCH_CHECK(checks::reverse_step(device_of(state), state, output, table, step, seeds, noise,
                                       history, known, mask, slot),
                  "reverse_step: arguments that do not fit each other");
  const int64_t batch = state.size(0), channels = state.size(1);
  const int64_t pixels = state.size(2) * state.size(3);
  const std::vector<Sample> samples = samples_of(batch, table, step, seeds);
  if (state.numel() == 0) return;

  const auto operand = [&](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Operand>({*tensor, state}) : std::nullopt;
  };
  const Operands operands = {Operand(state, state), Operand(output, state), operand(noise),
                             operand(history),      operand(known),         operand(mask),
                             operand(slot)};
  const FillNoise fill = fill_noise();
  const bool three = as_three(operands, channels, pixels);
  const bool each = slot.has_value() && !three;
  const int64_t runs = (pixels + kPixels - 1) / kPixels;
  const int64_t grain =
      std::max<int64_t>(1, kParallelElements / (std::min(pixels, kPixels) * channels));
  torch::stable::parallel_for(0, batch * runs, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % runs * kPixels, count = std::min(kPixels, pixels - begin);
      for (int64_t c = 0; c < channels; ++c) {
        advance_run(operands, samples[i / runs], fill, pixels, c, begin, count, each);
      }
      if (three) write_slot(operands, i / runs, begin, count);
    }
  });
}

}  // namespace palette::cpu
