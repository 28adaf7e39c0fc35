// Includes PALETTE_LOOPS once per instruction set, after the vectors of that set (vec.h), and
// chooses among them. No include guard: a kernel file declares a template Loops<T> of function
// pointers, names its loops in PALETTE_LOOPS, which must define a kLoops<T>, and includes this
// once.
//
// Every function in there is marked PALETTE_INLINE or PALETTE_LEAF, so that it is compiled for its
// set and stays internal to the file. No lambdas: they would not inherit the mark.

#define PALETTE_INLINE PALETTE_TARGET __attribute__((always_inline)) static inline
#define PALETTE_LEAF PALETTE_TARGET static

#define PALETTE_ISA baseline
#define PALETTE_LANES 4
#define PALETTE_TARGET
#include "cpu/vec.h"
#include PALETTE_LOOPS
#undef PALETTE_ISA
#undef PALETTE_LANES
#undef PALETTE_TARGET

#if defined(__x86_64__)

#define PALETTE_ISA avx2
#define PALETTE_LANES 8
#define PALETTE_TARGET __attribute__((target("avx2,fma,f16c")))
#include "cpu/vec.h"
#include PALETTE_LOOPS
#undef PALETTE_ISA
#undef PALETTE_LANES
#undef PALETTE_TARGET

#define PALETTE_ISA avx512
#define PALETTE_LANES 16
#define PALETTE_TARGET \
  __attribute__((      \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#include "cpu/vec.h"
#include PALETTE_LOOPS
#undef PALETTE_ISA
#undef PALETTE_LANES
#undef PALETTE_TARGET

#define PALETTE_ISA avx512_bf16
#define PALETTE_LANES 16
#define PALETTE_BF16
#define PALETTE_TARGET   \
  __attribute__((target( \
      "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#include "cpu/vec.h"
#include PALETTE_LOOPS
#undef PALETTE_ISA
#undef PALETTE_LANES
#undef PALETTE_BF16
#undef PALETTE_TARGET

#endif

#undef PALETTE_INLINE
#undef PALETTE_LEAF

namespace palette::cpu {
namespace {

// The kLoops of the instruction set in use. Only bfloat16 gains from avx512_bf16.
template <class T>
const Loops<T>& loops() {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa == Isa::avx512_bf16) return avx512_bf16::kLoops<T>;
  }
  if (isa >= Isa::avx512) return avx512::kLoops<T>;
  if (isa == Isa::avx2) return avx2::kLoops<T>;
#endif
  return baseline::kLoops<T>;
}

}  // namespace
}  // namespace palette::cpu
