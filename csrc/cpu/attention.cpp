// Self-attention on packed qkv on the CPU: a head's keys and values are laid out for the products
// once per block of queries, and the scores never leave the nearest caches.

#include "cpu/attention.h"

#include "cpu/ops.h"

namespace palette::cpu {
namespace {

// One head's queries (from the first of a block on), keys, values, and place for the result.
template <class T>
struct Heads {
  Head<const T> q, k, v;
  Head<T> out;
};

// Scratch memory of one block of queries.
template <class A>
struct Scratch {
  Matrix<A> q;       // [kQueries, dims]
  Matrix<A> k;       // [dims, kKeys]
  Matrix<A> v;       // [kKeys, dims]
  Matrix<A> scores;  // [kGroup, kKeys]
  Matrix<A> out;     // [kQueries, dims]
  A *maximum, *sum;  // [kQueries]
};

// Leaf functions of one instruction set.
template <class T>
struct Loops {
  // The result and the log-sum-exp of `count` queries, at most kQueries.
  void (*attend)(const Heads<T>& head, const Sizes& sizes, int64_t count,
                 const Scratch<Wide<T>>& scratch, Wide<T>* lse);
};

}  // namespace
}  // namespace palette::cpu

#define PALETTE_LOOPS "cpu/attention_loops.h"
#include "cpu/each_isa.h"

namespace palette::cpu {
namespace {

template <class A>
Scratch<A> scratch_in(Workspace<A>& work, const Sizes& sizes) {
  Scratch<A> scratch;
  scratch.q = work.matrix(kQueries, sizes.width);
  scratch.k = work.matrix(sizes.dims, kKeyPitch);
  scratch.v = work.matrix(kKeys, sizes.width);
  scratch.scores = work.matrix(kGroup, kKeyPitch);
  scratch.out = work.matrix(kQueries, sizes.width);
  scratch.maximum = work.vector(kQueries);
  scratch.sum = work.vector(kQueries);
  return scratch;
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Shape& shape) {
  using A = Wide<T>;
  const bool rows = channels_last(input);
  std::vector<int64_t> result(input.sizes().begin(), input.sizes().end());
  result[1] = shape.heads * shape.dims;
  const Tensor out =
      empty(result.data(), static_cast<int64_t>(result.size()), input.scalar_type(), rows);
  const Tensor lse = empty({shape.batch, shape.heads, shape.tokens}, kWideType<T>);
  if (out.numel() == 0) return {out, lse};

  const Loops<T>& kernels = loops<T>();
  const Image from = image(input, rows), to = image(out, rows);
  const T* data = from.tensor.template const_data_ptr<T>();
  T* target = out.mutable_data_ptr<T>();
  A* target_lse = lse.mutable_data_ptr<A>();
  const Sizes sizes = shape.sizes();
  const int64_t blocks = (shape.tokens + kQueries - 1) / kQueries;
  const int64_t grain = grain_of(std::min(kQueries, shape.tokens) * shape.tokens * shape.dims);
  const int64_t units = shape.batch * shape.heads * blocks;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Workspace<A> work;
    const Scratch<A> scratch = scratch_in(work, sizes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks / shape.heads, head = i / blocks % shape.heads;
      const int64_t query = i % blocks * kQueries;
      const Heads<T> heads = {
          shape.part(from, data, n, head, 0).from_token(query), shape.part(from, data, n, head, 1),
          shape.part(from, data, n, head, 2), shape.whole(to, target, n, head).from_token(query)};
      kernels.attend(heads, sizes, std::min(kQueries, shape.tokens - query), scratch,
                     target_lse + (n * shape.heads + head) * shape.tokens + query);
    }
  });
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, int64_t heads, const std::string& order) {
  STD_TORCH_CHECK(checks::attention(device_of(qkv), qkv, heads),
                  "attention: heads that do not fit qkv");
  const Shape shape(qkv, heads, is_legacy(order));
  return by_dtype(qkv, [&]<class T>(T) { return forward<T>(qkv, shape); });
}

}  // namespace palette::cpu
