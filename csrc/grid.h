// Point sets on a grid: every coordinate moved to a whole number of steps that fits 16 bits. cpu/grid.h says what for.
//
// A view: the memory is its maker's, and may outlive a call, so that only rows that change are moved again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace clmfast {

constexpr int64_t PANEL = 32;  // points side by side

constexpr int64_t n_panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

// Those panels of N points that hold one of the `count` from `first` on, round and round.
inline std::vector<int64_t> panels_of(int64_t N, int64_t first, int64_t count) {
  std::vector<int64_t> chosen;
  for (int64_t i_panel = 0; i_panel < n_panels(N); ++i_panel) {
    bool has_any = false;
    for (int64_t i = i_panel * PANEL; i < std::min(N, (i_panel + 1) * PANEL); ++i)
      has_any |= (i - first + N) % N < count;
    if (has_any) chosen.push_back(i_panel);
  }
  return chosen;
}

constexpr int64_t PAIR = 2;  // coordinates of a point that lie side by side
// Coordinates that are left of many by turning. For states of width 128, 48 to 72 are equally fast (Zen 3).
constexpr int64_t TURNED = 60;

// Squared distances of cells are at most 2^30. Who is no point has this squared norm, and is farther from all.
constexpr int32_t NOBODY = 3 << 29;

constexpr int64_t grid_depth(int64_t D) { return (D + PAIR - 1) / PAIR; }

struct Grid {
  int64_t S, N, D;
  float* centre;      // [S, D]
  double* unit;       // [S] steps per unit of the points, as float32 holds them
  int64_t* n_turned;  // [S] rows of the turn; 0: the coordinates are the points' own
  int64_t* wasted;    // [S, 2] pairs of points that ring_knn measured in vain: the first time after the grid was chosen
                      // (-1: not yet), and how many more than then it has been since
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

}  // namespace clmfast
