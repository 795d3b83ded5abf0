// partition_scores on the CPU: count the cells of the contingency table, then six formulas on exact integers.
#include "../partition.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace clmfast {
namespace {

// The cells that are not zero, in the order of (truth, label), and the sums of their rows and columns.
struct Contingency {
  struct Cell {
    int64_t count, row, column;  // row and column: positions in the two lists below
  };
  std::vector<Cell> cells;
  std::vector<int64_t> row_sums, column_sums;
  int64_t n = 0;
};

// False if a value lies outside [0, n_truth) or [0, n_label).
bool count_dense(const int64_t* truth, const int64_t* label, int64_t N, int64_t n_truth, int64_t n_label,
                 Contingency& out) {
  std::vector<int64_t> table(n_truth * n_label);
  for (int64_t i = 0; i < N; ++i) {
    if (truth[i] < 0 || truth[i] >= n_truth || label[i] < 0 || label[i] >= n_label) return false;
    ++table[truth[i] * n_label + label[i]];
  }
  std::vector<int64_t> column_sums(n_label);
  for (int64_t t = 0; t < n_truth; ++t)
    for (int64_t l = 0; l < n_label; ++l) column_sums[l] += table[t * n_label + l];
  std::vector<int64_t> column_of(n_label, -1);
  for (int64_t l = 0; l < n_label; ++l) {
    if (column_sums[l] == 0) continue;
    column_of[l] = static_cast<int64_t>(out.column_sums.size());
    out.column_sums.push_back(column_sums[l]);
  }
  for (int64_t t = 0; t < n_truth; ++t) {
    int64_t row = static_cast<int64_t>(out.row_sums.size()), row_sum = 0;
    for (int64_t l = 0; l < n_label; ++l) {
      int64_t count = table[t * n_label + l];
      if (count == 0) continue;
      out.cells.push_back({count, row, column_of[l]});
      row_sum += count;
    }
    if (row_sum) out.row_sums.push_back(row_sum);
  }
  out.n = N;
  return true;
}

void count_sorted(const int64_t* truth, const int64_t* label, int64_t N, Contingency& out) {
  std::vector<int64_t> labels(label, label + N);
  std::sort(labels.begin(), labels.end());
  std::vector<int64_t> distinct;
  for (int64_t i = 0; i < N; ++i) {
    if (i == 0 || labels[i] != labels[i - 1]) {
      distinct.push_back(labels[i]);
      out.column_sums.push_back(0);
    }
    ++out.column_sums.back();
  }
  std::vector<std::pair<int64_t, int64_t>> pairs(N);
  for (int64_t i = 0; i < N; ++i) pairs[i] = {truth[i], label[i]};
  std::sort(pairs.begin(), pairs.end());
  for (int64_t i = 0; i < N; ++i) {
    if (i == 0 || pairs[i].first != pairs[i - 1].first) out.row_sums.push_back(0);
    ++out.row_sums.back();
    if (i == 0 || pairs[i] != pairs[i - 1]) {
      int64_t column = std::lower_bound(distinct.begin(), distinct.end(), pairs[i].second) - distinct.begin();
      out.cells.push_back({0, static_cast<int64_t>(out.row_sums.size()) - 1, column});
    }
    ++out.cells.back().count;
  }
  out.n = N;
}

double adjusted_rand(const Contingency& table) {
  using Wide = __int128;                                                    // products of pair counts reach N^4
  Wide same_both = -table.n, same_truth = -table.n, same_label = -table.n;  // ordered pairs of different points
  for (const auto& cell : table.cells) same_both += static_cast<Wide>(cell.count) * cell.count;
  for (int64_t sum : table.row_sums) same_truth += static_cast<Wide>(sum) * sum;
  for (int64_t sum : table.column_sums) same_label += static_cast<Wide>(sum) * sum;
  Wide only_truth = same_truth - same_both, only_label = same_label - same_both;
  if (only_truth == 0 && only_label == 0) return 1;
  Wide neither = static_cast<Wide>(table.n) * (table.n - 1) - same_both - only_truth - only_label;
  Wide above = same_both * neither - only_truth * only_label;
  Wide below = same_truth * (only_truth + neither) + same_label * (only_label + neither);
  return 2 * static_cast<double>(above) / static_cast<double>(below);
}

// A sum whose rounding does not grow with the number of terms (Kahan 1965): a million singletons are a million terms.
struct Sum {
  double value = 0, lost = 0;

