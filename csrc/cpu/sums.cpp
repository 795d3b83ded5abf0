#include "sums.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "pair.h"

namespace clmfast {
namespace {

typedef double Four __attribute__((vector_size(4 * sizeof(double)), aligned(8), may_alias));

CLMFAST_BODY Four widened(const float* x) { return Four{x[0], x[1], x[2], x[3]}; }

// Lanes 4 e to 4 e + 3 of pair_dist2's sixteen are lane[e].
CLMFAST_BODY void add_squares(const float* a, const float* b, Four* lane) {
  for (int64_t e = 0; e < 4; ++e) {
    const Four x = widened(a + 4 * e) - widened(b + 4 * e);
    lane[e] += x * x;
  }
}

CLMFAST_BODY void dist2_to_groups_body(const float* points, int64_t first, int64_t n, int64_t D, const int32_t* group,
                                       const float* centroid, double* dist2) {
  for (int64_t i = 0; i < n; ++i) {
    dist2[i] = 0;
    if (group[i] < 0) continue;
    const float *a = points + (first + i) * D, *b = centroid + group[i] * D;
    Four lane[4] = {};
    int64_t d = 0;
    for (; d + 16 <= D; d += 16) add_squares(a + d, b + d, lane);
    if (d < D) {
      float last_a[16] = {}, last_b[16] = {};
      std::memcpy(last_a, a + d, (D - d) * sizeof(float));
      std::memcpy(last_b, b + d, (D - d) * sizeof(float));
      add_squares(last_a, last_b, lane);
    }
    const Four sum = (lane[0] + lane[2]) + (lane[1] + lane[3]);
    dist2[i] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
}

CLMFAST_BODY void sum_groups_body(const float* points, int64_t N, int64_t D, const int32_t* group, double* sum) {
  for (int64_t i = 0; i < N; ++i) {
    if (group[i] < 0) continue;
    const float* point = points + i * D;
    double* of_group = sum + group[i] * D;
    for (int64_t d = 0; d < D; ++d) of_group[d] += point[d];
  }
}

CLMFAST_BODY void add_row_body(const float* row, int64_t D, double* sum) {
  for (int64_t d = 0; d < D; ++d) sum[d] += row[d];
}

CLMFAST_BODY void add_point_body(const float* point, const double* magic, double sign, int64_t D,
                                 double* sum) {
  for (int64_t d = 0; d < D; ++d) {
    const double shifted = static_cast<double>(point[d]) + magic[d];
    sum[d] += sign * (shifted - magic[d]);
  }
}

}  // namespace

CLMFAST_PER_ISA(void, dist2_to_groups,
                (const float* points, int64_t first, int64_t n, int64_t D, const int32_t* group, const float* centroid,
                 double* dist2),
                (points, first, n, D, group, centroid, dist2))
CLMFAST_PER_ISA(void, sum_groups,
                (const float* points, int64_t N, int64_t D, const int32_t* group, double* sum),
                (points, N, D, group, sum))
CLMFAST_PER_ISA(void, add_row, (const float* row, int64_t D, double* sum), (row, D, sum))
CLMFAST_PER_ISA(void, add_point,
                (const float* point, const double* magic, double sign, int64_t D, double* sum),
                (point, magic, sign, D, sum))

void reach_of(const float* points, int64_t n, int64_t D, const int32_t* bits, float* reach) {
  // Of floats without their signs, the larger has the larger bits; NaN is above infinity.
  if (std::all_of(bits, bits + D, [](int32_t x) { return x < 0x7f800000; })) {
    if (D > 0) std::memcpy(reach, bits, D * sizeof(float));
    return;
  }
  std::fill_n(reach, D, 0.0f);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < D && is_finite_row(points + i * D, D); ++d)
      reach[d] = std::max(reach[d], std::fabs(points[i * D + d]));
}

void find_magic(const float* reach, int64_t D, int64_t N, double* magic) {
  constexpr int STEP = 8;  // in powers of two: where points come and go, all that is finer changes at every other step
  const int log2_N = std::ilogb(static_cast<double>(std::max<int64_t>(N, 1))) + 1;
  for (int64_t d = 0; d < D; ++d) {
    const int exponent = std::ilogb(std::max(reach[d], std::numeric_limits<float>::min())) + 1 + log2_N;
    magic[d] = std::ldexp(1.5, (exponent + 1024 + STEP - 1) / STEP * STEP - 1024);
  }
}

}  // namespace clmfast
