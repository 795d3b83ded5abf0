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

__device__ inline void add_squares(double (&lane)[4], const float4& x, const float4& y) {
  const double difference[4] = {
      static_cast<double>(x.x) - static_cast<double>(y.x), static_cast<double>(x.y) - static_cast<double>(y.y),
      static_cast<double>(x.z) - static_cast<double>(y.z), static_cast<double>(x.w) - static_cast<double>(y.w)};
#pragma unroll
  for (int e = 0; e < 4; ++e) lane[e] = __dadd_rn(lane[e], __dmul_rn(difference[e], difference[e]));
}

// Calls visit(x, y) with the coordinates that a quad's lane has of a pair, four at a time up to D. FAR_AHEAD reads of
// either row are on their way together: rows come from the L2 cache, and all that a few pairs take is waiting for it.
// More of them would be more instructions, which come from there too. IS_NEAR: b is in shared memory. Behind D come
// zeros.
constexpr int FAR_AHEAD = 8;
template <bool IS_NEAR, bool IS_ALIGNED, class A, class B, class Visit>
__device__ inline void visit_fours(const A* a, const B* b, int64_t D, const Visit& visit) {
  constexpr int AHEAD = FAR_AHEAD / (IS_ALIGNED ? 1 : 4);  // else four reads instead of one
  constexpr float4 NONE = {0, 0, 0, 0};
  const int first = static_cast<int>(threadIdx.x) % QUAD * 4;
  a += first, b += first;
#pragma unroll 1
  for (int left = static_cast<int>(D) - first; left > 0; left -= 16 * AHEAD) {
    float4 x[AHEAD], y[IS_NEAR ? 1 : AHEAD];
    auto read = [&](const auto* row, int e) {
      return 16 * e < left ? load_four(row, 16 * e, left, IS_ALIGNED) : NONE;
    };
#pragma unroll
    for (int e = 0; e < AHEAD; ++e) {
      x[e] = read(a, e);
      if constexpr (!IS_NEAR) y[e] = read(b, e);
    }
#pragma unroll
    for (int e = 0; e < AHEAD; ++e) {
      if constexpr (IS_NEAR) y[0] = read(b, e);
      visit(x[e], y[IS_NEAR ? 0 : e]);
    }
    a += 16 * AHEAD, b += 16 * AHEAD;
  }
}
template <bool IS_NEAR, class A, class B, class Visit>
__device__ inline void visit_fours(const A* a, const B* b, int64_t D, const Visit& visit) {
  if (is_in_fours(a, D) && is_in_fours(b, D))  // here, so that no read of the loop hangs on a branch
    visit_fours<IS_NEAR, true>(a, b, D, visit);
  else
    visit_fours<IS_NEAR, false>(a, b, D, visit);
}

// All lanes of the warp call it, and all of a quad get it; a quad without a pair passes D = 0.
template <class A, class B>
__device__ inline double pair_dist2(const A* a, const B* b, int64_t D, bool is_aligned) {
  double lane[4] = {};
#pragma unroll 4
  for (int64_t d = 4 * (threadIdx.x % QUAD); d < D; d += 16) {  // signed, the lane costs knn's kernels 14 registers
    const float4 x = load_four(a, d, D, is_aligned), y = load_four(b, d, D, is_aligned);
    add_squares(lane, x, y);
  }
  return sum_of_lanes(lane);
}

// For some pairs, far away.
template <class A, class B>
__device__ inline double far_pair_dist2(const A* a, const B* b, int64_t D) {
  double lane[4] = {};
  visit_fours<false>(a, b, D, [&](const float4& x, const float4& y) { add_squares(lane, x, y); });
  return sum_of_lanes(lane);
}

// For few pairs, far away: a warp measures two, and a lane keeps one of the sixteen sums.
constexpr int HALF_WARP = 16;
template <class A, class B>
__device__ inline double half_warp_dist2(const A* a, const B* b, int D) {
  constexpr int AHEAD = 2 * FAR_AHEAD;
  const int first = static_cast<int>(threadIdx.x) % HALF_WARP;
  a += first, b += first;
  double lane = 0;
#pragma unroll 1
  for (int left = D - first; left > 0; left -= HALF_WARP * AHEAD) {
    float x[AHEAD], y[AHEAD];
#pragma unroll
    for (int e = 0; e < AHEAD; ++e) {
      x[e] = HALF_WARP * e < left ? widen(a[HALF_WARP * e]) : 0;
      y[e] = HALF_WARP * e < left ? widen(b[HALF_WARP * e]) : 0;
    }
    a += HALF_WARP * AHEAD, b += HALF_WARP * AHEAD;
#pragma unroll
    for (int e = 0; e < AHEAD; ++e) {
      const double difference = static_cast<double>(x[e]) - static_cast<double>(y[e]);
      lane = __dadd_rn(lane, __dmul_rn(difference, difference));
    }
  }
#pragma unroll
  for (int mask = HALF_WARP / 2; mask > 0; mask /= 2) lane += warp_shuffle_xor(lane, mask);
  return lane;
}

// pair_dist2 of one row and two others: the row is read, and widened, once.
template <class T>
__device__ inline void two_pairs_dist2(const T* a, const T* b0, const T* b1, int64_t D, bool is_aligned,
                                       double (&dist2)[2]) {
  double lanes[2][4] = {};
#pragma unroll 4
  for (int64_t d = 4 * (threadIdx.x % QUAD); d < D; d += 16) {
    const float4 x = load_four(a, d, D, is_aligned);
    const float4 y0 = load_four(b0, d, D, is_aligned), y1 = load_four(b1, d, D, is_aligned);
    add_squares(lanes[0], x, y0), add_squares(lanes[1], x, y1);
  }
  dist2[0] = sum_of_lanes(lanes[0]), dist2[1] = sum_of_lanes(lanes[1]);
}

}  // namespace clmfast
