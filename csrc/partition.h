// partition_scores: how well two labelings of the same points agree, for S sets at once.
//
//   truth, label  S x N int64, a set stride each (0 where one labeling is shared by all sets)
//   n_truth, n_label  either both >= 0: all values lie in [0, n), counted in one dense n_truth x n_label table per set;
//                     or both -1: any values, counted by sorting, O(N log N) time, O(N) memory
//   scores  [6, S] float64: ari, nmi, homogeneity, completeness, v_measure, purity (formulas: clmfast/ops/partition.py)
//
// The CPU returns false, and leaves scores unspecified, if a value breaks the promise of n_truth or n_label. A GPU, which
// could tell nobody without waiting, gives NaN for that set.
//
// adjusted_rand: ari alone, of S labelings and V others at once. truth [V, N] in [0, n_truth), label [S, N] in [-1,
// n_label), where -1 is a cluster like any other; score [V, S]. The same bits; false or NaN if a value is out of range.
//
// Pair counts are exact integers up to N = 2^31; both ways of counting give the same bits, and so does ari on every
// device. A GPU's logarithms are its own.
//
// A GPU counts in shared memory where a table fits there (fits_shared), and else by sorting. The torch side sorts:
//   truth, label  S x N  the points ordered by truth, of equal truth by label
//   sorted_label  S x N  the labels alone, ordered
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

constexpr int64_t MAX_SHARED_CELLS = 20 * 1024;  // 32-bit counts of cells, rows and columns: 80 KB

constexpr bool fits_shared(int64_t n_truth, int64_t n_label) {
  return n_truth >= 0 && (n_truth + 1) * (n_label + 2) <= MAX_SHARED_CELLS;
}

struct SortedPartition {
  const int64_t *truth, *label, *sorted_label;
  int64_t S, N;
  // What the values must be in, [truth_begin, truth_end) and [label_begin, label_end); both empty: anything.
  int64_t truth_begin, truth_end, label_begin, label_end;
  double* scores;  // [6, S], or with is_ari_only [S]
  bool is_ari_only;
};

// Where the tables fit.
void partition_scores_cuda(const PartitionScores& op, CudaStream stream);
void adjusted_rand_cuda(const AdjustedRand& op, CudaStream stream);
size_t sorted_partition_cuda_scratch(const SortedPartition& op);
void sorted_partition_cuda(const SortedPartition& op, void* scratch, CudaStream stream);

}  // namespace clmfast
