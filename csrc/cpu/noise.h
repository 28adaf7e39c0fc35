// The loop that makes normal noise, for the ops that need noise while they run.
#pragma once

#include <cstdint>

namespace palette::cpu {

constexpr int64_t kCounters = 64;            // Philox counters of one call of a FillNoise
constexpr int64_t kNormals = 4 * kCounters;  // normals they give

// What all counters of one call share.
struct NoiseStream {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;
  uint32_t layer;
};

// Writes the kNormals normals of the counters from `counter` on: elements 4 * counter and further
// of the image whose seed the stream has.
using FillNoise = void (*)(const NoiseStream& stream, uint32_t counter, float* out);

// For the instruction set in use.
FillNoise fill_noise();

}  // namespace palette::cpu
