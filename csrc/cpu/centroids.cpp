#include "centroids.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "pair.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// Turns dot [K, PANEL] into screened values v; label[c] is the first centroid within slack[c] of column c's smallest,
// n_close their number, and limit the largest v among them. within and beyond are those of Nearest, in scaled units:
// dist2 is at least v + P^2 - slack and at most v + P^2 + slack.
CLMFAST_BODY void find_close_body(float* dot, int64_t K, const float* low_norm2, const float* norm2, const float* slack,
                                  Nearest& found, int32_t* n_close, float* limit) {
  float best[PANEL], second[PANEL];
  for (int64_t c = 0; c < PANEL; ++c) best[c] = second[c] = INF;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < PANEL; ++c) {
      float screened = low_norm2[k] - 2 * dot[k * PANEL + c];
      dot[k * PANEL + c] = screened;
      float larger = screened < best[c] ? best[c] : screened;
      best[c] = screened < best[c] ? screened : best[c];
      second[c] = larger < second[c] ? larger : second[c];
    }
  }
  for (int64_t c = 0; c < PANEL; ++c) {
    float below = second[c] + norm2[c] - slack[c];
    found.beyond[c] = std::sqrt(below > 0 ? below : 0);
    found.within[c] = std::sqrt(best[c] + norm2[c] + slack[c]);
    limit[c] = best[c] + slack[c];
    n_close[c] = 0;
    found.label[c] = 0;
  }
  for (int64_t k = K - 1; k >= 0; --k) {
    for (int64_t c = 0; c < PANEL; ++c) {
      bool is_close = dot[k * PANEL + c] <= limit[c];
      found.label[c] = is_close ? static_cast<int32_t>(k) : found.label[c];
      n_close[c] += is_close;
    }
  }
}

CLMFAST_PER_ISA(void, find_close,
                (float* dot, int64_t K, const float* low_norm2, const float* norm2, const float* slack, Nearest& found,
                 int32_t* n_close, float* limit),
                (dot, K, low_norm2, norm2, slack, found, n_close, limit))

// Adds coordinates 0..width-1 of every point to the sums [K, SUM_BLOCK] of its group. Points come one after the other,
// as memory likes it, and the sums of all groups fit the first cache.
CLMFAST_BODY void sum_block_body(const float* points, const int32_t* group, int64_t N, int64_t D, int64_t width,
                                 double* sums) {
  for (int64_t i = 0; i < N; ++i) {
    if (group[i] < 0) continue;
    const float* point = points + i * D;
    double* sum = sums + group[i] * SUM_BLOCK;
    if (width == SUM_BLOCK) {
      for (int64_t d = 0; d < SUM_BLOCK; ++d) sum[d] += point[d];
    } else {
      for (int64_t d = 0; d < width; ++d) sum[d] += point[d];
    }
  }
}

CLMFAST_PER_ISA(void, sum_block,
                (const float* points, const int32_t* group, int64_t N, int64_t D, int64_t width, double* sums),
                (points, group, N, D, width, sums))

}  // namespace

void mean_of_groups(const float* points, const std::vector<int32_t>& group, const std::vector<int64_t>& count,
                    int64_t D, int64_t block, double* mean) {
  const int64_t at = block * SUM_BLOCK, width = std::min(SUM_BLOCK, D - at), K = static_cast<int64_t>(count.size());
  std::vector<double> sums(K * SUM_BLOCK);
  sum_block(points + at, group.data(), static_cast<int64_t>(group.size()), D, width, sums.data());
  for (int64_t k = 0; k < K; ++k)
    for (int64_t d = 0; d < width; ++d)
      mean[k * D + at + d] = sums[k * SUM_BLOCK + d] / static_cast<double>(count[k]);
}

void Centroids::pack(const Frame& frame, const float* centroid, int64_t K) {
  frame_ = frame, centroid_ = centroid, K_ = K;
  const int64_t D = frame.D, groups = (K + TILE_ROWS - 1) / TILE_ROWS;
  rows_.resize(groups * D * TILE_ROWS);
  low_norm2_.resize(K);
  largest_norm2_ = 0;
  for (int64_t k = 0; k < K; ++k) {
    double norm2 = pack_row(frame, centroid + k * D, &rows_[k / TILE_ROWS * TILE_ROWS * D + k % TILE_ROWS], TILE_ROWS);
    low_norm2_[k] = static_cast<float>((1 - frame.kappa) * norm2);
    if (norm2 < INF) largest_norm2_ = std::max(largest_norm2_, norm2);
  }
}

Nearest Centroids::nearest(const float* points, const int64_t* row, const float* panel, const double* norm2,
                           const int32_t* excluded) const {
  const int64_t D = frame_.D;
  std::vector<float> screened((K_ + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * PANEL);
  float norm2_float[PANEL], slack[PANEL], limit[PANEL];
  int32_t n_close[PANEL];
  Nearest found;
  for (int64_t k = 0; k < K_; k += TILE_ROWS)
    dot_tile(&rows_[k * D], std::min(TILE_ROWS, K_ - k), panel, D, &screened[k * PANEL]);
  if (excluded)
    for (int64_t c = 0; c < PANEL; ++c)
      if (excluded[c] >= 0) screened[excluded[c] * PANEL + c] = -INF;  // a product that leads to infinity below
  // The best and a rival may both be off by kappa (C^2 + P^2) + eta; twice that again covers the float32 arithmetic
  // done here.
  for (int64_t c = 0; c < PANEL; ++c) {
    norm2_float[c] = static_cast<float>(norm2[c]);
    slack[c] = static_cast<float>(4 * (frame_.kappa * (largest_norm2_ + norm2[c]) + frame_.eta));
  }
  find_close(screened.data(), K_, low_norm2_.data(), norm2_float, slack, found, n_close, limit);
  const float in_points = 1 / frame_.scale;
  for (int64_t c = 0; c < PANEL; ++c) {
    found.within[c] = n_close[c] > 1 ? INF : found.within[c] * in_points * (1 + 0x1p-20f);
    found.beyond[c] = found.beyond[c] * in_points * (1 - 0x1p-20f);
  }
  for (int64_t c = 0; c < PANEL; ++c) {
    if (n_close[c] < 2 || !(norm2[c] < INF)) continue;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = found.label[c]; k < K_; ++k) {
      if (screened[k * PANEL + c] > limit[c]) continue;
      double dist2 = pair_dist2(points + row[c] * D, centroid_ + k * D, D);
      if (dist2 < least) {
        least = dist2;
        found.label[c] = static_cast<int32_t>(k);
      }
    }
  }
  return found;
}

}  // namespace clmfast
