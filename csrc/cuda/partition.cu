// partition_scores and adjusted_rand on the GPU; the contract is ../partition.h.
//
// Whoever counts, a thread that found a cell, a row or a column adds what it means to integers that a block shares: pair
// counts, and the terms of the entropies in units of 2^-56. Integer sums have no order, so a score does not depend on how
// its cells were found: in a table in shared memory, one block per score, or as runs of sorted pairs where no table fits.
#include "../partition.h"

#include <cfloat>
#include <cmath>

#include "../pair_counts.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 512;  // of a block, which makes one score. Not tuned yet
constexpr double UNIT = 0x1p56;  // entropies are below 32, and so are sums of the sizes of their terms

using Count = unsigned long long;

// What one score is made of.
struct Totals {
  Count cells2, rows2, columns2;  // sums of squares
  Count n_rows, n_columns, n_pure;
  Count information, truth_entropy, label_entropy;  // signed, in units
};

__device__ void add_entropy_term(Count* sum, double term) {
  atomicAdd(sum, static_cast<Count>(llrint(term * UNIT)));
}

__device__ double entropy_of(Count sum) { return static_cast<double>(static_cast<long long>(sum)) / UNIT; }

__device__ void add_cell(Totals& totals, int64_t count, int64_t row, int64_t column, int64_t n) {
  atomicAdd(&totals.cells2, static_cast<Count>(count) * static_cast<Count>(count));
  // As independent as it can be: rounding would leave something, and independent labelings must score exactly 0.
  if (count * n == row * column) return;
  const double term = static_cast<double>(count) / static_cast<double>(n) *
                      (log(static_cast<double>(count)) + log(static_cast<double>(n)) - log(static_cast<double>(row)) -
                       log(static_cast<double>(column)));
  if (fabs(term) >= DBL_EPSILON) add_entropy_term(&totals.information, term);  // less is noise, as in scikit-learn
}

// A row or a column of the table that is not empty.
__device__ void add_line(Count* squares, Count* n_lines, Count* entropy, int64_t count, int64_t n) {
  atomicAdd(squares, static_cast<Count>(count) * static_cast<Count>(count));
  atomicAdd(n_lines, Count{1});
  const double share = static_cast<double>(count) / static_cast<double>(n);
  add_entropy_term(entropy, share * (log(static_cast<double>(n)) - log(static_cast<double>(count))));
}

// [ari, nmi, homogeneity, completeness, v_measure, purity], `stride` apart; or ari alone.
__device__ void write_scores(const Totals& totals, int64_t n, bool is_in_range, bool is_ari_only, double* out,
                             int64_t stride) {
  double scores[6] = {1, 1, 1, 1, 1, 1};
  if (n > 0) {
    scores[0] = adjusted_rand(n, totals.cells2, totals.rows2, totals.columns2);
    const double truth_entropy = totals.n_rows > 1 ? entropy_of(totals.truth_entropy) : 0;
    const double label_entropy = totals.n_columns > 1 ? entropy_of(totals.label_entropy) : 0;
    double information = totals.n_rows > 1 && totals.n_columns > 1 ? entropy_of(totals.information) : 0;
    if (information < 0) information = 0;
    if (totals.n_rows > 1 || totals.n_columns > 1)
      scores[1] = information == 0 ? 0 : information / ((truth_entropy + label_entropy) / 2);
    if (truth_entropy > 0) scores[2] = information / truth_entropy;
    if (label_entropy > 0) scores[3] = information / label_entropy;
    const double sum = scores[2] + scores[3];
    scores[4] = sum == 0 ? 0 : 2 * scores[2] * scores[3] / sum;
    scores[5] = static_cast<double>(totals.n_pure) / static_cast<double>(n);
  }
  for (int i = 0; i < (is_ari_only ? 1 : 6); ++i)
    out[i * stride] = is_in_range ? scores[i] : __longlong_as_double(0x7ff8000000000000);
}

// ---- in a table

__device__ bool is_below(int64_t value, int64_t n) { return static_cast<uint64_t>(value) < static_cast<uint64_t>(n); }

