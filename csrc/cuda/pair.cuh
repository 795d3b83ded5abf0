// pair_dist2 (cpu/pair.h) on a GPU, the same bits: four consecutive lanes measure one pair, and each of them keeps four
// of the contract's sixteen sums. A warp measures eight pairs at a time.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "ptx.cuh"

namespace clmfast {

constexpr int QUAD = 4;

// Coordinates d, ..., d + 3; zeros, which add nothing, behind the row's end.
template <class T>
__device__ inline void load_four(const T* row, int64_t d, int64_t D, bool is_aligned, float (&four)[4]) {
  if (is_aligned) {
    struct alignas(4 * sizeof(T)) Four {
      T value[4];
    };
    const Four loaded = *reinterpret_cast<const Four*>(row + d);
#pragma unroll
    for (int e = 0; e < 4; ++e) four[e] = widen(loaded.value[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) four[e] = d + e < D ? widen(row[d + e]) : 0.f;
  }
}

// May rows [*, D] be read four coordinates at a time?
template <class T>
__device__ inline bool is_in_fours(const T* rows, int64_t D) {
  return D % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % (4 * sizeof(T)) == 0;
}

// All lanes of the warp call this; a quad without a pair passes D = 0.
template <class T>
__device__ inline double pair_dist2(const T* a, const T* b, int64_t D, bool is_aligned) {
  double sum[4] = {};
#pragma unroll 4
  for (int64_t d = 4 * (threadIdx.x % QUAD); d < D; d += 16) {
    float of_a[4], of_b[4];
    load_four(a, d, D, is_aligned, of_a);
    load_four(b, d, D, is_aligned, of_b);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const double difference = static_cast<double>(of_a[e]) - static_cast<double>(of_b[e]);
      sum[e] = __dadd_rn(sum[e], __dmul_rn(difference, difference));
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = __dadd_rn(sum[e], warp_shuffle_xor(sum[e], 2));  // lane l + 8
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = __dadd_rn(sum[e], warp_shuffle_xor(sum[e], 1));  // lane l + 4
  return __dadd_rn(__dadd_rn(sum[0], sum[2]), __dadd_rn(sum[1], sum[3]));
}

}  // namespace clmfast
