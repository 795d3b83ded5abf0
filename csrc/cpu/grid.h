// The screen of knn: points on a grid, and the squared distances of their cells.
//
//   y = unit x - centre,  cell = y rounded to whole numbers that 16 bits hold,  rest >= |y - cell|
//
// Screening and deciding. knn must compare float64 distances exactly, but needs to compute only few of them. Two
// products of 16 bits are one lane of one instruction, and nothing is rounded: the squared distance of two cells is an
// integer. The triangle inequality bounds what it says about the points,
//
//   | unit |q - p| - |cell_q - cell_p| | <= rest_q + rest_p,
//
// and whoever that cannot exclude is measured by pair_dist2. It holds for any centre and unit; good ones leave little
// rest. Floats here are rounded away from exclusion by 2^-20 of themselves, far more than their arithmetic loses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../grid.h"
#include "../parallel.h"
#include "tile.h"

namespace clmfast {

// The memory of a Grid that lives as long as one call.
struct GridMemory : Grid {
  GridMemory(int64_t S, int64_t N, int64_t D);

 private:
  std::unique_ptr<float[]> floats_;  // not vectors: to clear them first would cost as much as to fill them
  std::unique_ptr<double[]> doubles_;
  std::unique_ptr<int32_t[]> integers_;
  std::unique_ptr<int16_t[]> cells_;
};

// Chooses centre and unit of every set by a sample of the first n of its points [S, N, D].
void make_grids(const Grid& grid, const float* points, int64_t n, ParallelFor parallel_for);

// Moves those panels of points [S, N, D] that hold one of the `count` rows from `first` on, round and round; rows from
// n on are no points.
void move_to_grid(const Grid& grid, const float* points, int64_t n, int64_t first, int64_t count,
                  ParallelFor parallel_for);

// Rows of set s that meet its panels, TILE_ROWS at a time.
class GridRows {
 public:
  GridRows(const Grid& grid, int64_t s) : grid_(grid), s_(s) {}

  void add(const float* row);

  int64_t size() const { return static_cast<int64_t>(rest_.size()); }
  int64_t n_groups() const { return (size() + TILE_ROWS - 1) / TILE_ROWS; }
  int64_t n_rows(int64_t group) const { return std::min(TILE_ROWS, size() - group * TILE_ROWS); }
  float rest(int64_t i) const { return rest_[i]; }  // -infinity: the row is not finite

  // The squared distances of a group's cells to those of a panel of `other`, which shares the grid: tile [TILE_ROWS,
  // TILE_COLS], of which the rows from n_rows(group) on are unspecified.
  void dist2(int64_t group, const Grid& other, int64_t i_panel, int32_t* tile) const;

 private:
  Grid grid_;
  int64_t s_;
  std::vector<int16_t> cells_;  // [groups, depth, TILE_ROWS, PAIR]
  std::vector<int32_t> norm2_;  // [groups * TILE_ROWS]
  std::vector<float> rest_;
};

// Bit c of passed[r] is set where the cells of row r and column c are closer than row_limit[r] + column_limit[c].
void screen(const int32_t* tile, int64_t n_rows, const float* row_limit, const float* column_limit, uint32_t* passed);

}  // namespace clmfast
