// Search: the nearest points of a few queries of one set, exactly. What knn and ring_knn are made of.
//
// Queries meet the points panel by panel, as tiles of squared distances of cells (grid.h). What passes a query's limit
// waits in `pending` with the bounds on its distance, which tell from time to time which of it can still be among the k
// nearest. Only what is left at the end is measured by pair_dist2.
//
// The same queries may ask several times, in views that bar different points.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "grid.h"

namespace clmfast {

// A neighbour as one integer that sorts by dist2 (>= 0, whose bits sort as integers) and then by index.
using Neighbour = int64_t;
constexpr Neighbour NO_NEIGHBOUR = INT64_MAX;

inline Neighbour neighbour(float dist2, int64_t index) {
  uint32_t bits;
  std::memcpy(&bits, &dist2, sizeof bits);
  return static_cast<int64_t>(static_cast<uint64_t>(bits) << 32) | index;
}

inline int64_t index_of(Neighbour x) { return x & 0xffffffff; }

inline float dist2_of(Neighbour x) {
  const uint32_t bits = static_cast<uint32_t>(x >> 32);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The distance in steps of `unit` at and above which no point is a neighbour below `bound`.
float limit_below(double unit, Neighbour bound);

class Search {
 public:
  static constexpr int64_t MOST = 4 * TILE_ROWS;  // queries: enough to reuse a panel, few enough to balance the threads

  // For up to k neighbours each among points [n, D] of set s, which are on the grid.
  Search(const Grid& grid, int64_t s, const float* points, int64_t n, int64_t k, int64_t n_views);

  // A further query: in each view it looks for neighbours below bound[view].
  void add(const float* row, const Neighbour* bound);

  const GridRows& rows() const { return rows_; }

  // Takes what the group can use of a tile of its distances to panel i_panel. barred(view, query, i_panel) has the bits
  // of those of the panel that are no neighbours.
  template <class Barred>
  void take(int64_t group, int64_t i_panel, const int32_t* tile, const Barred& barred);

  // The neighbours found, ascending.
  const std::vector<Neighbour>& finish(int64_t query, int64_t view);

 private:
  struct Slot {
    float limit;  // who is at least as far, in steps, is no neighbour
    Neighbour bound;
    int64_t n_pending = 0;
    std::vector<Neighbour> nearest;  // the best k measured so far
  };

  void append(int64_t slot, int64_t i_panel, const int32_t* tile_row, uint32_t columns);
  void tighten(int64_t slot);
  void make_room(int64_t slot);
  void measure(int64_t slot);

  Grid grid_;
  int64_t s_;
  const float* points_;
  int64_t k_, n_views_, capacity_, stride_;
  GridRows rows_;
  std::vector<const float*> query_;
  std::vector<Slot> slots_;                         // [queries, views]
  std::unique_ptr<float[]> pending_least_, pending_most_;  // [slots, stride]: bounds on the distance, in steps
  std::unique_ptr<uint32_t[]> pending_index_;              // [slots, stride]: the point
};

// Bits of the columns of a panel: those whose group [N] is `own`, and that of a row, if it is there.
uint32_t same_group(int64_t own, const int64_t* group, int64_t N, int64_t i_panel);
uint32_t same_row(int64_t row, int64_t i_panel);

template <class Barred>
void Search::take(int64_t group, int64_t i_panel, const int32_t* tile, const Barred& barred) {
  float limit[TILE_ROWS] = {};
  uint32_t passed[TILE_ROWS];
  const int64_t first = group * TILE_ROWS, n = rows_.n_rows(group);
  for (int64_t r = 0; r < n; ++r) {
    limit[r] = slots_[(first + r) * n_views_].limit;
    for (int64_t v = 1; v < n_views_; ++v) limit[r] = std::max(limit[r], slots_[(first + r) * n_views_ + v].limit);
    limit[r] += rows_.rest(first + r);
  }
  screen(tile, n, limit, grid_.rest_of(s_) + i_panel * TILE_COLS, passed);
  // Twice as many points have been seen as when the limit was looked at last: it may have sunk by much.
  const bool is_due = i_panel >= 3 && (i_panel & (i_panel + 1)) == 0;
  for (int64_t r = 0; r < n; ++r) {
    if (!passed[r] && !is_due) continue;
    for (int64_t v = 0; v < n_views_; ++v) {
      const int64_t at = (first + r) * n_views_ + v;
      append(at, i_panel, tile + r * TILE_COLS, passed[r] & ~barred(v, first + r, i_panel));
      if (is_due || slots_[at].n_pending + TILE_COLS > capacity_) make_room(at);
    }
  }
}

}  // namespace clmfast
