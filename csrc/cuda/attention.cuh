// What the forward and the backward of attention on CUDA share: the problem, tiles in shared memory
// and the products of tiles.
//
// A block of four warps owns 64 rows (queries, or keys where their gradients are made), 16 to a
// warp, and walks over tiles of columns. Heads wider than a tile's kWidth are summed in chunks, and
// each chunk of the result has a block of its own. Tensors are read with channels last.
#pragma once

#include "cuda/fragment.cuh"

namespace palette {

constexpr int kAttentionThreads = 128;
constexpr int kRows = 64;
constexpr float kLog2E = 1.44269504088896340736f;

// The problem, as the host states it. qkv is dense [samples, tokens, 3 * heads * size].
struct Attention {
  int64_t samples, heads, tokens, size;
  int64_t head_step;            // channels of qkv from a head to the next
  int64_t part_step;            // channels of qkv from q to k and from k to v
  int64_t out_n, out_c, out_t;  // strides of what is written: the result, or the gradient of qkv
  float scale;
  Type type;
};

// What a block works on.
struct Task {
  int64_t sample, head, row;  // the first row
  int chunk, chunks;          // of the result; of a head
};

template <int kWidth>
__device__ __forceinline__ Task task_of(const Attention& problem, int64_t block) {
  Task task;
  task.chunks = static_cast<int>((problem.size + kWidth - 1) / kWidth);
  const int64_t tiles = (problem.tokens + kRows - 1) / kRows;
  task.chunk = static_cast<int>(block % task.chunks);
  block /= task.chunks;
  task.row = block % tiles * kRows;
  block /= tiles;
  task.head = block % problem.heads;
  task.sample = block / problem.heads;
  return task;
}

// One head of a tensor with channels last: [tokens, size].
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;  // from one token to the next
};

// Rows of a matrix in shared memory. 16 bytes are added to each, so that neighbouring rows start in
// different banks.
template <typename T, int kWidth, int kHeight>
struct alignas(16) Tile {
  T values[kHeight][kWidth + 16 / sizeof(T)];

  __device__ __forceinline__ T* operator[](int row) { return values[row]; }
  __device__ __forceinline__ const T* operator[](int row) const { return values[row]; }
};

// tile[r][c] = matrix[first + r][chunk * kWidth + c], zero outside.
template <typename T, int kWidth, int kHeight>
__device__ __forceinline__ void load_tile(Tile<T, kWidth, kHeight>& tile, const Matrix<T>& from,
                                          int64_t first, int chunk, const Attention& problem,
                                          bool vectors) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  constexpr int kAcross = kWidth / kVector;
  for (int i = threadIdx.x; i < kHeight * kAcross; i += kAttentionThreads) {
    const int row = i / kAcross, column = i % kAcross * kVector;
    const int64_t token = first + row, channel = static_cast<int64_t>(chunk) * kWidth + column;
    const T* source = from.data + token * from.stride + channel;
    using Vector = Pack<T, kVector>;
    Vector values{};
    if (token < problem.tokens) {
      if (vectors) {
        if (channel < problem.size) values = *reinterpret_cast<const Vector*>(source);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (channel + v < problem.size) values.values[v] = source[v];
        }
      }
    }
    *reinterpret_cast<Vector*>(&tile[row][column]) = values;
  }
}

template <typename T>
__device__ __forceinline__ Pair<T> neighbours(const T* at) {
  return *reinterpret_cast<const Pair<T>*>(at);
}

// sums[n] += the warp's 16 rows of `rows` times rows 8n ... 8n + 7 of `columns`.
template <typename T, int kWidth, int kHeight>
__device__ __forceinline__ void multiply_rows(float (&sums)[kHeight / 8][4],
                                              const Tile<T, kWidth, kRows>& rows,
                                              const Tile<T, kWidth, kHeight>& columns) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < kWidth; k += 16) {
    const Pair<T> a[4] = {neighbours(&rows[warp * 16 + g][k + 2 * t]),
                          neighbours(&rows[warp * 16 + g + 8][k + 2 * t]),
                          neighbours(&rows[warp * 16 + g][k + 2 * t + 8]),
                          neighbours(&rows[warp * 16 + g + 8][k + 2 * t + 8])};
#pragma unroll
    for (int n = 0; n < kHeight / 8; ++n) {
      const Pair<T> b[2] = {neighbours(&columns[n * 8 + g][k + 2 * t]),
                            neighbours(&columns[n * 8 + g][k + 2 * t + 8])};
      multiply_add(sums[n], a, b);
    }
  }
}

// sums[n] += weights times columns 8n ... 8n + 7 of `values`; the weights, of the warp's 16 rows
// and the tile's kHeight rows, are rounded to T.
template <typename T, int kWidth, int kHeight>
__device__ __forceinline__ void mix(float (&sums)[kWidth / 8][4],
                                    const float (&weights)[kHeight / 8][4],
                                    const Tile<T, kWidth, kHeight>& values) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < kHeight / 16; ++k) {
    const float (&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
    const Pair<T> a[4] = {pair_of<T>(low[0], low[1]), pair_of<T>(low[2], low[3]),
                          pair_of<T>(high[0], high[1]), pair_of<T>(high[2], high[3])};
    const int row = k * 16 + 2 * t;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      const int column = n * 8 + g;
      const Pair<T> b[2] = {{values[row][column], values[row + 1][column]},
                            {values[row + 8][column], values[row + 9][column]}};
      multiply_add(sums[n], a, b);
    }
  }
}

// Writes the warp's rows of a chunk to channels `channel` + 0 ... of one sample of a tensor by
// strides, where they exist.
template <typename T, int kWidth>
__device__ __forceinline__ void store_rows(T* out, const float (&sums)[kWidth / 8][4],
                                           const Task& task, int64_t channel,
                                           const Attention& problem) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = task.row + warp * 16 + g + (i < 2 ? 0 : 8);
      const int64_t within = static_cast<int64_t>(task.chunk) * kWidth + n * 8 + 2 * t + i % 2;
      if (token < problem.tokens && within < problem.size) {
        assign(out[task.sample * problem.out_n + (channel + within) * problem.out_c +
                   token * problem.out_t],
               sums[n][i]);
      }
    }
  }
}

}  // namespace palette
