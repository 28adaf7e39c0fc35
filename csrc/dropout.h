// What the dropout kernels of both libraries start from.
#pragma once

#include <cstdint>

namespace palette {

// The smallest word whose uniform number in (0, 1], float32(word) * 2^-32 + 2^-33, reaches p
// rounded to float32. The numbers do not fall as the words grow, so a kernel keeps exactly the
// elements whose words are not below it: one comparison of integers.
inline uint32_t first_kept(double p) {
  const float bound = static_cast<float>(p);
  uint32_t low = 0, high = 0xffffffff;  // whose number is 1
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (static_cast<float>(middle) * 0x1p-32f + 0x1p-33f >= bound) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace palette
