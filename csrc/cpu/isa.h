// The instruction set that the CPU kernels run with, chosen once for the process.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace palette::cpu {

enum class Isa : int { baseline, avx2, avx512, avx512_bf16 };

inline const char* name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

// The widest instruction set that both this processor and the kernels have.
inline Isa widest_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && avx2) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa parse_isa(std::string_view text) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (text != name(isa)) continue;
    STD_TORCH_CHECK(isa <= widest_isa(), "PALETTE_CPU_ISA is ", name(isa),
                    ", but the widest that this processor and the kernels share is ",
                    name(widest_isa()));
    return isa;
  }
  STD_TORCH_CHECK(false, "PALETTE_CPU_ISA is '", std::string(text),
                  "', wanted baseline, avx2, avx512 or avx512_bf16");
}

// The widest one, or what PALETTE_CPU_ISA said when the first kernel ran.
inline std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa = [] {
    const char* wanted = std::getenv("PALETTE_CPU_ISA");
    return wanted != nullptr && *wanted != '\0' ? parse_isa(wanted) : widest_isa();
  }();
  return isa;
}

}  // namespace palette::cpu
