// kmeans: Lloyd's algorithm with restarts, for S point sets at once, as in scikit-learn's KMeans(algorithm="lloyd").
//
//   points   [S, N, D] float32     (bfloat16 and float16 are widened by the torch side, which changes no value)
//   init     [S, K, D] float32     the initial centroids, or null: drawn, see Start
//   packed   the points in panels, of a capacity of N or more; or null: packed here. Used only where init fits its frames
//   known    or null: what the last call found out about points around its centroids, which are `init` now; this call
//            writes its own over it. Saves work, and changes no result. Each [S, N], rows `stride` apart: label int32;
//            within and beyond float32, at least the distance to the point's own centroid and at most that to any other.
//            A point that was not there, or has changed, has within = infinity.
//   label    [S, N] int64          the nearest centroid by float64 dist2 (cpu/pair.h), of equals the smaller index:
//                                  a pure function of points and centroid
//   centroid [S, K, D] float32     mean of the cluster's points, summed in float64 in the order of the points
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
// Limits     1 <= K <= N < 2^31; D < 2^20.
#pragma once

#include <cstdint>

#include "packed.h"
#include "parallel.h"

namespace clmfast {

enum class KmeansStart { plus_plus, random };

struct Kmeans {
  const float* points;
  const float* init;
  const Packed* packed;
  int32_t* known_label;
  float *known_within, *known_beyond;
  int64_t known_stride;
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

}  // namespace clmfast
