#include "fused.h"  // tile.h promises a bound, not bits

#include "tile.h"

#include <cstring>

#include "isa.h"

namespace clmfast {
namespace {

// R rows against one panel, W floats to a register.
template <int W, int R>
CLMFAST_BODY void pass(const float* rows, const float* panel, int64_t D, float* dot) {
  typedef float Vector __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  constexpr int C = TILE_COLS / W;
  Vector sum[R][C] = {};
  for (int64_t d = 0; d < D; ++d) {
    const Vector* point = reinterpret_cast<const Vector*>(panel + d * TILE_COLS);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += rows[d * TILE_ROWS + r] * point[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) *reinterpret_cast<Vector*>(dot + r * TILE_COLS + c * W) = sum[r][c];
}

// A narrower machine has fewer registers, so it takes the rows a few at a time; the panel stays in its first cache.
template <int W, int R>
CLMFAST_BODY void passes(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  for (int64_t r = 0; r < n_rows; r += R) pass<W, R>(rows + r, panel, D, dot + r * TILE_COLS);
}

void dot_tile_baseline(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
#if defined(__x86_64__)
  passes<4, 1>(rows, n_rows, panel, D, dot);
#else
  passes<4, 3>(rows, n_rows, panel, D, dot);
#endif
}

CLMFAST_AVX2 void dot_tile_avx2(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  passes<8, 3>(rows, n_rows, panel, D, dot);
}

CLMFAST_AVX512 void dot_tile_avx512(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  if (n_rows > 8) return pass<16, 12>(rows, panel, D, dot);
  if (n_rows > 4) return pass<16, 8>(rows, panel, D, dot);
  pass<16, 4>(rows, panel, D, dot);
}

}  // namespace

void dot_tile(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  static const auto once = pick(dot_tile_baseline, dot_tile_avx2, dot_tile_avx512);
  once(rows, n_rows, panel, D, dot);
}

}  // namespace clmfast
