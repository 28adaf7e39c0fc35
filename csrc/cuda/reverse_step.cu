// palette::reverse_step on CUDA: one step of a solver in one launch, noise included.
//
// A thread owns four neighbouring elements in [C, H, W] order, those of one Philox counter.
// Products and sums are rounded one by one, in the published order: float32 equals the reference
// bit for bit (given the same noise), also where a * y and b * output are large and nearly cancel.
#include "cuda/host.h"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"

namespace palette {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;

}  // namespace

// A tensor [N, C, H * W] by strides, or nothing.
struct Strided {
  void* data;
  int64_t n, c, p;
  Type type;
  int32_t quads;  // float32, and four neighbouring positions are 16 aligned bytes
};

struct Step {
  Strided state, output, noise, history, known, mask, slot;
  const float* table;  // [S, 6]: a, b, c1, c2, c3, sigma
  const int64_t* step;
  int64_t step_stride;   // 0 for one step, 1 for one per sample
  const int64_t* seeds;  // [N], or null
  int64_t samples, channels, plane;
};

namespace {

// Where the four elements of a thread lie; `count` of them exist.
struct Places {
  int64_t sample, c[kQuad], p[kQuad];
  int count;
};

__device__ __forceinline__ void fetch(const Strided& from, const Places& at,
                                      float (&values)[kQuad]) {
  const int64_t base = at.sample * from.n;
  if (from.quads) {
    load(static_cast<const float*>(from.data) + base + at.c[0] * from.c + at.p[0], values);
    return;
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    values[j] = j < at.count
                    ? read_as(from.type, from.data, base + at.c[j] * from.c + at.p[j] * from.p)
                    : 0.0f;
  }
}

__device__ __forceinline__ void put(const Strided& to, const Places& at,
                                    const float (&values)[kQuad]) {
  const int64_t base = at.sample * to.n;
  if (to.quads) {
    store(static_cast<float*>(to.data) + base + at.c[0] * to.c + at.p[0], values);
    return;
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j < at.count) {
      write_as(to.type, to.data, base + at.c[j] * to.c + at.p[j] * to.p, values[j]);
    }
  }
}

// p * q + r * s, every operation rounded.
__device__ __forceinline__ float two_products(float p, float q, float r, float s) {
  return __fadd_rn(__fmul_rn(p, q), __fmul_rn(r, s));
}

__device__ __forceinline__ float clamp(float x) {  // NaN stays NaN
  return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
}

// The places of the thread's quad, and its number among the quads of the image.
__device__ __forceinline__ Places places_of(const Step& s, int64_t sample, int64_t quad,
                                            int64_t* counter) {
  Places at;
  at.sample = sample;
  *counter = quad;
  if (s.plane % kQuad == 0) {
    // Neighbouring threads take the channels of the same pixels: next to each other channels-last.
    const int64_t channel = quad % s.channels, first = quad / s.channels * kQuad;
    *counter = (channel * s.plane + first) / kQuad;
    at.count = kQuad;
    for (int j = 0; j < kQuad; ++j) {
      at.c[j] = channel;
      at.p[j] = first + j;
    }
  } else {
    const int64_t left = s.channels * s.plane - quad * kQuad;
    at.count = left < kQuad ? static_cast<int>(left) : kQuad;
    for (int j = 0; j < kQuad; ++j) {
      at.c[j] = (quad * kQuad + j) / s.plane;
      at.p[j] = (quad * kQuad + j) % s.plane;
    }
  }
  return at;
}

__global__ void __launch_bounds__(kThreads) reverse_step_kernel(Step s) {
  const int64_t quads = (s.channels * s.plane + kQuad - 1) / kQuad;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.samples * quads) return;
  int64_t quad;
  const Places at = places_of(s, i / quads, i % quads, &quad);
  const int64_t step = s.step[at.sample * s.step_stride];
  const float* row = s.table + step * 6;
  float y[kQuad], x0[kQuad], other[kQuad];
  fetch(s.state, at, y);
  fetch(s.output, at, other);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    x0[j] = clamp(two_products(row[0], y[j], row[1], other[j]));
    y[j] = two_products(row[2], x0[j], row[3], y[j]);
  }
  if (s.history.data != nullptr) {
    fetch(s.history, at, other);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y[j] = __fadd_rn(y[j], __fmul_rn(row[4], other[j]));
    put(s.history, at, x0);
  }
  if (s.seeds != nullptr || s.noise.data != nullptr) {
    if (s.seeds != nullptr) {
      normals_of(static_cast<uint64_t>(s.seeds[at.sample]), static_cast<uint32_t>(quad),
                 static_cast<uint32_t>(step + 1), 0, 0, other);
    } else {
      fetch(s.noise, at, other);
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y[j] = __fadd_rn(y[j], __fmul_rn(row[5], other[j]));
  }
  if (s.mask.data != nullptr) {
    float known[kQuad];
    fetch(s.mask, at, other);
    fetch(s.known, at, known);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      y[j] = two_products(known[j], __fadd_rn(1.0f, -other[j]), other[j], y[j]);
    }
  }
  put(s.state, at, y);
  if (s.slot.data != nullptr) put(s.slot, at, y);
}

}  // namespace

