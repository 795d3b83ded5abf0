#include "fused.h"  // directions are approximate anyway

#include "projection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "lanes.h"
#include "pair.h"
#include "sums.h"
#include "turn.h"

namespace clmfast {

namespace {

constexpr int64_t SAMPLE = 256, TILE = 4;
using Eight = Lanes<SIDE>;

// out[r, 0..C SIDE) = sum_d z[r, d] columns[d, ...] of TILE rows; `stride` floats between rows of columns and of out.
template <int C>
CLMFAST_BODY void product(const float* z, const float* columns, int64_t D, int64_t stride, float* out) {
  Eight sum[TILE][C] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int c = 0; c < C; ++c) {
      const Eight column = lanes<SIDE>(columns + d * stride + c * SIDE);
      for (int r = 0; r < TILE; ++r) sum[r][c] += z[r * D + d] * column;
    }
  for (int r = 0; r < TILE; ++r)
    for (int c = 0; c < C; ++c) lanes<SIDE>(out + r * stride + c * SIDE) = sum[r][c];
}

// Of TILE rows z [TILE, D] and columns [D, M].
CLMFAST_BODY void products_body(const float* z, const float* columns, int64_t D, int64_t M, float* out) {
  int64_t m = 0;
  for (; m + 3 * SIDE <= M; m += 3 * SIDE) product<3>(z, columns + m, D, M, out + m);
  for (; m < M; m += SIDE) product<1>(z, columns + m, D, M, out + m);
}

CLMFAST_PER_ISA(void, products, (const float* z, const float* columns, int64_t D, int64_t M, float* out),
                (z, columns, D, M, out))

CLMFAST_BODY void subtract_body(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

CLMFAST_PER_ISA(void, subtract, (const float* a, const float* b, int64_t n, float* out), (a, b, n, out))

CLMFAST_BODY float dot_of(const float* a, const float* b, int64_t n) {
  Eight sum = {};
  int64_t i = 0;
  for (; i + SIDE <= n; i += SIDE) sum += lanes<SIDE>(a + i) * lanes<SIDE>(b + i);
  float dot = sum_of(sum);
  for (; i < n; ++i) dot += a[i] * b[i];
  return dot;
}

// The rows [M, D], one after the other, become orthonormal; those that depend on the ones before become zero.
CLMFAST_BODY void orthonormalise_body(float* rows, int64_t M, int64_t D) {
  for (int64_t m = 0; m < M; ++m) {
    float* row = rows + m * D;
    const float before = dot_of(row, row, D);
    for (int round = 0; round < 2; ++round)
      for (int64_t i = 0; i < m; ++i) {
        const float* other = rows + i * D;
        const float share = dot_of(row, other, D);
        for (int64_t d = 0; d < D; ++d) row[d] -= share * other[d];
      }
    const float after = dot_of(row, row, D);
    const float scale = after > 1e-10f * before && after > 0 ? 1 / std::sqrt(after) : 0;
    for (int64_t d = 0; d < D; ++d) row[d] *= scale;
  }
}

CLMFAST_PER_ISA(void, orthonormalise, (float* rows, int64_t M, int64_t D), (rows, M, D))

}  // namespace

float main_directions(const float* points, int64_t N, int64_t D, int64_t M, float* centre, float* directions) {
  std::vector<double> mean(D);
  std::vector<int64_t> finite;
  float reach = 0;
  for (int64_t i = 0; i < N; ++i) {
    const float of_row = row_reach(points + i * D, D);
    if (!(of_row < std::numeric_limits<float>::infinity())) continue;
    reach = std::max(reach, of_row);
    finite.push_back(i);
    add_row(points + i * D, D, mean.data());
  }
  const float unit =
      reach > 0 ? static_cast<float>(std::ldexp(1.0, std::clamp(-std::ilogb(reach), -126, 126))) : 1;
  std::fill_n(directions, M * D, 0.0f);
  const int64_t n_finite = static_cast<int64_t>(finite.size());
  for (int64_t d = 0; d < D; ++d)
    centre[d] = static_cast<float>(mean[d] / static_cast<double>(std::max<int64_t>(n_finite, 1)));
  if (n_finite == 0 || M == 0) return unit;
  const int64_t stride = (n_finite + SAMPLE - 1) / SAMPLE, n = (n_finite + stride - 1) / stride;
  const int64_t n_padded = (n + TILE - 1) / TILE * TILE;
  std::vector<float> sample(n_padded * D), product(n_padded * M);  // [n, D], [n, M]
  for (int64_t i = 0; i < n; ++i) {
    subtract(points + finite[i * stride] * D, centre, D, &sample[i * D]);
    for (int64_t d = 0; d < D; ++d) sample[i * D + d] *= unit;
  }
  for (int64_t m = 0; m < M; ++m) std::copy_n(&sample[m * n / M * D], D, directions + m * D);
  const std::vector<float> columns = interleaved(directions, M, D, M);
  for (int64_t i = 0; i < n_padded; i += TILE) products(&sample[i * D], columns.data(), D, M, &product[i * M]);
  const std::vector<float> coordinates = interleaved(product.data(), n_padded, M, n_padded);  // [M, n]
  const int64_t width = (D + SIDE - 1) / SIDE * SIDE;
  std::vector<float> padded(n_padded * width), out(TILE * width);
  for (int64_t i = 0; i < n; ++i) std::copy_n(&sample[i * D], D, &padded[i * width]);
  for (int64_t m = 0; m < M; m += TILE) {
    products(&coordinates[m * n_padded], padded.data(), n_padded, width, out.data());
    for (int64_t r = 0; r < TILE; ++r) std::copy_n(&out[r * width], D, directions + (m + r) * D);
  }
  orthonormalise(directions, M, D);
  for (int64_t i = 0; i < M * D; ++i) directions[i] *= unit;
  return unit;
}

void project(const float* points, int64_t N, int64_t D, const float* centre, const float* directions, int64_t M,
             float* rows) {
  const std::vector<float> columns = interleaved(directions, M, D, M);
  std::vector<float> z(TILE * D), out(TILE * M);
  for (int64_t i = 0; i < N; i += TILE) {
    const int64_t n = std::min(TILE, N - i);
    for (int64_t r = 0; r < n; ++r) subtract(points + (i + r) * D, centre, D, &z[r * D]);
    products(z.data(), columns.data(), D, M, out.data());
    std::copy_n(out.data(), n * M, rows + i * M);
  }
}

}  // namespace clmfast
