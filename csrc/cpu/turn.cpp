#include "turn.h"

#include <algorithm>
#include <cmath>

#include "grid.h"
#include "isa.h"
#include "tile.h"

namespace clmfast {

std::vector<float> interleaved(const float* rows, int64_t n, int64_t K, int64_t side) {
  std::vector<float> out((n + side - 1) / side * side * K);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < K; ++k) out[(i / side * K + k) * side + i % side] = rows[i * K + k];
  return out;
}

namespace {

// a b^T of a [m, K] and b [n, K], m a multiple of TILE_ROWS and n of PANEL, both interleaved.
std::vector<float> products(const std::vector<float>& a, const std::vector<float>& b, int64_t K) {
  const int64_t m = static_cast<int64_t>(a.size()) / K, n = static_cast<int64_t>(b.size()) / K;
  std::vector<float> out(m * n);
  float tile[TILE_ROWS * PANEL];
  for (int64_t i = 0; i < m; i += TILE_ROWS) {
    for (int64_t j = 0; j < n; j += PANEL) {
      dot_tile(&a[i * K], TILE_ROWS, &b[j * K], K, tile);
      for (int64_t r = 0; r < TILE_ROWS; ++r) std::copy_n(tile + r * PANEL, PANEL, &out[(i + r) * n + j]);
    }
  }
  return out;
}

CLMFAST_BODY void add_scaled_body(float* to, float scale, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += scale * from[i];
}

CLMFAST_PER_ISA(void, add_scaled, (float* to, float scale, const float* from, int64_t n), (to, scale, from, n))

// The Gram matrix of rows [TURNED, D]; its rows are `stride` long.
constexpr int64_t GRAM_STRIDE = (TURNED + PANEL - 1) / PANEL * PANEL;
std::vector<float> gram(const std::vector<float>& rows, int64_t D) {
  return products(interleaved(rows.data(), TURNED, D, TILE_ROWS), interleaved(rows.data(), TURNED, D, PANEL), D);
}

// Makes the rows [TURNED, D] orthogonal and of length 1, or 0 where they depend on those before: the Cholesky factor of
// their Gram matrix, inverted. Twice, as the first time leaves what rounding did to rows that were almost dependent.
void orthogonalise(std::vector<float>& rows, int64_t D) {
  for (int round = 0; round < 2; ++round) {
    const std::vector<float> g = gram(rows, D);
    std::vector<double> factor(TURNED * TURNED);
    for (int64_t m = 0; m < TURNED; ++m) {
      for (int64_t i = 0; i <= m; ++i) {
        double x = g[m * GRAM_STRIDE + i];
        for (int64_t j = 0; j < i; ++j) x -= factor[m * TURNED + j] * factor[i * TURNED + j];
        const double pivot = factor[i * TURNED + i];
        if (i < m) factor[m * TURNED + i] = pivot > 0 ? x / pivot : 0;
        else factor[m * TURNED + m] = x > 1e-5 * g[m * GRAM_STRIDE + m] ? std::sqrt(x) : 0;
      }
    }
    for (int64_t m = 0; m < TURNED; ++m) {
      float* row = &rows[m * D];
      for (int64_t i = 0; i < m; ++i) add_scaled(row, -static_cast<float>(factor[m * TURNED + i]), &rows[i * D], D);
      const double pivot = factor[m * TURNED + m];
      const float scale = pivot > 0 ? static_cast<float>(1 / pivot) : 0;
      for (int64_t d = 0; d < D; ++d) row[d] *= scale;
    }
  }
}

// Scales the rows so that |rows z| <= |z| for certain: no eigenvalue of their Gram matrix exceeds the largest sum of a
// row's absolute values (Gershgorin 1931).
void shorten(std::vector<float>& rows, int64_t D) {
  const std::vector<float> g = gram(rows, D);
  float most = 0;
  for (int64_t m = 0; m < TURNED; ++m) {
    float sum = 0;
    for (int64_t i = 0; i < TURNED; ++i) sum += std::abs(g[m * GRAM_STRIDE + i]);
    most = std::max(most, sum);
  }
  most += static_cast<float>(TURNED * (D + TURNED)) * 0x1p-23f;  // what rounding may have hidden
  for (float& x : rows) x *= 1 / std::sqrt(most) * (1 - 0x1p-21f);
}

double squares(const std::vector<float>& x) {
  double sum = 0;
  for (float value : x) sum += static_cast<double>(value) * value;
  return sum;
}

}  // namespace

bool find_turn(const std::vector<float>& sample, int64_t D, std::vector<float>& rows, std::vector<float>& projected) {
  constexpr double ENOUGH = 0.85;  // share of the squares
  if (D < TURNED * 4 / 3) return false;
  const int64_t n = static_cast<int64_t>(sample.size()) / D;
  if (n < 2 * TURNED) return false;
  const double all = squares(sample);
  rows.resize(TURNED * D);
  for (int64_t m = 0; m < TURNED; ++m) std::copy_n(&sample[m * n / TURNED * D], D, &rows[m * D]);
  const std::vector<float> panels = interleaved(sample.data(), n, D, PANEL);
  projected = products(interleaved(rows.data(), TURNED, D, TILE_ROWS), panels, D);
  // The number of dimensions that the sample fills, (sum of eigenvalues)^2 / sum of their squares: of the covariance,
  // whose squared eigenvalues are the mean squared product of two points.
  const double n_products = static_cast<double>(TURNED * n), mean = all / static_cast<double>(n);
  if (!(mean * mean * n_products < TURNED / 2 * squares(projected))) return false;
  std::fill(rows.begin(), rows.end(), 0.0f);
  const int64_t stride = static_cast<int64_t>(projected.size()) / TURNED;
  for (int64_t m = 0; m < TURNED; ++m)
    for (int64_t i = 0; i < n; ++i) add_scaled(&rows[m * D], projected[m * stride + i], &sample[i * D], D);
  orthogonalise(rows, D);
  shorten(rows, D);
  projected = products(interleaved(rows.data(), TURNED, D, TILE_ROWS), panels, D);
  return squares(projected) > ENOUGH * all;
}

}  // namespace clmfast
