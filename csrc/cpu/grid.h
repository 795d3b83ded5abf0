// The screen of knn: points on a grid, and the squared distances of their cells.
//
//   z = unit (x - centre),  y = turn z,  cell = y rounded to whole numbers that 16 bits hold,  rest >= |y - cell|
//
// Screening and deciding. knn must compare float64 distances exactly, but needs to compute only few of them. Two
// products of 16 bits are one lane of one instruction, and nothing is rounded: the squared distance of two cells is an
// integer. No row of the turn is longer than it ought to be: |turn z| <= |z|. So
//
//   unit |q - p| >= |cell_q - cell_p| - rest_q - rest_p,
//
// and whoever that cannot exclude is measured by pair_dist2. It holds for any centre, unit and such turn; good ones
// exclude almost all. Where a few directions hold most of what sets points apart, as in the states of a model, they are
// the turn, and all others are left out; elsewhere there is none. Floats here are rounded away from exclusion by 2^-20
// of themselves, far more than their arithmetic loses.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../parallel.h"

namespace clmfast {

constexpr int64_t PANEL = 32;  // points side by side

constexpr int64_t n_panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

constexpr int64_t PAIR = 2;  // coordinates of a point that lie side by side
// Coordinates that are left of many by turning. For states of width 128, 48 to 72 are equally fast (Zen 3).
constexpr int64_t TURNED = 60;

// The squared norm of a row that holds no finite point. Squared distances of cells are at most 2^30, so such a row is
// farther away than any point.
constexpr int32_t NOBODY = 3 << 29;

constexpr int64_t grid_depth(int64_t D) { return (D + PAIR - 1) / PAIR; }

struct Grid {
  int64_t S, N, D;
  float* centre;      // [S, D]
  float* unit;        // [S] steps per unit of the points
  int64_t* n_turned;  // [S] rows of the turn; 0: the coordinates are the points' own
  float* turn;        // [S, TURNED, D], interleaved as cpu/tile.h wants its rows
  int16_t* cells;     // [S, n_panels(N), depth, PANEL, PAIR], with room for grid_depth(D): whole steps from the centre
  int32_t* norm2;     // [S, n_panels(N) * PANEL] of the cells; or NOBODY
  float* rest;        // [S, n_panels(N) * PANEL] at least the distance from the cell to the point, in steps; -infinity
                      // where there is no finite point

  // Side by side, whatever the depth: with gaps between them they would not share out the second cache.
  int16_t* panel(int64_t s, int64_t i) const {
    return cells + (s * n_panels(N) * grid_depth(D) + i * depth(s)) * PANEL * PAIR;
  }
  int32_t* norm2_of(int64_t s) const { return norm2 + s * n_panels(N) * PANEL; }
  float* rest_of(int64_t s) const { return rest + s * n_panels(N) * PANEL; }
  int64_t n_coordinates(int64_t s) const { return n_turned[s] ? n_turned[s] : D; }
  int64_t depth(int64_t s) const { return grid_depth(n_coordinates(s)); }
};

// The memory of a Grid; with `other`, on its grid.
struct GridMemory : Grid {
  GridMemory(int64_t S, int64_t N, int64_t D, const Grid* other = nullptr);

 private:
  std::unique_ptr<float[]> floats_;  // not vectors: to clear them first would cost as much as to fill them
  std::unique_ptr<int32_t[]> integers_;
  std::unique_ptr<int64_t[]> counts_;
  std::unique_ptr<int16_t[]> cells_;
};

// Chooses centre, unit and turn of set s by a sample of the points [S, N, D].
void make_grid(const Grid& grid, int64_t s, const float* points, bool may_turn);

void move_to_grid(const Grid& grid, const float* points, ParallelFor parallel_for);

// Some rows of a set, side by side, that meet its panels, or those of another set on the same grid.
class GridRows {
 public:
  static constexpr int64_t MOST = 12;  // of 32 columns, their sums are 24 of the 32 AVX-512 registers

  GridRows(const Grid& grid, int64_t s, int64_t first, int64_t n);

  int64_t size() const { return n_; }
  int64_t panel_bytes() const { return depth_ * PANEL * PAIR * static_cast<int64_t>(sizeof(int16_t)); }

  // The squared distances of their cells to those of a panel: dist2 [MOST, stride], of which PANEL columns are written;
  // what is written to rows from size on means nothing.
  void dist2(const Grid& other, int64_t i_panel, float* dist2, int64_t stride) const;

 private:
  int64_t s_, n_, depth_;
  std::vector<int16_t> cells_;  // [depth, MOST, PAIR]
  int32_t norm2_[MOST];
};

}  // namespace clmfast