extern "C" cudaError_t palette_cuda_reverse_step(const Step* s, cudaStream_t stream) {
  const int64_t threads = s->samples * ((s->channels * s->plane + kQuad - 1) / kQuad);
  if (threads == 0) return cudaSuccess;
  return launch(reverse_step_kernel, (threads + kThreads - 1) / kThreads, kThreads, stream, *s);
}

}  // namespace palette

namespace palette::cuda {
namespace {

constexpr const char* kOp = "reverse_step";

// One stride for all positions, where there is one: rows follow each other without a gap.
std::optional<int64_t> position_stride(const Tensor& x) {
  const int64_t h = x.size(2), w = x.size(3);
  const int64_t across = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : 1;
  if (h > 1 && x.stride(2) != w * across) return std::nullopt;
  return across;
}

// An operand of the kernel: the tensor itself, or a dense copy where its rows have gaps. The copy
// is kept until the kernel is queued, and written back where the kernel writes.
class Operand {
 public:
  Operand(const Tensor& like, const std::optional<Tensor>& given, const char* name) {
    if (!given.has_value()) return;
    original_ = *given;
    used_ = *given;
    if (!position_stride(used_).has_value()) {
      used_ = empty_dense(used_, used_.size(1), false);
      torch::stable::copy_(used_, original_);
      copied_ = true;
    }
    const int64_t p = position_stride(used_).value();
    const auto stride = [&](int64_t d) { return used_.size(d) > 1 ? used_.stride(d) : 0; };
    const bool aligned = reinterpret_cast<uintptr_t>(used_.data_ptr()) % 16 == 0 &&
                         stride(0) % kQuad == 0 && stride(1) % kQuad == 0;
    // beside a float32 state too
    const bool wide = used_.scalar_type() == ScalarType::Double;
    const Type type = wide ? kFloat64 : type_of(used_, kOp, name);
    const bool quads = type == kFloat32 && p == 1 && aligned &&
                       like.size(2) * like.size(3) % kQuad == 0 && used_.size(2) == like.size(2) &&
                       used_.size(3) == like.size(3);
    strided_ = {used_.data_ptr(), stride(0), stride(1), p, type, quads};
  }

  Strided strided() const { return strided_; }

  void write_back() {
    if (copied_) torch::stable::copy_(original_, used_);
  }

 private:
  Tensor original_, used_;
  bool copied_ = false;
  Strided strided_{nullptr, 0, 0, 0, kAbsent, 0};
};

// mask as wide as an image, where it broadcasts over rows or columns.
std::optional<Tensor> spread(const std::optional<Tensor>& mask, const Tensor& like) {
  if (!mask.has_value()) return mask;
  Tensor wide = *mask;
  while (wide.dim() < 4) wide = torch::stable::unsqueeze(wide, 0);
  if (wide.size(2) == like.size(2) && wide.size(3) == like.size(3)) return wide;
  Tensor full = empty_dense(like, like.size(1), false);
  torch::stable::copy_(full, wide);
  return full;
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
  if (state.numel() == 0) return;
  const DeviceGuard guard(state.get_device_index());
  const Tensor rows = torch::stable::contiguous(table), steps = torch::stable::contiguous(step);
  const std::optional<Tensor> keys =
      seeds.has_value() ? std::optional(torch::stable::contiguous(*seeds)) : std::nullopt;
  Operand y(state, state, "state"), x0(state, history, "history"), next(state, slot, "slot");
  const Operand out(state, output, "output"), z(state, noise, "noise"),
      outside(state, known, "known"), hole(state, spread(mask, state), "mask");
  const Step arguments{y.strided(),
                       out.strided(),
                       z.strided(),
                       x0.strided(),
                       outside.strided(),
                       hole.strided(),
                       next.strided(),
                       rows.const_data_ptr<float>(),
                       steps.const_data_ptr<int64_t>(),
                       steps.numel() == 1 ? 0 : 1,
                       keys.has_value() ? keys->const_data_ptr<int64_t>() : nullptr,
                       state.size(0),
                       state.size(1),
                       state.size(2) * state.size(3)};
  check_launch(palette_cuda_reverse_step(&arguments, current_stream(state)), kOp);
  y.write_back();
  x0.write_back();
  next.write_back();
}

}  // namespace palette::cuda
