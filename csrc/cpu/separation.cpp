// separation on the CPU: means of the groups, then for every point its own centroid and the nearest other one.
#include "../separation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "centroids.h"
#include "pair.h"
#include "panels.h"

namespace clmfast {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t CHUNK_PANELS = 8;  // panels of one task

struct Set {
  std::vector<int32_t> group;  // [N], -1 for points that are not finite
  std::vector<int64_t> count;  // [K]
  int64_t n_finite = 0;
  std::vector<double> mean;     // [K, D]
  std::vector<float> centroid;  // [K, D], NaN where a group has no points
  Centroids packed;
  int64_t n_present;  // groups with points
};

struct Sums {
  double silhouette = 0, within = 0;
};

void make_set(const Separation& op, const Packed& packed, int64_t s, Set& set) {
  const int64_t K = op.n_labels, D = op.D;
  const double* norm2 = packed.norm2_of(s);
  set.group.resize(op.N);
  set.count.resize(K);
  for (int64_t i = 0; i < op.N; ++i) {
    set.group[i] = norm2[i] < INF ? static_cast<int32_t>(op.label[i]) : -1;
    if (set.group[i] < 0) continue;
    ++set.n_finite;
    ++set.count[set.group[i]];
  }
  set.mean.resize(K * D);
  for (int64_t block = 0; block < n_sum_blocks(D); ++block)
    mean_of_groups(op.points + s * op.N * D, set.group, set.count, D, block, set.mean.data());
  set.centroid.assign(set.mean.begin(), set.mean.end());
  set.n_present = K - std::count(set.count.begin(), set.count.end(), 0);
  set.packed.pack(frame_of(packed, s), set.centroid.data(), K);
}

Sums sum_chunk(const Separation& op, const Packed& packed, int64_t s, const Set& set, int64_t chunk) {
  const int64_t D = op.D;
  const float* points = op.points + s * op.N * D;
  Sums sums;
  for (int64_t i_panel = chunk * CHUNK_PANELS; i_panel < std::min((chunk + 1) * CHUNK_PANELS, n_panels(op.N));
       ++i_panel) {
    const int64_t first = i_panel * PANEL, n = std::min(PANEL, op.N - first);
    int64_t row[PANEL];
    int32_t own[PANEL];
    std::iota(row, row + PANEL, first);
    std::fill(std::copy_n(&set.group[first], n, own), own + PANEL, -1);
    const Nearest other =
        set.packed.nearest(points, row, packed.panel(s, i_panel), packed.norm2_of(s) + first, own);
    for (int64_t c = 0; c < n; ++c) {
      if (own[c] < 0) continue;
      const float* point = points + (first + c) * D;
      const double a2 = pair_dist2(point, &set.centroid[own[c] * D], D);
      sums.within += a2;
      if (set.n_present < 2) continue;
      const double a = std::sqrt(a2), b = std::sqrt(pair_dist2(point, &set.centroid[other.label[c] * D], D));
      if (a > 0 || b > 0) sums.silhouette += (b - a) / std::max(a, b);
    }
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
  std::optional<PackedMemory> own;
  if (!op.packed) {
    own.emplace(op.S, op.N, op.D);
    make_frames(*own, op.points, op.N, nullptr, 0, 0, parallel_for);
    pack_rows(*own, op.points, op.N, 0, op.N, parallel_for);
  }
  const Packed& packed = own ? *own : *op.packed;
  const int64_t chunks = (n_panels(op.N) + CHUNK_PANELS - 1) / CHUNK_PANELS;
  std::vector<Set> sets(op.S);
  std::vector<Sums> sums(op.S * chunks);
  for_each(parallel_for, op.S, [&](int64_t s) { make_set(op, packed, s, sets[s]); });
  for_each(parallel_for, op.S * chunks, [&](int64_t task) {
    const int64_t s = task / chunks;
    sums[task] = sum_chunk(op, packed, s, sets[s], task % chunks);
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
