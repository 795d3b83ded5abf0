// partition_scores and adjusted_rand on the GPU by hashing; the contract is ../partition.h.
//
// One block per score counts the classes, the clusters and the pairs of both (cells) in three hash tables. A slot belongs
// to the first point that came with its value, so that any int64 can be a value. The tables lie in shared memory, or where
// they do not fit, in scratch memory.
//
// All that is added up are integers: pair counts, and the terms of the entropies in units of 2^-56. Such sums have no
// order, so a score does not depend on who came first.
#include "../partition.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../pair_counts.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 512;     // of a block, which makes one score. Not tuned yet
constexpr int AT_ONCE = 4;       // points that a thread has under way
constexpr double UNIT = 0x1p56;  // entropies are below 32, and so are sums of the sizes of their terms

using Count = unsigned long long;

// What one score is made of. Every thread has a part of its own: atomics on one place would be most of the time.
struct Totals {
  Count cells2, rows2, columns2;  // sums of squares: all that ari needs
  Count n_rows, n_columns, n_pure;
  Count information, truth_entropy, label_entropy;  // signed, in units
};

struct Parts {
  Totals of_warp[THREADS / 32];
};

// The first N_FIELDS of all threads' totals, in thread 0.
template <int N_FIELDS>
__device__ void add_up(Totals& totals) {
  static_assert(THREADS / 32 <= 32, "");
  Parts& parts = static_shared<Parts>();
  Count* field = reinterpret_cast<Count*>(&totals);
#pragma unroll
  for (int i = 0; i < N_FIELDS; ++i) {
    const Count sum = warp_sum(field[i]);
    if (lane_id() == 0) reinterpret_cast<Count*>(&parts.of_warp[warp_id()])[i] = sum;
  }
  __syncthreads();
  if (warp_id() > 0) return;
#pragma unroll
  for (int i = 0; i < N_FIELDS; ++i)
    field[i] = warp_sum(lane_id() < THREADS / 32 ? reinterpret_cast<Count*>(&parts.of_warp[lane_id()])[i] : Count{0});
}

__device__ Count units(double term) { return static_cast<Count>(llrint(term * UNIT)); }

__device__ double entropy_of(Count sum) { return static_cast<double>(static_cast<long long>(sum)) / UNIT; }

// What a cell adds to the mutual information.
__device__ Count information_of(int64_t count, int64_t row, int64_t column, int64_t n) {
  // As independent as it can be: rounding would leave something, and independent labelings must score exactly 0.
  if (count * n == row * column) return 0;
  const double term = static_cast<double>(count) / static_cast<double>(n) *
                      (log(static_cast<double>(count)) + log(static_cast<double>(n)) - log(static_cast<double>(row)) -
                       log(static_cast<double>(column)));
  return fabs(term) >= DBL_EPSILON ? units(term) : 0;  // less is noise, as in scikit-learn
}

