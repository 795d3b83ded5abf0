// Search: the nearest points of a query, exactly. What knn is made of.
//
// Squared distances of cells (grid.h) come as rows of numbers, one for each column that a point is. Who is too far by
// them is out; the rest is measured by pair_dist2 at once, which brings the limit down. So that it is low from the
// start, the first row is looked at twice: first at little more than its k smallest numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "grid.h"
#include "pair.h"

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

// Puts x < list[k - 1] in its place among the k ascending ones; the last falls off.
void insert(Neighbour* list, int64_t k, Neighbour x);

// The k nearest points of one query that have been found so far, in a list [k] of its owner's.
class Nearest {
 public:
  Nearest() = default;
  // Looks for neighbours below `bound`; the list must be full of NO_NEIGHBOUR.
  Nearest(Neighbour* list, int64_t k, double unit, Neighbour bound)
      : list_(list), k_(k), unit_(unit), bound_(bound), limit_(limit_below(unit, bound)) {}

  bool is_full() const { return list_[k_ - 1] != NO_NEIGHBOUR; }
  // Can a point of this index still be taken?
  bool may_take(int64_t index) const { return neighbour(0, index) < bound_; }

  // Who is at least as far, in steps, need not be measured.
  float limit() {
    if (is_late_) limit_ = limit_below(unit_, bound_);
    is_late_ = false;
    return limit_;
  }

  bool is_empty() const { return list_[0] == NO_NEIGHBOUR; }

  // Takes the first n <= FEW at once, into an empty list.
  static constexpr int64_t FEW = 32;
  void begin_with(const Neighbour* x, int64_t n);

  void take(Neighbour x) {
    if (x >= bound_) return;
    insert(list_, k_, x);
    if (list_[k_ - 1] < bound_) bound_ = list_[k_ - 1], is_late_ = true;
  }

 private:
  Neighbour* list_ = nullptr;
  int64_t k_ = 0;
  double unit_ = 1;
  Neighbour bound_ = 0;
  float limit_ = -std::numeric_limits<float>::infinity();
  bool is_late_ = false;  // has the bound come down since the limit was found?
};

// ---- rows of squared distances of cells

// Columns c whose dist2[c] > above lets them be closer than the larger of the limits (the column's own: null for none)
// plus both rests, ascending, to `column` [n + SLACK]; returns how many. n is a multiple of PANEL.
constexpr int64_t SLACK = 16;
int64_t close_ones(const float* dist2, int64_t n, float above, float limit, float rest, const float* column_limit,
                   const float* column_rest, int32_t* column);

// The same where dist2[c] <= most.
int64_t small_ones(const float* dist2, int64_t n, float most, int32_t* column);

// A little more than the k-th smallest of the numbers, or infinity: at least k of them, if not all, are at most this.
float about_kth(const float* dist2, int64_t n, int64_t k);

// One query beside points first, ..., first + n - 1. Who is barred has dist2 infinity.
struct Row {
  static constexpr int64_t MOST = 4096;  // columns

  const float* dist2;
  int64_t first, n;
  float rest;                 // of the query; negative: it is not finite
  const float* column_rest;   // of the points
  const float* column_limit;  // [n] as the points, too, look for neighbours; null: they don't
  const float *query, *points;
  int64_t D;
};

// Measures who is closer than the limit of `nearest`, which takes it, or than its column's. Of the latter,
// found(column, dist2) hears of all, and maybe of others.
template <class Found>
void look(const Row& row, int64_t k, Nearest& nearest, const Found& found) {
  if (row.rest < 0) return;
  int32_t column[Row::MOST + SLACK];
  auto measured = [&](int64_t i, int64_t n) {
    if (i + 2 < n) prefetch_row(row.points + (row.first + column[i + 2]) * row.D, row.D);
    const int64_t point = row.first + column[i];
    const float dist2 = static_cast<float>(pair_dist2(row.query, row.points + point * row.D, row.D));
    found(column[i], dist2);
    return neighbour(dist2, point);
  };
  float done = -1;  // whose dist2 is at most this has been measured
  if (!nearest.is_full()) {
    const float kth = about_kth(row.dist2, row.n, k);
    if (kth < static_cast<float>(NOBODY)) {
      done = kth;
      const int64_t n = small_ones(row.dist2, row.n, kth, column);
      if (n <= Nearest::FEW && nearest.is_empty()) {
        Neighbour first[Nearest::FEW];
        for (int64_t i = 0; i < n; ++i) first[i] = measured(i, n);
        nearest.begin_with(first, n);
      } else {
        for (int64_t i = 0; i < n; ++i) nearest.take(measured(i, n));
      }
    }
  }
  const int64_t n =
      close_ones(row.dist2, row.n, done, nearest.limit(), row.rest, row.column_limit, row.column_rest, column);
  for (int64_t i = 0; i < n; ++i) {
    // The limit may have come down since.
    const int64_t c = column[i];
    float reach = nearest.may_take(row.first + c) ? nearest.limit() : -std::numeric_limits<float>::infinity();
    if (row.column_limit) reach = std::max(reach, row.column_limit[c]);
    reach += row.rest + row.column_rest[c];
    if (reach > 0 && row.dist2[c] < reach * reach) nearest.take(measured(i, n));
  }
}

// Rows first, ..., first + n - 1 of a set, as they meet panels.
std::vector<GridRows> grid_rows(const Grid& grid, int64_t s, int64_t first, int64_t n);

// The rows meet panels begin, ..., end - 1 of set s of `columns`: visit(i_row, first column, n columns, dist2).
template <class Visit>
void sweep(const std::vector<GridRows>& rows, const Grid& columns, int64_t begin, int64_t end, const Visit& visit) {
  if (rows.empty() || begin >= end) return;
  // The longer a row, the fewer points it measures in vain: that gains more than panels that stay in the second cache.
  constexpr int64_t BYTES = 1 << 20;  // of the panels of a chunk
  const int64_t chunk = std::clamp<int64_t>(BYTES / std::max<int64_t>(rows[0].panel_bytes(), 1), 4, Row::MOST / PANEL);
  // Rows a power of two apart would share a few places of the first cache.
  const int64_t stride = (std::min(chunk, end - begin) + 1) * PANEL;
  std::unique_ptr<float[]> dist2(new float[GridRows::MOST * stride]);
  for (; begin < end; begin += chunk) {
    const int64_t n = std::min(chunk, end - begin);
    int64_t i_row = 0;
    for (const GridRows& group : rows) {
      for (int64_t p = 0; p < n; ++p) group.dist2(columns, begin + p, &dist2[p * PANEL], stride);
      for (int64_t r = 0; r < group.size(); ++r) visit(i_row++, begin * PANEL, n * PANEL, &dist2[r * stride]);
    }
  }
}

}  // namespace clmfast
