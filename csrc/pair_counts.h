// The adjusted Rand index of exact pair counts: one formula, so the same bits on every device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CLMFAST_ON_EVERY_DEVICE __host__ __device__
#else
#define CLMFAST_ON_EVERY_DEVICE
#endif

namespace clmfast {

using Wide = __int128;  // products of pair counts reach N^4

// Of the sums of squares of the cells and of their row and column sums.
CLMFAST_ON_EVERY_DEVICE inline double adjusted_rand(int64_t n, Wide cells, Wide rows, Wide columns) {
  const Wide same_both = cells - n, same_truth = rows - n, same_label = columns - n;  // ordered pairs of different points
  const Wide only_truth = same_truth - same_both, only_label = same_label - same_both;
  if (only_truth == 0 && only_label == 0) return 1;
  const Wide neither = static_cast<Wide>(n) * (n - 1) - same_both - only_truth - only_label;
  const Wide above = same_both * neither - only_truth * only_label;
  const Wide below = same_truth * (only_truth + neither) + same_label * (only_label + neither);
  return 2 * static_cast<double>(above) / static_cast<double>(below);
}

}  // namespace clmfast
