// One restart of one set on the CPU, and its parts: where it starts (kmeans_start.cpp), Lloyd's algorithm
// (kmeans_lloyd.cpp). kmeans.cpp runs them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kmeans.h"
#include "centroids.h"

namespace clmfast {

struct KmeansRun {
  int64_t s, restart;
  const float* points;                 // [N, D]
  std::vector<float> centroid, next;   // [K, D]
  Centroids packed;
  std::vector<int32_t> label;          // [N]
  std::vector<float> within;           // [N]: at least the distance to the own centroid
  std::vector<float> beyond;           // [N, GROUPS]: at most the distance to any other centroid of a group
  std::vector<float> reach;            // [n_chunks, D]: the largest |coordinate| of each chunk
  std::vector<double> magic;           // [D]: what rounds coordinates (sums.h)
  std::vector<double> sum;             // [K, D]
  std::vector<int32_t> summed;         // [N]: the cluster whose sum a point is in, or -1
  std::vector<int64_t> count;          // [K]: points in each sum
  std::vector<int64_t> changed;        // points whose label is not that of the sum they are in
  std::vector<float> move, group_move; // [K], [GROUPS]: at least how far the centroids moved last
  std::vector<double> inertia_part;    // [n_chunks]
  double inertia = 0;
  int64_t n_finite = 0, n_iter = 0;
  double most_variance = 0;            // at least the mean over the coordinates of the variance
  double moved2 = 0;                   // of all centroids
  double bound = -1;                   // on moved2, once it is known

  KmeansRun(const Kmeans& op, int64_t s, int64_t restart);
};

// Sets the first centroids.
void kmeans_start(const Kmeans& op, KmeansRun& run);

// From the first centroids to the end.
void kmeans_lloyd(const Kmeans& op, KmeansRun& run, ParallelFor parallel_for);

}  // namespace clmfast