// One block counts one pair of labelings, whose values begin at 0 and at `first_label`, and writes its score.
__device__ void score_table(const int64_t* truth, const int64_t* label, int64_t N, int n_truth, int n_label,
                            int first_label, bool is_ari_only, double* out, int64_t stride) {
  unsigned* table = dynamic_shared<unsigned>();     // [n_truth, n_label]
  unsigned* row_sum = table + n_truth * n_label;    // [n_truth]
  unsigned* column_sum = row_sum + n_truth;         // [n_label]
  Totals& totals = static_shared<Totals>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < n_truth * n_label; i += THREADS) table[i] = 0;
  if (thread == 0) totals = {};
  __syncthreads();
  bool is_in_range = true;
  for (int64_t i = thread; i < N; i += THREADS) {
    const int64_t t = truth[i], l = label[i] - first_label;
    if (is_below(t, n_truth) && is_below(l, n_label)) atomicAdd(&table[t * n_label + l], 1u);
    else is_in_range = false;
  }
  is_in_range = __syncthreads_and(is_in_range);
  for (int line = thread; line < n_truth + n_label; line += THREADS) {
    const bool is_row = line < n_truth;
    const int first = is_row ? line * n_label : line - n_truth, step = is_row ? 1 : n_label;
    unsigned sum = 0, most = 0;
    for (int i = 0; i < (is_row ? n_label : n_truth); ++i) {
      const unsigned count = table[first + i * step];
      sum += count;
      most = max(most, count);
    }
    row_sum[line] = sum;  // the columns' sums lie behind
    if (sum == 0) continue;
    if (is_row) {
      add_line(&totals.rows2, &totals.n_rows, &totals.truth_entropy, sum, N);
    } else {
      add_line(&totals.columns2, &totals.n_columns, &totals.label_entropy, sum, N);
      atomicAdd(&totals.n_pure, Count{most});
    }
  }
  __syncthreads();
  for (int i = thread; i < n_truth * n_label; i += THREADS)
    if (table[i]) add_cell(totals, table[i], row_sum[i / n_label], column_sum[i % n_label], N);
  __syncthreads();
  if (thread == 0) write_scores(totals, N, is_in_range, is_ari_only, out, stride);
}

__global__ void __launch_bounds__(THREADS) table_kernel(PartitionScores op) {
  const int64_t s = blockIdx.x;
  score_table(op.truth + s * op.truth_stride, op.label + s * op.label_stride, op.N, static_cast<int>(op.n_truth),
              static_cast<int>(op.n_label), 0, false, op.scores + s, op.S);
}

__global__ void __launch_bounds__(THREADS) rand_kernel(AdjustedRand op) {
  const int64_t v = blockIdx.x / op.S, s = blockIdx.x % op.S;
  score_table(op.truth + v * op.N, op.label + s * op.N, op.N, static_cast<int>(op.n_truth),
              static_cast<int>(op.n_label) + 1, -1, true, op.score + v * op.S + s, 1);
}

size_t table_bytes(int64_t n_truth, int64_t n_label) {
  return static_cast<size_t>(n_truth * n_label + n_truth + n_label) * sizeof(unsigned);
}

// ---- by sorted pairs

constexpr int64_t POINTS = 4096;  // that one block looks through. Not tuned yet

// The first place in ascending values [N], from `begin` on, of one above `value`, or with or_equal of one that is not
// below it.
__device__ int64_t first_above(const int64_t* values, int64_t begin, int64_t N, int64_t value, bool or_equal) {
  int64_t low = begin, high = N;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const bool is_above = or_equal ? values[middle] >= value : values[middle] > value;
    if (is_above) high = middle;
    else low = middle + 1;
  }
  return low;
}

struct SortedScratch {
  Totals* totals;     // [S]
  unsigned* largest;  // [S, N]: at a label's first place in the sorted labels, its largest cell
  static constexpr size_t bytes(int64_t S, int64_t N) {
    return static_cast<size_t>(S) * sizeof(Totals) + static_cast<size_t>(S * N) * sizeof(unsigned);
  }
  SortedScratch(void* scratch, int64_t S)
      : totals(static_cast<Totals*>(scratch)), largest(reinterpret_cast<unsigned*>(totals + S)) {}
};

