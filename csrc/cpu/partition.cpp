// partition_scores on the CPU: count the cells of the contingency table, then six formulas on exact integers.
#include "../partition.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../pair_counts.h"

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

bool is_below(int64_t value, int64_t n) { return static_cast<uint64_t>(value) < static_cast<uint64_t>(n); }

// False if a value lies outside [0, n_truth) or [0, n_label).
bool count_dense(const int64_t* truth, const int64_t* label, int64_t N, int64_t n_truth, int64_t n_label,
                 Contingency& out) {
  std::vector<int64_t> table(n_truth * n_label);
  for (int64_t i = 0; i < N; ++i) {
    if (!is_below(truth[i], n_truth) || !is_below(label[i], n_label)) return false;
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

Wide squares(const std::vector<int64_t>& counts) {
  Wide sum = 0;
  for (int64_t count : counts) sum += static_cast<Wide>(count) * count;
  return sum;
}

// Most counts are small, and most of a score's time would be their logarithms.
double log_of(int64_t n) {
  static const std::vector<double> known = [] {
    std::vector<double> logs(4096);
    for (size_t i = 1; i < logs.size(); ++i) logs[i] = std::log(static_cast<double>(i));
    return logs;
  }();
  return n < static_cast<int64_t>(known.size()) ? known[n] : std::log(static_cast<double>(n));
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
  const double log_n = log_of(n);
  for (int64_t count : counts) sum.add(static_cast<double>(count) / n * (log_n - log_of(count)));
  return sum.value;
}

double mutual_information(const Contingency& table) {
  if (table.row_sums.size() <= 1 || table.column_sums.size() <= 1) return 0;
  Sum sum;
  const double n = static_cast<double>(table.n), log_n = log_of(table.n);
  for (const auto& cell : table.cells) {
    const int64_t row = table.row_sums[cell.row], column = table.column_sums[cell.column];
    // As independent as it can be: rounding would leave something, and independent labelings must score exactly 0.
    if (cell.count * table.n == row * column) continue;
    const double term = static_cast<double>(cell.count) / n * (log_of(cell.count) + log_n - log_of(row) - log_of(column));
    // scikit-learn's rule: what is rounding noise counts as nothing.
    if (std::fabs(term) >= std::numeric_limits<double>::epsilon()) sum.add(term);
  }
  return std::max(sum.value, 0.0);
}

// [ari, nmi, homogeneity, completeness, v_measure, purity], `stride` apart.
void score(const Contingency& table, double* out, int64_t stride) {
  double ari = 1, nmi = 1, homogeneity = 1, completeness = 1, v_measure = 1, purity = 1;
  if (table.n > 0) {
    double truth_entropy = entropy(table.row_sums, table.n), label_entropy = entropy(table.column_sums, table.n);
    // It exceeds neither entropy; without rounding, that is, of which a perfect partition would score more than 1.
    double information = std::min({mutual_information(table), truth_entropy, label_entropy});
    Wide cells = 0;
    for (const auto& cell : table.cells) cells += static_cast<Wide>(cell.count) * cell.count;
    ari = adjusted_rand(table.n, cells, squares(table.row_sums), squares(table.column_sums));
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

bool adjusted_rand_cpu(const AdjustedRand& op, ParallelFor parallel_for) {
  const int64_t V = op.V, N = op.N;
  // The points of each truth sorted by class, and where each class ends.
  struct Classes {
    std::vector<int64_t> point, end;
    Wide squares;
  };
  std::vector<Classes> classes(V);
  std::atomic<bool> is_in_range{true};
  for_each(parallel_for, V, [&](int64_t v) {
    const int64_t* truth = op.truth + v * N;
    std::vector<int64_t> count(op.n_truth), next;
    for (int64_t i = 0; i < N; ++i) {
      if (!is_below(truth[i], op.n_truth)) {
        is_in_range = false;
        return;
      }
      ++count[truth[i]];
    }
    Classes& sorted = classes[v];
    sorted.squares = squares(count);
    for (int64_t t = 0, at = 0; t < op.n_truth; ++t) {
      next.push_back(at);
      at += count[t];
      if (count[t]) sorted.end.push_back(at);
    }
    sorted.point.resize(N);
    for (int64_t i = 0; i < N; ++i) sorted.point[next[truth[i]]++] = i;
  });
  if (!is_in_range) return false;
  for_each(parallel_for, op.S, [&](int64_t s) {
    std::vector<int32_t> label(N), in_class(op.n_label + 1);
    std::vector<int64_t> count(op.n_label + 1);
    for (int64_t i = 0; i < N; ++i) {
      const int64_t l = op.label[s * N + i] + 1;
      if (!is_below(l, op.n_label + 1)) {
        is_in_range = false;
        return;
      }
      label[i] = static_cast<int32_t>(l);
      ++count[l];
    }
    for (int64_t v = 0; v < V; ++v) {
      const Classes& sorted = classes[v];
      int64_t same = 0, begin = 0;
      for (int64_t end : sorted.end) {
        for (int64_t e = begin; e < end; ++e) same += 2 * in_class[label[sorted.point[e]]]++ + 1;  // (c + 1)^2 - c^2
        for (int64_t e = begin; e < end; ++e) in_class[label[sorted.point[e]]] = 0;
        begin = end;
      }
      op.score[v * op.S + s] = N == 0 ? 1 : adjusted_rand(N, same, sorted.squares, squares(count));
    }
  });
  return is_in_range;
}

}  // namespace clmfast
