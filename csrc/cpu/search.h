// Search: the nearest points of a few queries of one set, exactly. What knn and ring_knn are made of.
//
// Queries meet the points panel by panel, as tiles of dot products. What passes a query's limit waits in `pending` with
// its screened value; when that is full, the screened values themselves tell which of it can still be among the k
// nearest. Only what is left at the end is measured by pair_dist2 (panels.h has the bound that makes this exact).
//
// The same queries may ask several times, in views that bar different points.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "panels.h"
#include "tile.h"

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

// The screened value at and above which no point is a neighbour below `bound` of a query with this squared norm in the
// frame; -infinity for a query that is not finite.
float limit_below(const Frame& frame, double query_norm2, Neighbour bound);

// The largest finite squared norm of each set's points in its frame.
std::vector<double> largest_norms(const Packed& packed);

class Search {
 public:
  static constexpr int64_t MOST = 4 * TILE_ROWS;  // queries: enough to reuse a panel, few enough to balance the threads

  // For up to k neighbours each among points [n, D] of set s; largest_norm2: of their squared norms in the frame.
  Search(const Packed& packed, int64_t s, double largest_norm2, const float* points, int64_t n, int64_t k,
         int64_t n_views);

  // A further query: in each view it looks for neighbours below bound[view].
  void add(const float* row, const Neighbour* bound);

  int64_t n_groups() const { return (n_queries() + TILE_ROWS - 1) / TILE_ROWS; }
  int64_t n_rows(int64_t group) const { return std::min(TILE_ROWS, n_queries() - group * TILE_ROWS); }
  double norm2(int64_t query) const { return norm2_[query]; }

  // The group's dot products with a panel of points: tile [TILE_ROWS, TILE_COLS].
  void dot(int64_t group, const float* panel, float* tile) const {
    dot_tile(&rows_[group * TILE_ROWS * frame_.D], n_rows(group), panel, frame_.D, tile);
  }

  // Takes what the group can use of a tile of its dot products with panel i_panel, and leaves screened values there.
  // is_barred(view, query, point) says who is no neighbour.
  template <class IsBarred>
  void take(int64_t group, int64_t i_panel, const float* low_norm2, float* tile, const IsBarred& is_barred);

  // The neighbours found, ascending.
  const std::vector<Neighbour>& finish(int64_t query, int64_t view);

 private:
  struct Slot {
    float limit;  // what is screened at or above it is no neighbour
    Neighbour bound;
    int64_t n_pending = 0;
    std::vector<Neighbour> nearest;  // the best k measured so far
  };

  int64_t n_queries() const { return static_cast<int64_t>(norm2_.size()); }
  void tighten(int64_t slot);
  void measure(int64_t slot);

  Frame frame_;
  const float* points_;
  double largest_norm2_;
  int64_t k_, n_views_, capacity_;
  std::vector<float> rows_;  // [groups, D, TILE_ROWS]
  std::vector<const float*> query_;
  std::vector<double> norm2_;
  std::vector<Slot> slots_;              // [queries, views]
  std::vector<uint32_t> pending_key_;    // [slots, capacity] of the screened values
  std::vector<int32_t> pending_index_;   // [slots, capacity]
};

// Floats as integers of the same order: the bits of a negative one are inverted, those of another put above them.
inline uint32_t order_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Bit c of passed[r] is set where column c of row r is screened below limit[r]; screened values replace the products.
void screen(float* tile, int64_t n_rows, const float* low_norm2, const float* limit, uint32_t* passed);

template <class IsBarred>
void Search::take(int64_t group, int64_t i_panel, const float* low_norm2, float* tile, const IsBarred& is_barred) {
  float limit[TILE_ROWS] = {};
  uint32_t passed[TILE_ROWS];
  const int64_t first = group * TILE_ROWS, n = n_rows(group);
  for (int64_t r = 0; r < n; ++r) {
    limit[r] = slots_[(first + r) * n_views_].limit;
    for (int64_t v = 1; v < n_views_; ++v) limit[r] = std::max(limit[r], slots_[(first + r) * n_views_ + v].limit);
  }
  screen(tile, n, low_norm2, limit, passed);
  for (int64_t r = 0; r < n; ++r) {
    if (!passed[r]) continue;
    for (int64_t v = 0; v < n_views_; ++v) {
      const int64_t at = (first + r) * n_views_ + v;
      Slot& slot = slots_[at];
      uint32_t* pending_key = &pending_key_[at * capacity_];
      int32_t* pending_index = &pending_index_[at * capacity_];
      for (uint32_t bits = passed[r]; bits; bits &= bits - 1) {
        const int64_t c = __builtin_ctz(bits), point = i_panel * TILE_COLS + c;
        if (!(tile[r * TILE_COLS + c] < slot.limit) || is_barred(v, first + r, point)) continue;
        pending_key[slot.n_pending] = order_of(tile[r * TILE_COLS + c]);
        pending_index[slot.n_pending++] = static_cast<int32_t>(point);
      }
      if (slot.n_pending + TILE_COLS <= capacity_) continue;
      tighten(at);
      if (slot.n_pending + TILE_COLS > capacity_) measure(at);
    }
  }
}

}  // namespace clmfast
