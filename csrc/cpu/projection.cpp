#include "fused.h"  // directions are approximate anyway

#include "projection.h"

#include <algorithm>
#include <cmath>

#include "grid.h"
#include "isa.h"
#include "pair.h"
#include "sums.h"
#include "turn.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr int64_t SAMPLE = 256, TILE = 4, POWER_STEPS = 1;

// z [width], zeros from D on; returns |z|^2.
CLMFAST_BODY float centre_body(const float* row, const float* mean, float unit, int64_t D, int64_t width, float* z) {
  Vector<float> squares = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    const Vector<float> x = (load(row + d) - load(mean + d)) * unit;
    store<float>(z + d, x);
    squares += x * x;
  }
  float sum = sum_of<float>(squares);
  for (; d < width; ++d) {
    z[d] = d < D ? (row[d] - mean[d]) * unit : 0;
    sum += z[d] * z[d];
  }
  return sum;
}

CLMFAST_PER_ISA(float, centre, (const float* row, const float* mean, float unit, int64_t D, int64_t width, float* z),
                (row, mean, unit, D, width, z))

// out[r, 0..C LANES) = sum_d z[r, d] columns[d, ...] of R rows; `stride` floats between rows of columns and of out.
template <int R, int C>
CLMFAST_BODY void product(const float* z, const float* columns, int64_t D, int64_t stride, float* out) {
  Vector<float> sum[R][C] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int c = 0; c < C; ++c) {
      const Vector<float> column = load(columns + d * stride + c * LANES);
      for (int r = 0; r < R; ++r) sum[r][c] += z[r * D + d] * column;
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store<float>(out + r * stride + c * LANES, sum[r][c]);
}

// Of TILE rows z [TILE, D] and columns [D, M].
template <int R>
CLMFAST_BODY void project_body(const float* z, const float* columns, int64_t D, int64_t M, float* out) {
  for (int64_t m = 0; m < M; m += LANES)
    for (int64_t r = 0; r < TILE; r += R) product<R, 1>(z + r * D, columns + m, D, M, out + r * M + m);
}

void project_baseline(const float* z, const float* columns, int64_t D, int64_t M, float* out) {
  project_body<1>(z, columns, D, M, out);
}
CLMFAST_AVX2 void project_avx2(const float* z, const float* columns, int64_t D, int64_t M, float* out) {
  project_body<4>(z, columns, D, M, out);
}
CLMFAST_AVX512 void project_avx512(const float* z, const float* columns, int64_t D, int64_t M, float* out) {
  int64_t m = 0;
  for (; m + 2 * LANES <= M; m += 2 * LANES) product<4, 2>(z, columns + m, D, M, out + m);
  for (; m < M; m += LANES) product<4, 1>(z, columns + m, D, M, out + m);
}

void project(const float* z, const float* columns, int64_t D, int64_t M, float* out) {
  static const auto once = pick(project_baseline, project_avx2, project_avx512);
  once(z, columns, D, M, out);
}

// The rows [M, width], one after the other, become orthonormal; those that depend on the ones before become zero.
CLMFAST_BODY void orthonormalise_body(float* rows, int64_t M, int64_t width) {
  for (int64_t m = 0; m < M; ++m) {
    float* row = rows + m * width;
    float before = 0, after = 0;
    for (int round = 0; round < 2; ++round) {
      Vector<float> squares = {};
      for (int64_t d = 0; d < width; d += LANES) squares += load(row + d) * load(row + d);
      before = round ? before : sum_of<float>(squares);
      for (int64_t i = 0; i < m; ++i) {
        const float* other = rows + i * width;
        Vector<float> dot = {};
        for (int64_t d = 0; d < width; d += LANES) dot += load(row + d) * load(other + d);
        const float share = sum_of<float>(dot);
        for (int64_t d = 0; d < width; d += LANES) store<float>(row + d, load(row + d) - share * load(other + d));
      }
      squares = Vector<float>{};
      for (int64_t d = 0; d < width; d += LANES) squares += load(row + d) * load(row + d);
      after = sum_of<float>(squares);
      const float scale = after > 1e-10f * before && after > 0 ? 1 / std::sqrt(after) : 0;
      for (int64_t d = 0; d < width; ++d) row[d] *= scale;
    }
  }
}

CLMFAST_PER_ISA(void, orthonormalise, (float* rows, int64_t M, int64_t width), (rows, M, width))

int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace

