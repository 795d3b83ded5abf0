// kmeans: Lloyd's algorithm with restarts, for S point sets at once, as in scikit-learn's KMeans(algorithm="lloyd").
//
//   points   [S, N, D] float32     (bfloat16 and float16 are widened by the torch side, which changes no value; a GPU
//                                  reads them as they are: then `points` points at what `element` says)
//   init     [S, K, D] float32     the initial centroids, or null: drawn, see Start
//   label    [S, N] int64          the nearest centroid by float64 dist2 (cpu/pair.h), of equals the smaller index:
//                                  a pure function of points and centroid
//   centroid [S, K, D] float32     mean of the cluster's points, each coordinate rounded to a multiple of 2^-43 or less of
//                                  N times the largest in its column: float64 sums are then exact in any order
//   inertia  [S] float64           sum over points of the float64 dist2 to their centroid
//   n_iter   [S] int64             iterations of the restart that is returned
//
// Iteration  label every point, move every centroid to the mean of its points. Stops when no label changed; when the
//            centroids moved by sum_k |move_k|^2 <= tol * (mean over d of the variance of the set's points); or after
//            max_iter. Where labels and centroids differ at the stop, points are labelled once more: they fit always.
// Empty      clusters, in the order of their index, take over the points farthest from their centroids, one each (ties
//            to the smaller index). A point that lies on its centroid is not taken; a cluster that gets none stays.
// Start      plus_plus: greedy k-means++ (Arthur & Vassilvitskii 2007): each next centroid is the best of 2 + floor(ln
//            K) points drawn in proportion to their dist2 to the centroids so far. random: K points of different index.
//            Draws are keyed by (seed, set, restart, number of the draw).
// Restarts   the lowest inertia is returned, of equals the earliest.
// Not finite points (any NaN or infinity) have label -1 and no influence. A set with fewer finite points than clusters
//            repeats some of them as centroids. A centroid in init that is not finite starts at the mean of its set.
// Devices    give the same bits from the same first centroids. k-means++ adds distances up in an order of the device's
//            own, so its draws agree but for rounding; so does the variance that tol is measured by.
// Limits     1 <= K <= N < 2^31; D < 2^20; 1 <= n_init < 2^31; 1 <= max_iter <= 2^20.
#pragma once

#include <cstdint>

#include "element.h"
#include "parallel.h"
#include "stream.h"

namespace clmfast {

enum class KmeansStart { plus_plus, random };

constexpr int64_t GROUPS = 24;      // of centroids: k is in group k % GROUPS, so that up to that many have one each

struct Kmeans {
  const float* points;
  const float* init;
  int64_t S, N, D, K;
  KmeansStart start;
  int64_t n_init, max_iter;
  double tol;
  int64_t seed;
  int64_t* label;
  float* centroid;
  double* inertia;
  int64_t* n_iter;
};

void kmeans_cpu(const Kmeans& op, ParallelFor parallel_for);

// any: resident where that can be. Both give the same bits.
enum class KmeansPath { any, resident, streaming };

size_t kmeans_cuda_scratch(const Kmeans& op);
void kmeans_cuda(const Kmeans& op, Element element, void* scratch, CudaStream stream, KmeansPath path = KmeansPath::any);

}  // namespace clmfast
