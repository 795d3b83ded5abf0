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

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../grid.h"
#include "../parallel.h"

namespace clmfast {

// The memory of a Grid that lives as long as one call; with `other`, on its grid.
struct GridMemory : Grid {
  GridMemory(int64_t S, int64_t N, int64_t D, const Grid* other = nullptr);

 private:
  std::unique_ptr<float[]> floats_;  // not vectors: to clear them first would cost as much as to fill them
  std::unique_ptr<double[]> doubles_;
  std::unique_ptr<int32_t[]> integers_;
  std::unique_ptr<int64_t[]> counts_;
  std::unique_ptr<int16_t[]> cells_;
};

// Chooses centre, unit and turn of set s by a sample of the first n of its points [S, N, D].
void make_grid(const Grid& grid, int64_t s, const float* points, int64_t n, bool may_turn);

// Moves some panels of set s, or all of all, of points [S, N, D]; rows from n on are no points.
void move_to_grid(const Grid& grid, int64_t s, const float* points, int64_t n, const std::vector<int64_t>& panels);
void move_to_grid(const Grid& grid, const float* points, int64_t n, ParallelFor parallel_for);

// Some rows of a set, ascending, that meet its panels, or those of another set on the same grid.
class GridRows {
 public:
  static constexpr int64_t MOST = 12;  // of 32 columns, their sums are 24 of the 32 AVX-512 registers

  GridRows(const Grid& grid, int64_t s, const int64_t* row, int64_t n);

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
