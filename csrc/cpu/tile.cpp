#include "fused.h"  // tile.h promises a bound, not bits

#include "tile.h"

#include "isa.h"
#include "lanes.h"

namespace clmfast {
namespace {

// R rows against C registers of columns, W floats to a register.
template <int W, int R, int C>
CLMFAST_BODY void pass(const float* rows, const float* panel, int64_t D, float* dot) {
  Lanes<W> sum[R][C] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += rows[d * TILE_ROWS + r] * lanes<W>(panel + d * TILE_COLS + c * W);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) lanes<W>(dot + r * TILE_COLS + c * W) = sum[r][c];
}

// A narrower machine has fewer registers, so it takes rows and columns a few at a time; the panel stays in its first
// cache.
template <int W, int R, int C = TILE_COLS / W>
CLMFAST_BODY void passes(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  for (int64_t r = 0; r < n_rows; r += R)
    for (int64_t c = 0; c < TILE_COLS; c += C * W)
      pass<W, R, C>(rows + r, panel + c, D, dot + r * TILE_COLS + c);
}

void dot_tile_baseline(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
#if defined(__x86_64__)
  passes<4, 1>(rows, n_rows, panel, D, dot);
#else
  passes<4, 3>(rows, n_rows, panel, D, dot);
#endif
}

CLMFAST_AVX2 void dot_tile_avx2(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  // Eight sums keep both multipliers busy, and suit a number of rows that four divides; twelve need fewer loads.
  if (n_rows % 4 == 0 && n_rows < TILE_ROWS) return passes<8, 4, 2>(rows, n_rows, panel, D, dot);
  passes<8, 3>(rows, n_rows, panel, D, dot);
}

CLMFAST_AVX512 void dot_tile_avx512(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  if (n_rows > 8) return passes<16, 12>(rows, n_rows, panel, D, dot);
  if (n_rows > 4) return passes<16, 8>(rows, n_rows, panel, D, dot);
  passes<16, 4>(rows, n_rows, panel, D, dot);
}

}  // namespace

void dot_tile(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot) {
  static const auto once = pick(dot_tile_baseline, dot_tile_avx2, dot_tile_avx512);
  once(rows, n_rows, panel, D, dot);
}

}  // namespace clmfast
