// As many float32 numbers as one register holds, as one value: W = 4, 8 or 16. Where a loop sums or compares, GCC 12
// keeps the 16 lanes of vector.h in memory on narrower machines; these stay in registers.
#pragma once

#include <cstdint>
#include <utility>

#include "isa.h"

namespace clmfast {

template <int W>
struct LanesOf {
  typedef float Float __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(W * sizeof(int32_t)), aligned(4), may_alias));
};
template <int W>
using Lanes = typename LanesOf<W>::Float;

template <int W>
CLMFAST_BODY Lanes<W>& lanes(float* at) {
  return *reinterpret_cast<Lanes<W>*>(at);
}
template <int W>
CLMFAST_BODY const Lanes<W>& lanes(const float* at) {
  return *reinterpret_cast<const Lanes<W>*>(at);
}

// In one fixed order, so that no sum depends on how it was compiled.
CLMFAST_BODY float sum_of(Lanes<8> x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// The numbers of a and b in turns, begun in their middle if `high`.
template <int W, int... I>
CLMFAST_BODY Lanes<W> interleaved(Lanes<W> a, Lanes<W> b, bool high, std::integer_sequence<int, I...>) {
  return high ? __builtin_shufflevector(a, b, (W / 2 + I / 2 + I % 2 * W)...)
              : __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...);
}

// W rows of W numbers become their transpose, by log2 W rounds that interleave the first half of the rows with the
// second.
template <int W>
CLMFAST_BODY void transpose(Lanes<W>* row) {
  for (int round = 1; round < W; round *= 2) {
    Lanes<W> mixed[W];
    for (int i = 0; i < W; ++i)
      mixed[i] = interleaved<W>(row[i / 2], row[i / 2 + W / 2], i % 2, std::make_integer_sequence<int, W>());
    for (int i = 0; i < W; ++i) row[i] = mixed[i];
  }
}

// Defines `void name parameters` as name_body<W>, compiled for every instruction set with its own W.
#define CLMFAST_PER_WIDTH(name, parameters, arguments)                          \
  void name##_baseline parameters { name##_body<4> arguments; }                 \
  CLMFAST_AVX2 void name##_avx2 parameters { name##_body<8> arguments; }        \
  CLMFAST_AVX512 void name##_avx512 parameters { name##_body<16> arguments; }   \
  void name parameters {                                                        \
    static const auto once = pick(name##_baseline, name##_avx2, name##_avx512); \
    once arguments;                                                             \
  }

}  // namespace clmfast