  void add(double term) {
    double wanted = term - lost, next = value + wanted;
    lost = (next - value) - wanted;
    value = next;
  }
};

double entropy(const std::vector<int64_t>& counts, int64_t n) {
  if (counts.size() <= 1) return 0;
  Sum sum;
  double log_n = std::log(static_cast<double>(n));
  for (int64_t count : counts) sum.add(static_cast<double>(count) / n * (log_n - std::log(static_cast<double>(count))));
  return sum.value;
}

double mutual_information(const Contingency& table) {
  if (table.row_sums.size() <= 1 || table.column_sums.size() <= 1) return 0;
  Sum sum;
  double n = static_cast<double>(table.n), log_n = std::log(n);
  for (const auto& cell : table.cells) {
    double expected =
        static_cast<double>(table.row_sums[cell.row]) * static_cast<double>(table.column_sums[cell.column]);
    double count = static_cast<double>(cell.count);
    double term = count / n * (std::log(count) + log_n - std::log(expected));
    // scikit-learn's rule: what is rounding noise counts as nothing, so that independent labelings score exactly 0.
    if (std::fabs(term) >= std::numeric_limits<double>::epsilon()) sum.add(term);
  }
  return std::max(sum.value, 0.0);
}

// [ari, nmi, homogeneity, completeness, v_measure, purity], `stride` apart.
void score(const Contingency& table, double* out, int64_t stride) {
  double ari = 1, nmi = 1, homogeneity = 1, completeness = 1, v_measure = 1, purity = 1;
  if (table.n > 0) {
    double information = mutual_information(table);
    double truth_entropy = entropy(table.row_sums, table.n), label_entropy = entropy(table.column_sums, table.n);
    ari = adjusted_rand(table);
    if (table.row_sums.size() > 1 || table.column_sums.size() > 1)
      nmi = information == 0 ? 0 : information / ((truth_entropy + label_entropy) / 2);
    if (truth_entropy > 0) homogeneity = information / truth_entropy;
    if (label_entropy > 0) completeness = information / label_entropy;
    double sum = homogeneity + completeness;
    v_measure = sum == 0 ? 0 : 2 * homogeneity * completeness / sum;
    std::vector<int64_t> largest(table.column_sums.size());
    for (const auto& cell : table.cells) largest[cell.column] = std::max(largest[cell.column], cell.count);
    int64_t n_pure = 0;
    for (int64_t count : largest) n_pure += count;
    purity = static_cast<double>(n_pure) / static_cast<double>(table.n);
  }
  const double scores[] = {ari, nmi, homogeneity, completeness, v_measure, purity};
  for (int64_t i = 0; i < 6; ++i) out[i * stride] = scores[i];
}

}  // namespace

bool partition_scores_cpu(const PartitionScores& op, ParallelFor parallel_for) {
  std::atomic<bool> is_in_range{true};
  for_each(parallel_for, op.S, [&](int64_t s) {
    const int64_t* truth = op.truth + s * op.truth_stride;
    const int64_t* label = op.label + s * op.label_stride;
    Contingency table;
    if (op.n_truth < 0) {
      count_sorted(truth, label, op.N, table);
    } else if (!count_dense(truth, label, op.N, op.n_truth, op.n_label, table)) {
      is_in_range = false;
      return;
    }
    score(table, op.scores + s, op.S);
  });
  return is_in_range;
}

}  // namespace clmfast
