// Point sets on a grid: every coordinate moved to a whole number of steps that fits 16 bits. cpu/grid.h says what for.
//
// A view: the memory is its maker's, and may outlive a call, so that only rows that change are moved again.
#pragma once

#include <cstdint>

#include "packed.h"

namespace clmfast {

constexpr int64_t PAIR = 2;  // coordinates of a point that lie side by side

constexpr int64_t grid_depth(int64_t D) { return (D + PAIR - 1) / PAIR; }

struct Grid {
  int64_t S, N, D;
  float* centre;   // [S, D] in steps
  double* unit;    // [S] steps per unit of the points
  int16_t* cells;  // [S, n_panels(N), grid_depth(D), PANEL, PAIR]: whole steps from the centre
  int32_t* norm2;  // [S, n_panels(N) * PANEL] of the cells
  float* rest;     // [S, n_panels(N) * PANEL] at least the distance from the cell to the point, in steps; -infinity
                   // where there is no finite point

  int16_t* panel(int64_t s, int64_t i) const { return cells + (s * n_panels(N) + i) * grid_depth(D) * PANEL * PAIR; }
  int32_t* norm2_of(int64_t s) const { return norm2 + s * n_panels(N) * PANEL; }
  float* rest_of(int64_t s) const { return rest + s * n_panels(N) * PANEL; }
};

}  // namespace clmfast
