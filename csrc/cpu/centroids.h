// What kmeans and separation share: the means of groups of points, and the nearest centroid of every point.
#pragma once

#include <cstdint>
#include <vector>

#include "panels.h"
#include "tile.h"

namespace clmfast {

// The coordinates are summed in blocks of this many, which are tasks of their own.
constexpr int64_t SUM_BLOCK = 128;

constexpr int64_t n_sum_blocks(int64_t D) { return (D + SUM_BLOCK - 1) / SUM_BLOCK; }

// mean [K, D]: the mean of each group's points, summed in float64 in the order of the points; NaN for a group without
// points. Writes one block of coordinates.
//   group [N] in [0, K), or negative: in none; count [K]
void mean_of_groups(const float* points, const std::vector<int32_t>& group, const std::vector<int64_t>& count,
                    int64_t D, int64_t block, double* mean);

// What is known of each point of a panel.
struct Nearest {
  int32_t label[PANEL];
  // In the units of the points: at least the distance to that centroid, at most the distance to any other. Where the
  // screen could not tell them apart, `within` is infinite.
  float within[PANEL], beyond[PANEL];
};

// Centroids [K, D] of one set as its points are screened against them.
class Centroids {
 public:
  // A centroid that is not finite is nobody's nearest.
  void pack(const Frame& frame, const float* centroid, int64_t K);

  // The nearest centroid of the panel's points: by float64 dist2, of equals the smaller index, and not the `excluded`
  // one of each point (null: none is). Unspecified in columns that hold no finite point, or where no centroid is left.
  //   points [N, D], of which the panel holds `row` [PANEL]; norm2, excluded [PANEL]
  Nearest nearest(const float* points, const int64_t* row, const float* panel, const double* norm2,
                  const int32_t* excluded) const;

 private:
  Frame frame_;
  const float* centroid_;
  int64_t K_;
  std::vector<float> rows_, low_norm2_;  // as dot_tile wants them, and (1 - kappa) |c~|^2
  double largest_norm2_;                 // of |c~|^2
};

}  // namespace clmfast
