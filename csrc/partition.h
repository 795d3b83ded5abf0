// partition_scores: how well two labelings of the same points agree, for S sets at once.
//
//   truth, label  S x N int64, a set stride each (0 where one labeling is shared by all sets)
//   n_truth, n_label  either both >= 0: all values lie in [0, n), counted in one dense n_truth x n_label table per set;
//                     or both -1: any values, counted by sorting, O(N log N) time, O(N) memory
//   scores  [6, S] float64: ari, nmi, homogeneity, completeness, v_measure, purity (formulas: clmfast/ops/partition.py)
//
// Returns false, and leaves scores unspecified, if a value breaks the promise of n_truth or n_label.
//
// adjusted_rand: ari alone, of S labelings and V others at once. truth [V, N] in [0, n_truth), label [S, N] in [-1,
// n_label), where -1 is a cluster like any other; score [V, S]. The same bits; false if a value is out of range.
//
// Pair counts are exact integers up to N = 2^31; both ways of counting give the same bits.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace clmfast {

struct PartitionScores {
  const int64_t* truth;
  const int64_t* label;
  int64_t truth_stride, label_stride;
  int64_t S, N;
  int64_t n_truth, n_label;
  double* scores;
};

struct AdjustedRand {
  const int64_t *truth, *label;
  int64_t V, S, N;
  int64_t n_truth, n_label;
  double* score;
};

bool adjusted_rand_cpu(const AdjustedRand& op, ParallelFor parallel_for);
bool partition_scores_cpu(const PartitionScores& op, ParallelFor parallel_for);

}  // namespace clmfast
