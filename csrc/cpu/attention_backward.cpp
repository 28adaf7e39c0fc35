// The gradient of attention on the CPU, one head at a time.

#include "cpu/attention.h"
#include "cpu/ops.h"

namespace palette::cpu {
namespace {

// One head of everything that goes in and out.
template <class T>
struct Heads {
  Head<const T> q, k, v, out, grad;
  Head<T> dq, dk, dv;
};

// Scratch memory of one head; `tokens` is padded to kGroup.
template <class A>
struct Scratch {
  Matrix<A> q, grad, dq;           // [tokens, dims]
  Matrix<A> k, dk, dv;             // [kKeys, dims]
  Matrix<A> k_columns, v_columns;  // [dims, kKeys]
  Matrix<A> scores, slopes;        // [kGroup, kKeys]
  A* delta;                        // [tokens]
};

// Leaf functions of one instruction set.
template <class T>
struct Loops {
  void (*attend_backward)(const Heads<T>& head, const Sizes& sizes, const Scratch<Wide<T>>& scratch,
                          const Wide<T>* lse);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/attention_backward_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

template <class A>
Scratch<A> scratch_in(Workspace<A>& work, const Sizes& sizes) {
  const int64_t tokens = padded(sizes.tokens, kGroup);
  Scratch<A> scratch;
  for (auto* each : {&scratch.q, &scratch.grad, &scratch.dq}) {
    *each = work.matrix(tokens, sizes.width);
  }
  for (auto* each : {&scratch.k, &scratch.dk, &scratch.dv}) {
    *each = work.matrix(kKeys, sizes.width);
  }
  for (auto* each : {&scratch.k_columns, &scratch.v_columns}) {
    *each = work.matrix(sizes.dims, kKeyPitch);
  }
  for (auto* each : {&scratch.scores, &scratch.slopes}) {
    *each = work.matrix(kGroup, kKeyPitch);
  }
  scratch.delta = work.vector(tokens);
  return scratch;
}

template <class T>
Tensor backward(const Tensor& grad_tensor, const Tensor& qkv, const Tensor& out_tensor,
                const Tensor& lse_tensor, const Shape& shape) {
  using A = Wide<T>;
  const bool rows = channels_last(qkv);
  const Tensor result = empty_dense(qkv, rows);
  if (result.numel() == 0) return result;

  const Loops<T>& kernels = loops<T>();
  const Image from = image(qkv, rows), to = image(result, rows);
  const Image grad = image(grad_tensor, channels_last(grad_tensor));
  const Image out = image(out_tensor, channels_last(out_tensor));
  const Tensor lse = torch::stable::contiguous(lse_tensor);
  const T* data = from.tensor.template const_data_ptr<T>();
  const T* grad_data = grad.tensor.template const_data_ptr<T>();
  const T* out_data = out.tensor.template const_data_ptr<T>();
  const A* lse_data = lse.const_data_ptr<A>();
  T* target = result.mutable_data_ptr<T>();
  const Sizes sizes = shape.sizes();
  const int64_t grain = grain_of(shape.tokens * shape.tokens * shape.dims);
  torch::stable::parallel_for(0, shape.batch * shape.heads, grain, [&](int64_t begin, int64_t end) {
    Workspace<A> work;
    const Scratch<A> scratch = scratch_in(work, sizes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / shape.heads, head = i % shape.heads;
      const Heads<T> heads = {
          shape.part(from, data, n, head, 0),    shape.part(from, data, n, head, 1),
          shape.part(from, data, n, head, 2),    shape.whole(out, out_data, n, head),
          shape.whole(grad, grad_data, n, head), shape.part(to, target, n, head, 0),
          shape.part(to, target, n, head, 1),    shape.part(to, target, n, head, 2)};
      kernels.attend_backward(heads, sizes, scratch, lse_data + i * shape.tokens);
    }
  });
  return result;
}

}  // namespace

Tensor attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, int64_t heads, const std::string& order) {
  STD_TORCH_CHECK(checks::attention_backward(device_of(qkv), grad, qkv, out, lse, heads),
                  "attention_backward: arguments that do not fit each other");
  const Shape shape(qkv, heads, is_legacy(order));
  return by_dtype(qkv, [&]<class T>(T) { return backward<T>(grad, qkv, out, lse, shape); });
}

}  // namespace palette::cpu