Projection::Projection(const float* points, int64_t N, int64_t D, int64_t n_directions) : D_(D), mean_(D) {
  float reach = 0;
  for (int64_t i = 0; i < N; ++i) {
    const float of_row = row_reach(points + i * D, D);
    if (!(of_row < std::numeric_limits<float>::infinity())) continue;
    reach = std::max(reach, of_row);
    source_.push_back(i);
    add_row(points + i * D, D, mean_.data());
  }
  for (double& x : mean_) x /= static_cast<double>(std::max<int64_t>(n(), 1));
  if (reach > 0) unit_ = std::ldexp(1.0, std::clamp(-std::ilogb(reach), -126, 126));
  const float unit = static_cast<float>(unit_);
  const int64_t width = rounded_up(std::max<int64_t>(D, 1), LANES), n_padded = rounded_up(n(), PANEL);
  const std::vector<float> centre_of(mean_.begin(), mean_.end());
  M_ = rounded_up(n_directions, LANES);
  const bool is_projected = M_ * 4 / 3 < D && 2 * M_ <= n();
  if (!is_projected) M_ = width;
  rows_.assign(n_padded * M_, 0);
  norm2_.assign(n_padded, 0);
  double squares = 0;
  if (is_projected) {
    std::vector<float> sample;
    const int64_t stride = (n() + SAMPLE - 1) / SAMPLE;
    for (int64_t i = 0; i < n(); i += stride) {
      sample.resize(sample.size() + width);
      centre(points + source_[i] * D, centre_of.data(), unit, D, width, &sample[sample.size() - width]);
    }
    const std::vector<float> basis = directions(sample), columns = interleaved(basis.data(), M_, width, M_);
    std::vector<float> z(TILE * width), out(TILE * M_);
    for (int64_t i = 0; i < n(); i += TILE) {
      const int64_t n_rows = std::min(TILE, n() - i);
      for (int64_t r = 0; r < n_rows; ++r)
        squares += centre(points + source_[i + r] * D, centre_of.data(), unit, D, width, &z[r * width]);
      project(z.data(), columns.data(), width, M_, out.data());
      std::copy_n(out.data(), n_rows * M_, &rows_[i * M_]);
    }
  } else {
    for (int64_t i = 0; i < n(); ++i)
      squares += centre(points + source_[i] * D, centre_of.data(), unit, D, width, &rows_[i * width]);
  }
  full_scatter_ = squares / unit2();
  for (int64_t i = 0; i < n(); ++i) {
    double sum = 0;
    for (int64_t m = 0; m < M_; ++m) sum += static_cast<double>(rows_[i * M_ + m]) * rows_[i * M_ + m];
    norm2_[i] = static_cast<float>(sum);
    scatter_ += sum;
  }
  panels_.resize(n_padded * M_);
  for (int64_t i = 0; i < n_padded; i += LANES) {
    for (int64_t m = 0; m < M_; m += LANES) {
      Vector<float> square[LANES];
      for (int64_t r = 0; r < LANES; ++r) square[r] = load(&rows_[(i + r) * M_ + m]);
      transpose_square<float>(square);
      for (int64_t r = 0; r < LANES; ++r)
        store<float>(&panels_[i / PANEL * PANEL * M_ + (m + r) * PANEL + i % PANEL], square[r]);
    }
  }
}

// [M, width] from a sample [n, width].
std::vector<float> Projection::directions(const std::vector<float>& sample) const {
  const int64_t width = rounded_up(D_, LANES), n = static_cast<int64_t>(sample.size()) / width;
  const int64_t n_padded = rounded_up(n, TILE);
  std::vector<float> padded = sample, basis(M_ * width);
  padded.resize(n_padded * width);
  for (int64_t m = 0; m < M_; ++m) std::copy_n(&sample[m * n / M_ * width], width, &basis[m * width]);
  for (int64_t step = 0; step < POWER_STEPS; ++step) {
    const std::vector<float> columns = interleaved(basis.data(), M_, width, M_);
    std::vector<float> product(n_padded * M_);  // [n, M]
    for (int64_t i = 0; i < n_padded; i += TILE) project(&padded[i * width], columns.data(), width, M_, &product[i * M_]);
    const std::vector<float> coordinates = interleaved(product.data(), n_padded, M_, n_padded);  // [M, n]
    for (int64_t m = 0; m < M_; m += TILE)
      project(&coordinates[m * n_padded], padded.data(), n_padded, width, &basis[m * width]);
    orthonormalise(basis.data(), M_, width);
  }
  return basis;
}

}  // namespace clmfast
