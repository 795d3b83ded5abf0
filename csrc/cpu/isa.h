// One source, several instruction sets: a hot loop is written once as an always-inlined body `name_body` and compiled
// once per set by a function that carries the set's attribute; the processor decides at run time which of them `name`
// calls.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define CLMFAST_AVX2 __attribute__((target("avx2,fma,prefer-vector-width=256")))
#define CLMFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#else
#define CLMFAST_AVX2
#define CLMFAST_AVX512
#endif
#define CLMFAST_BODY __attribute__((always_inline)) inline

// Defines `result name parameters` as name_body, compiled for every instruction set.
#define CLMFAST_PER_ISA(result, name, parameters, arguments)                       \
  result name##_baseline parameters { return name##_body arguments; }              \
  CLMFAST_AVX2 result name##_avx2 parameters { return name##_body arguments; }     \
  CLMFAST_AVX512 result name##_avx512 parameters { return name##_body arguments; } \
  result name parameters {                                                         \
    static const auto once = pick(name##_baseline, name##_avx2, name##_avx512);    \
    return once arguments;                                                         \
  }

namespace clmfast {

enum class Isa { baseline, avx2, avx512, avx512vnni };

// The best set this processor has, or the one that the environment variable CLMFAST_ISA names (as in Isa).
// Throws std::runtime_error if that is unknown or missing here.
Isa isa();

template <class Function>
Function pick(Function baseline, Function avx2, Function avx512) {
  switch (isa()) {
    case Isa::avx512:
    case Isa::avx512vnni:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace clmfast
