// partition_scores: how well two labelings of the same points agree, for S sets at once.
//
//   truth, label  S x N int64, a set stride each (0 where one labeling is shared by all sets)
//   n_truth, n_label  either both >= 0: all values lie in [0, n); or both -1: any values
//   scores  [6, S] float64: ari, nmi, homogeneity, completeness, v_measure, purity (formulas: clmfast/ops/partition.py)
//
// The CPU returns false, and leaves scores unspecified, if a value breaks the promise of n_truth or n_label. A GPU, which
// could tell nobody without waiting, gives NaN for that set.
//
// adjusted_rand: ari alone, of S labelings and V others at once. truth [V, N] in [0, n_truth), label [S, N] in [-1,
// n_label), where -1 is a cluster like any other; score [V, S]. The same bits; false or NaN if a value is out of range.
//
// N < 2^31. Pair counts are exact integers; all ways of counting give the same bits, and so does ari on every
// device. A GPU's logarithms are its own.
//
// The CPU counts in one dense n_truth x n_label table per set, or without a promise by sorting: O(N log N) time, O(N)
// memory. A GPU counts in hash tables, whatever is promised: O(N) time and memory, in one launch.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "stream.h"

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

// The scratch memory is for hash tables that do not fit into shared memory.
size_t partition_scores_cuda_scratch(const PartitionScores& op);
void partition_scores_cuda(const PartitionScores& op, void* scratch, CudaStream stream);
size_t adjusted_rand_cuda_scratch(const AdjustedRand& op);
void adjusted_rand_cuda(const AdjustedRand& op, void* scratch, CudaStream stream);

}  // namespace clmfast
