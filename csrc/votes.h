// What the labels of neighbours say, for S sets at once. index [S, Q, k] int64 as knn returns it, in [-1, N), nearest
// first; label [N] of the points; -1 (no neighbour) never votes and never counts.
//
//   majority_vote   voted [S, Q] int64: the label that most neighbours carry, of equals the one of the nearest; -1 where
//                   there is none. label >= 0.
//   label_shares    over the queries with truth c and at least one neighbour: out [0, s, c] float64 sums the share of
//                   their neighbours that carry c, and out [1, s, c] counts them. truth [Q] in [0, n_labels).
// The CPU returns false, leaving the output unspecified, if a value is out of range. On a GPU, which could tell nobody
// without waiting, an index out of range is no neighbour, and a query whose truth is out of range counts nowhere.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "stream.h"

namespace clmfast {

struct Neighbours {
  const int64_t* index;
  const int64_t* label;
  int64_t S, Q, k, N;
};

bool majority_vote_cpu(const Neighbours& near, int64_t* voted, ParallelFor parallel_for);
bool label_shares_cpu(const Neighbours& near, const int64_t* truth, int64_t n_labels, double* out,
                      ParallelFor parallel_for);
void majority_vote_cuda(const Neighbours& near, int64_t* voted, CudaStream stream);
void label_shares_cuda(const Neighbours& near, const int64_t* truth, int64_t n_labels, double* out, CudaStream stream);

}  // namespace clmfast
