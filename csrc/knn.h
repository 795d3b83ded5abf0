// knn: the k nearest points of every query, exactly.
//
//     dist2(q, p) = float32( sum_d (double(q_d) - double(p_d))^2 )        summed as cpu/pair.h says
//
//   points  [S, N, D] float32      (bfloat16 and float16 are widened by the torch side, which changes no value; a GPU
//                                  reads them as they are: then points and queries point at what `element` says)
//   queries [S, Q, D] float32      or, with is_self, none: then Q = N, and every point asks among the others
//   within  [S, Q] float32         or null: only points with dist2 <= within are neighbours of that query
//   view    up to MOST_VIEWS, with is_self one of all queries. View v is asked by the last Q_v queries:
//     query_group [Q_v], point_group [N] int64, or both null: a query and a point of equal group are no neighbours
//   dist2   [S, A, k] float32      ascending, of every query in every view that it asks: A = sum_v Q_v, view by view
//   index   [S, A, k] int64        rows of points
//
// Order      by dist2, equal dist2 by smaller index. The result is a pure function of the values: no thread count,
//            chunk size or instruction set shows in it.
// Overflow   finite points whose dist2 is inf are neighbours still, after all others, by index.
// Not finite a point with a NaN or an infinity is nobody's neighbour; as a query it has none.
// Within     a NaN or a negative number leaves no neighbour. A tight one makes the search cheaper.
// Too few    candidates: index -1, dist2 inf in the places left over.
// Limits     k >= 1; in the self form k < N; N < 2^31; D < 2^20. Memory O(S N D + S A k).
#pragma once

#include <cstdint>

#include "element.h"
#include "parallel.h"
#include "stream.h"

namespace clmfast {

constexpr int MOST_VIEWS = 4;

struct KnnView {
  const int64_t *query_group, *point_group;
  int64_t Q;
};

struct Knn {
  const float* points;
  const float* queries;
  bool is_self;
  const float* within;
  int n_views;
  KnnView view[MOST_VIEWS];
  int64_t S, N, Q, A, D, k;
  float* dist2;
  int64_t* index;
};

void knn_cpu(const Knn& op, ParallelFor parallel_for);
size_t knn_cuda_scratch(const Knn& op);
void knn_cuda(const Knn& op, Element element, void* scratch, CudaStream stream);

}  // namespace clmfast
