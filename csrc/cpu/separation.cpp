// separation on the CPU: means of the groups, then for every point its own centroid and the nearest other one.
#include "../separation.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "centroids.h"
#include "pair.h"
#include "sums.h"

namespace clmfast {
namespace {

constexpr int64_t CHUNK = 256;  // points of one task

struct Sums {
  double silhouette = 0, within = 0;
};

struct Set {
  std::vector<int64_t> count;   // [K]
  std::vector<double> mean;     // [K, D]
  std::vector<float> centroid;  // [K, D], NaN where a group has no points
  Centroids packed;
  int64_t n_finite = 0, n_present;  // n_present: groups with points
};

// The mean of each group.
void make_set(const Separation& op, int64_t s, Set& set) {
  const int64_t K = op.n_labels, D = op.D;
  const float* points = op.points + s * op.N * D;
  std::vector<int32_t> group(op.label, op.label + op.N);
  set.mean.resize(K * D);
  sum_groups(points, op.N, D, group.data(), set.mean.data());
  // A point that is not finite makes its group's sum so: then all are looked at.
  if (!std::all_of(set.mean.begin(), set.mean.end(), [](double x) { return std::isfinite(x); })) {
    for (int64_t i = 0; i < op.N; ++i)
      if (!is_finite_row(points + i * D, D)) group[i] = -1;
    std::fill(set.mean.begin(), set.mean.end(), 0.0);
    sum_groups(points, op.N, D, group.data(), set.mean.data());
  }
  set.count.resize(K);
  for (int32_t k : group)
    if (k >= 0) ++set.n_finite, ++set.count[k];
  for (int64_t i = 0; i < K * D; ++i) set.mean[i] /= static_cast<double>(set.count[i / D]);
  set.centroid.assign(set.mean.begin(), set.mean.end());
  set.n_present = K - std::count(set.count.begin(), set.count.end(), 0);
  set.packed.pack(set.centroid.data(), K, D);
}

Sums sum_chunk(const Separation& op, int64_t s, const Set& set, int64_t chunk) {
  const int64_t D = op.D, first = chunk * CHUNK, n = std::min(CHUNK, op.N - first);
  const float* points = op.points + s * op.N * D;
  int64_t row[CHUNK];
  int32_t own[CHUNK], other[CHUNK];
  std::iota(row, row + n, first);
  std::copy_n(op.label + first, n, own);
  set.packed.nearest(points, row, n, own, {other, nullptr, nullptr, 0});
  for (int64_t c = 0; c < n; ++c)
    if (other[c] < 0) own[c] = -1;  // not finite
  double a2[CHUNK], b2[CHUNK];
  dist2_to_groups(points, first, n, D, own, set.centroid.data(), a2);
  Sums sums;
  for (int64_t c = 0; c < n; ++c) sums.within += a2[c];
  if (set.n_present < 2) return sums;
  dist2_to_groups(points, first, n, D, other, set.centroid.data(), b2);
  for (int64_t c = 0; c < n; ++c) {
    const double a = std::sqrt(a2[c]), b = std::sqrt(b2[c]);
    if (a > 0 || b > 0) sums.silhouette += (b - a) / std::max(a, b);
  }
  return sums;
}

double between(const Separation& op, const Set& set) {
  const double n_finite = static_cast<double>(set.n_finite);
  double sum = 0;
  for (int64_t d = 0; d < op.D; ++d) {
    double mean = 0;
    for (int64_t k = 0; k < op.n_labels; ++k)
      if (set.count[k]) mean += static_cast<double>(set.count[k]) * set.mean[k * op.D + d];
    mean /= n_finite;
    for (int64_t k = 0; k < op.n_labels; ++k) {
      const double x = set.mean[k * op.D + d] - mean;
      if (set.count[k]) sum += static_cast<double>(set.count[k]) * x * x;
    }
  }
  return sum;
}

}  // namespace

bool separation_cpu(const Separation& op, ParallelFor parallel_for) {
  for (int64_t i = 0; i < op.N; ++i)
    if (op.label[i] < 0 || op.label[i] >= op.n_labels) return false;
  const int64_t chunks = (op.N + CHUNK - 1) / CHUNK;
  std::vector<Set> sets(op.S);
  std::vector<Sums> sums(op.S * chunks);
  for_each(parallel_for, op.S, [&](int64_t s) { make_set(op, s, sets[s]); });
  for_each(parallel_for, op.S * chunks, [&](int64_t task) {
    const int64_t s = task / chunks;
    sums[task] = sum_chunk(op, s, sets[s], task % chunks);
  });
  for (int64_t s = 0; s < op.S; ++s) {
    Sums sum;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum.silhouette += sums[s * chunks + chunk].silhouette;
      sum.within += sums[s * chunks + chunk].within;
    }
    const double apart = between(op, sets[s]);
    op.out[s] = sum.silhouette / static_cast<double>(sets[s].n_finite);
    op.out[op.S + s] = apart / sum.within;
    op.out[2 * op.S + s] = apart + sum.within;
  }
  return true;
}

}  // namespace clmfast