// What a row or a column adds to its labeling's entropy.
__device__ Count entropy_term(int64_t count, int64_t n) {
  return units(static_cast<double>(count) / static_cast<double>(n) *
               (log(static_cast<double>(n)) - log(static_cast<double>(count))));
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
    // It exceeds neither entropy; without rounding, that is, of which a perfect partition would score more than 1.
    information = max(min(information, min(truth_entropy, label_entropy)), 0.0);
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

// ---- hash tables: open addressing, linear probing

struct Table {
  unsigned *owner, *count;  // [n_slots]: which point's value it is, plus 1; 0: free
  uint32_t mask;            // n_slots - 1

  // Of the value that has this hash, which point i brings; is_same says whether another point has the same. What it reads
  // may be older than what others have just written, but only a free slot changes, and those are asked for atomically.
  template <class IsSame>
  __device__ uint32_t slot(uint64_t hash, int64_t i, const IsSame& is_same) const {
    for (uint32_t at = static_cast<uint32_t>(hash) & mask;; at = (at + 1) & mask) {
      unsigned first = owner[at];
      if (first == 0) first = atomicCAS(&owner[at], 0u, static_cast<unsigned>(i + 1));
      if (first == 0 || is_same(first - 1)) return at;
    }
  }
};

__device__ uint64_t hash_of(uint64_t x) {
  x = (x ^ x >> 32) * 0x9e3779b97f4a7c15;
  return x ^ x >> 32;
}

// The values that are allowed: [begin, begin + n), or with n < 0 any.
struct Range {
  int64_t begin, n;
  __device__ bool holds(int64_t x) const {
    return n < 0 || static_cast<uint64_t>(x) - static_cast<uint64_t>(begin) < static_cast<uint64_t>(n);
  }
};

// The scores of V truths with S labelings each.
struct Agreement {
  const int64_t *truth, *label;
  int64_t truth_step, set_truth_step, label_step;  // between truths, and between sets
  int64_t V, S, N;
  Range truths, labels;
  bool is_ari_only;
  double* scores;  // [6, V * S], or of ari alone [V * S]
  int64_t n_cells, n_rows, n_columns;  // slots
  unsigned* memory;                    // [V * S, n_words], where the tables are not in shared memory

  __host__ __device__ int64_t n_words() const {  // a multiple of four, which one store can clear
    return (2 * (n_cells + n_rows) + (is_ari_only ? 2 : 3) * n_columns + 3) / 4 * 4;
  }
};

// IN_SHARED is a constant so that the atomics are those of shared memory.
template <bool IS_ARI_ONLY, bool IN_SHARED>
__global__ void __launch_bounds__(THREADS) agreement_kernel(Agreement op) {
  const int64_t i_score = blockIdx.x, v = i_score / op.S, s = i_score % op.S, N = op.N;
  const int64_t* truth = op.truth + v * op.truth_step + s * op.set_truth_step;
  const int64_t* label = op.label + s * op.label_step;
  unsigned* memory = IN_SHARED ? dynamic_shared<unsigned>() : op.memory + i_score * op.n_words();
  const int64_t thread = threadIdx.x;
  for (int64_t i = thread; i < op.n_words() / 4; i += THREADS) reinterpret_cast<uint4*>(memory)[i] = uint4{0, 0, 0, 0};
  const Table cells{memory, memory + op.n_cells, static_cast<uint32_t>(op.n_cells - 1)};
  unsigned* next = memory + 2 * op.n_cells;
  const Table rows{next, next + op.n_rows, static_cast<uint32_t>(op.n_rows - 1)};
  next += 2 * op.n_rows;
  const Table columns{next, next + op.n_columns, static_cast<uint32_t>(op.n_columns - 1)};
  unsigned* largest = next + 2 * op.n_columns;  // [n_columns]: a column's largest cell
  const auto row_of = [&](int64_t i) {
    return rows.slot(hash_of(truth[i]), i, [&](int64_t e) { return truth[e] == truth[i]; });
  };
  const auto column_of = [&](int64_t i) {
    return columns.slot(hash_of(label[i]), i, [&](int64_t e) { return label[e] == label[i]; });
  };
  __syncthreads();

  Totals totals = {};
  bool is_in_range = true;
  for (int64_t first = thread; first < N; first += THREADS * AT_ONCE) {
    int64_t of_truth[AT_ONCE], of_label[AT_ONCE];
#pragma unroll
    for (int e = 0; e < AT_ONCE; ++e) {
      const int64_t i = min(first + e * THREADS, N - 1);
      of_truth[e] = truth[i], of_label[e] = label[i];
    }
#pragma unroll
    for (int e = 0; e < AT_ONCE; ++e) {
      const int64_t i = first + e * THREADS, t = of_truth[e], l = of_label[e];
      if (i >= N) break;
      if (!op.truths.holds(t) || !op.labels.holds(l)) {
        is_in_range = false;
        continue;
      }
      const uint64_t of_row = hash_of(t);
      const uint32_t row = rows.slot(of_row, i, [=](int64_t other) { return truth[other] == t; });
      const uint32_t column = columns.slot(hash_of(l), i, [=](int64_t other) { return label[other] == l; });
      const uint32_t cell = cells.slot(hash_of(of_row + static_cast<uint64_t>(l)), i,
                                       [=](int64_t other) { return truth[other] == t && label[other] == l; });
      // A count that goes from c to c + 1 makes its square larger by 2 c + 1.
      totals.rows2 += 2 * Count{atomicAdd(&rows.count[row], 1u)} + 1;
      totals.columns2 += 2 * Count{atomicAdd(&columns.count[column], 1u)} + 1;
      totals.cells2 += 2 * Count{atomicAdd(&cells.count[cell], 1u)} + 1;
    }
  }
  is_in_range = __syncthreads_and(is_in_range);

  if constexpr (!IS_ARI_ONLY) {
    for (int64_t at = thread; at < op.n_cells; at += THREADS) {
      if (cells.owner[at] == 0) continue;
      const int64_t i = cells.owner[at] - 1;
      const uint32_t column = column_of(i);
      totals.information += information_of(cells.count[at], rows.count[row_of(i)], columns.count[column], N);
      atomicMax(&largest[column], cells.count[at]);
    }
    __syncthreads();
    for (int64_t at = thread; at < op.n_rows; at += THREADS) {
      if (rows.owner[at] == 0) continue;
      ++totals.n_rows;
      totals.truth_entropy += entropy_term(rows.count[at], N);
    }
    for (int64_t at = thread; at < op.n_columns; at += THREADS) {
      if (columns.owner[at] == 0) continue;
      ++totals.n_columns;
      totals.label_entropy += entropy_term(columns.count[at], N);
      totals.n_pure += largest[at];
    }
  }
  add_up<IS_ARI_ONLY ? 3 : sizeof(Totals) / sizeof(Count)>(totals);
  if (thread == 0) write_scores(totals, N, is_in_range, IS_ARI_ONLY, op.scores + i_score, op.V * op.S);
}

// ---- launching

// A power of two, so that at least a third is free: of N points with n different values, n < 0: unknown.
int64_t slots_for(int64_t N, int64_t n) {
  const int64_t most = n < 0 ? N : std::min(N, n);
  int64_t n_slots = 1;
  while (n_slots <= most + most / 2) n_slots *= 2;
  return n_slots;
}

void set_slots(Agreement& op) {
  const bool is_any = op.truths.n < 0 || op.labels.n < 0;
  op.n_rows = slots_for(op.N, op.truths.n);
  op.n_columns = slots_for(op.N, op.labels.n);
  op.n_cells = slots_for(op.N, is_any ? -1 : op.truths.n * op.labels.n);
}

Agreement agreement_of(const PartitionScores& op) {
  Agreement all{};
  all.truth = op.truth, all.label = op.label;
  all.set_truth_step = op.truth_stride, all.label_step = op.label_stride;
  all.V = 1, all.S = op.S, all.N = op.N;
  all.truths = {0, op.n_truth}, all.labels = {0, op.n_label};
  all.scores = op.scores;
  set_slots(all);
  return all;
}

Agreement agreement_of(const AdjustedRand& op) {
  Agreement all{};
  all.truth = op.truth, all.label = op.label;
  all.truth_step = op.N, all.label_step = op.N;
  all.V = op.V, all.S = op.S, all.N = op.N;
  all.truths = {0, op.n_truth}, all.labels = {-1, op.n_label + 1};
  all.is_ari_only = true;
  all.scores = op.score;
  set_slots(all);
  return all;
}

size_t table_bytes(const Agreement& op) { return static_cast<size_t>(op.n_words()) * sizeof(unsigned); }

bool fits_shared(const Agreement& op) { return table_bytes(op) + sizeof(Parts) <= max_shared_bytes(); }

size_t scratch_bytes(const Agreement& op) {
  return fits_shared(op) ? 0 : static_cast<size_t>(op.V * op.S) * table_bytes(op);
}

void launch_agreement(Agreement op, void* scratch, CudaStream stream) {
  if (op.V * op.S == 0) return;
  op.memory = static_cast<unsigned*>(scratch);
  const auto n_blocks = static_cast<unsigned>(op.V * op.S);
  if (fits_shared(op)) {
    const auto kernel = op.is_ari_only ? agreement_kernel<true, true> : agreement_kernel<false, true>;
    launch(kernel, n_blocks, THREADS, table_bytes(op), stream, op);
  } else {
    const auto kernel = op.is_ari_only ? agreement_kernel<true, false> : agreement_kernel<false, false>;
    launch(kernel, n_blocks, THREADS, 0, stream, op);
  }
}

}  // namespace

size_t partition_scores_cuda_scratch(const PartitionScores& op) { return scratch_bytes(agreement_of(op)); }
void partition_scores_cuda(const PartitionScores& op, void* scratch, CudaStream stream) {
  launch_agreement(agreement_of(op), scratch, stream);
}

size_t adjusted_rand_cuda_scratch(const AdjustedRand& op) { return scratch_bytes(agreement_of(op)); }
void adjusted_rand_cuda(const AdjustedRand& op, void* scratch, CudaStream stream) {
  launch_agreement(agreement_of(op), scratch, stream);
}

}  // namespace clmfast
