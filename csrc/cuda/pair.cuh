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
__device__ inline float4 load_four(const T* row, int64_t d, int64_t D, bool is_aligned) {
  if (is_aligned) {
    struct alignas(4 * sizeof(T)) Four {
      T value[4];
    };
    const Four four = *reinterpret_cast<const Four*>(row + d);
    return {widen(four.value[0]), widen(four.value[1]), widen(four.value[2]), widen(four.value[3])};
  }
  return {widen(row[d]), d + 1 < D ? widen(row[d + 1]) : 0, d + 2 < D ? widen(row[d + 2]) : 0,
          d + 3 < D ? widen(row[d + 3]) : 0};
}

// May rows [*, D] be read four coordinates at a time?
template <class T>
__device__ inline bool is_in_fours(const T* rows, int64_t D) {
  return D % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % (4 * sizeof(T)) == 0;
}

// Sums the sixteen lanes of cpu/pair.h, of which a quad has four each, in its order.
template <class X>
__device__ inline X sum_of_lanes(X (&lane)[4]) {
#pragma unroll
  for (int mask = 2; mask > 0; mask /= 2)  // lanes l + 8, then lanes l + 4
#pragma unroll
    for (X& x : lane) x += warp_shuffle_xor(x, mask);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// What a lane whose first coordinate is `first` does for its quad's pair, with AHEAD reads of either row on their way.
template <int AHEAD, class A, class B>
__device__ inline double pair_dist2_from(int64_t first, const A* a, const B* b, int64_t D, bool is_aligned) {
  double lane[4] = {};
#pragma unroll AHEAD
  for (int64_t d = first; d < D; d += 16) {
    const float4 x = load_four(a, d, D, is_aligned), y = load_four(b, d, D, is_aligned);
    const double difference[4] = {
        static_cast<double>(x.x) - static_cast<double>(y.x), static_cast<double>(x.y) - static_cast<double>(y.y),
        static_cast<double>(x.z) - static_cast<double>(y.z), static_cast<double>(x.w) - static_cast<double>(y.w)};
#pragma unroll
    for (int e = 0; e < 4; ++e) lane[e] = __dadd_rn(lane[e], __dmul_rn(difference[e], difference[e]));
  }
  return sum_of_lanes(lane);
}

// All lanes of the warp call these, and all of a quad get it; a quad without a pair passes D = 0. `first` is unsigned in
// the one and signed in the other: the other way round, knn's kernels take 14 and k-means' 6 registers more (nvcc 13.0).
template <class A, class B>
__device__ inline double pair_dist2(const A* a, const B* b, int64_t D, bool is_aligned) {
  return pair_dist2_from<4>(4 * (threadIdx.x % QUAD), a, b, D, is_aligned);
}
template <int AHEAD = 4, class A, class B>
__device__ inline double pair_dist2(const A* a, const B* b, int64_t D) {
  const int thread = static_cast<int>(threadIdx.x);
  return pair_dist2_from<AHEAD>(thread % QUAD * 4, a, b, D, is_in_fours(a, D) && is_in_fours(b, D));
}

}  // namespace clmfast
