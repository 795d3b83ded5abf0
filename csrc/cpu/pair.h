// pair_dist2: the squared distance of two rows, the one definition that knn and kmeans answer by.
//
//   lane[l] = sum over d = l, l + 16, l + 32, ... ascending of (double(a_d) - double(b_d))^2        l = 0..15
//   dist2   = lane[0] after lane[l] += lane[l + h] for l < h, for h = 8, 4, 2, 1
//
// in float64 without fused multiply-add: a pure, symmetric function of the two rows, the same bits on every processor.
#pragma once

#include <cstdint>
#include <limits>

namespace clmfast {

double pair_dist2(const float* a, const float* b, int64_t D);

// The largest |coordinate|; infinity or NaN if the row holds one.
float row_reach(const float* row, int64_t D);

// Asks for a row that will be read soon: rows that lie anywhere come from a far cache.
inline void prefetch_row(const float* row, int64_t D) {
  constexpr int64_t LINE = 16;  // floats of a cache line
  for (int64_t d = 0; d < D; d += LINE) __builtin_prefetch(row + d);
}

inline bool is_finite_row(const float* row, int64_t D) {
  return row_reach(row, D) < std::numeric_limits<float>::infinity();
}

}  // namespace clmfast