// A thread whose point begins a cell, a row or a column measures its length, and adds it up.
__global__ void __launch_bounds__(THREADS) runs_kernel(SortedPartition op, SortedScratch scratch, int64_t n_parts) {
  const int64_t N = op.N, s = blockIdx.x / n_parts, first = blockIdx.x % n_parts * POINTS;
  const int64_t *truth = op.truth + s * N, *label = op.label + s * N, *sorted = op.sorted_label + s * N;
  Totals& totals = static_shared<Totals>();
  if (threadIdx.x == 0) totals = {};
  __syncthreads();
  for (int64_t i = first + threadIdx.x; i < min(first + POINTS, N); i += THREADS) {
    const int64_t t = truth[i], l = label[i];
    const bool begins_row = i == 0 || truth[i - 1] != t, begins_column = i == 0 || sorted[i - 1] != sorted[i];
    if (begins_row || label[i - 1] != l) {
      const int64_t row = first_above(truth, 0, N, t, true), row_end = first_above(truth, i, N, t, false);
      const int64_t column = first_above(sorted, 0, N, l, true), column_end = first_above(sorted, column, N, l, false);
      const int64_t count = first_above(label, i, row_end, l, false) - i;  // labels ascend within a row
      add_cell(totals, count, row_end - row, column_end - column, N);
      atomicMax(&scratch.largest[s * N + column], static_cast<unsigned>(count));
      if (begins_row) add_line(&totals.rows2, &totals.n_rows, &totals.truth_entropy, row_end - row, N);
    }
    if (begins_column)
      add_line(&totals.columns2, &totals.n_columns, &totals.label_entropy,
               first_above(sorted, i, N, sorted[i], false) - i, N);
  }
  __syncthreads();
  // The block's part of the set's totals.
  const int n = sizeof(Totals) / sizeof(Count), thread = static_cast<int>(threadIdx.x);
  Count *sum = reinterpret_cast<Count*>(scratch.totals + s), *part = reinterpret_cast<Count*>(&totals);
  if (thread < n) atomicAdd(sum + thread, part[thread]);
}

struct Pure {
  Count n;
};

__global__ void __launch_bounds__(THREADS) sorted_score_kernel(SortedPartition op, SortedScratch scratch) {
  const int64_t N = op.N, s = blockIdx.x;
  Pure& pure = static_shared<Pure>();
  if (threadIdx.x == 0) pure.n = 0;
  __syncthreads();
  Count n_pure = 0;
  for (int64_t i = threadIdx.x; i < N; i += THREADS) n_pure += scratch.largest[s * N + i];
  atomicAdd(&pure.n, n_pure);
  __syncthreads();
  if (threadIdx.x != 0) return;
  Totals totals = scratch.totals[s];
  totals.n_pure = pure.n;
  const int64_t *truth = op.truth + s * N, *sorted = op.sorted_label + s * N;
  const bool is_any = op.truth_begin == op.truth_end && op.label_begin == op.label_end;
  const bool is_in_range = N == 0 || is_any ||
                           (op.truth_begin <= truth[0] && truth[N - 1] < op.truth_end &&
                            op.label_begin <= sorted[0] && sorted[N - 1] < op.label_end);
  write_scores(totals, N, is_in_range, op.is_ari_only, op.scores + s, op.S);
}

}  // namespace

void partition_scores_cuda(const PartitionScores& op, CudaStream stream) {
  if (op.S == 0) return;
  launch(table_kernel, static_cast<unsigned>(op.S), THREADS, table_bytes(op.n_truth, op.n_label), stream, op);
}

void adjusted_rand_cuda(const AdjustedRand& op, CudaStream stream) {
  if (op.V * op.S == 0) return;
  launch(rand_kernel, static_cast<unsigned>(op.V * op.S), THREADS, table_bytes(op.n_truth, op.n_label + 1), stream, op);
}

size_t sorted_partition_cuda_scratch(const SortedPartition& op) { return SortedScratch::bytes(op.S, op.N); }

void sorted_partition_cuda(const SortedPartition& op, void* scratch, CudaStream stream) {
  if (op.S == 0) return;
  const SortedScratch parts(scratch, op.S);
  check(cudaMemsetAsync(scratch, 0, SortedScratch::bytes(op.S, op.N), stream));
  const int64_t n_parts = (op.N + POINTS - 1) / POINTS;
  if (n_parts > 0) launch(runs_kernel, static_cast<unsigned>(op.S * n_parts), THREADS, 0, stream, op, parts, n_parts);
  launch(sorted_score_kernel, static_cast<unsigned>(op.S), THREADS, 0, stream, op, parts);
}

}  // namespace clmfast
