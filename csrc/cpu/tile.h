// dot_tile: the inner loop of every distance, a small matrix product on rows that were laid out for it.
//
//   rows  [D, TILE_ROWS]  the coordinates of up to TILE_ROWS rows, interleaved
//   panel [D, TILE_COLS]  the coordinates of TILE_COLS points, interleaved
//   dot   [TILE_ROWS, TILE_COLS]:  dot[r][c] = sum_d rows[d][r] * panel[d][c]  for r < n_rows; the rest is unspecified
//
// float32, in any order and fused or not, so that |error| <= gamma_D |row_r| |point_c| with gamma_D = D u / (1 - D
// u), u = 2^-24, and the last bits differ between instruction sets: what is built on it must not show them.
#pragma once

#include <cstdint>

#include "grid.h"

namespace clmfast {

constexpr int64_t TILE_ROWS = 12;  // 12 x 32 floats are 24 of the 32 AVX-512 registers
constexpr int64_t TILE_COLS = PANEL;

void dot_tile(const float* rows, int64_t n_rows, const float* panel, int64_t D, float* dot);

}  // namespace clmfast
