// Rings of points of which a few rows change at a time, and what is kept from one time to the next.
//
//   points  [S, N, D] float32, rows 0..n-1 filled; since the last call the `count` rows from `first` on, round and round
//           (row N - 1 is followed by row 0), were written. Rows at or beyond n, and rows that are not finite, are
//           nobody's neighbour and have none.
//
// ring_to_grid moves the rows of points and of queries that changed to one grid (cpu/grid.h), whose memory the caller
// keeps. Where ring_knn had to measure too much in vain, or with `is_new`, it is chosen anew, and all rows are moved.
//
// ring_knn keeps the k nearest points of every query, in each of V views: `index` after a call is what knn.h says of the
// whole rings, with query_group[v] and point_group[v] barred.
//   query_group [V, Q], point_group [V, N] int64
//   key    [V, S, Q, length] int64: each query's list of neighbours, ascending as cpu/search.h orders them; longer than k
//   bound  [V, S, Q] int64: every candidate below the bound is in the list
//   index  [V, S, Q, k] int64: rows of points, -1 where there are too few
//          All three are the caller's to keep and need no initial value, as at first every query counts as changed.
// Replaced points leave the lists, new points below the bound enter them, and the bound sinks when a list overflows. A
// list that falls below k entries is computed anew, so a call costs (changed rows) x (all rows).
// Returns the number of lists computed anew.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace clmfast {

struct Grid;

struct Ring {
  const float* points;
  int64_t n, first, count;
};

void ring_to_grid_cpu(const Ring& points, const Grid& grid, const Ring& queries, const Grid& query_grid, bool is_new,
                      ParallelFor parallel_for);

struct RingKnn {
  Ring points, queries;
  bool is_self;  // queries are the points themselves, and a point is not its own neighbour
  const int64_t *query_group, *point_group;
  int64_t V, k, length;
  int64_t *key, *bound, *index;
};

int64_t ring_knn_cpu(const RingKnn& op, const Grid& points, const Grid& queries, ParallelFor parallel_for);

}  // namespace clmfast
