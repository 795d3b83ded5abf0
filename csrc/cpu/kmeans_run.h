// One restart of one set on the CPU, and its parts: where it starts (kmeans_start.cpp), Lloyd's algorithm
// (kmeans_lloyd.cpp). kmeans.cpp runs them.
#pragma once

#include <cstdint>
#include <vector>

#include "../kmeans.h"

namespace clmfast {

struct KmeansRun {
  int64_t s, restart;
  const float* points;          // [N, D]
  std::vector<float> centroid;  // [K, D]
  std::vector<int32_t> label;   // [N]; -1 for points that are not finite
  double inertia = 0;
  int64_t n_iter = 0;

  KmeansRun(const Kmeans& op, int64_t s, int64_t restart)
      : s(s), restart(restart), points(op.points + s * op.N * op.D), centroid(op.K * op.D), label(op.N) {}
};

// Sets the first centroids.
void kmeans_start(const Kmeans& op, KmeansRun& run);

// From the centroids that a run has to labels, centroids and inertia of an optimum.
void kmeans_lloyd(const Kmeans& op, KmeansRun& run, ParallelFor parallel_for);

}  // namespace clmfast
