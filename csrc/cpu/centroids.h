// The centroids of one set, and the points compared with them: what kmeans and separation share.
//
// Screening and deciding. Labels are those of float64 distances (cpu/pair.h), but few of these are computed. A screen in
// float32 gives each distance within known bounds, and only centroids that it cannot tell apart are measured exactly.
//
// All centroids at once, by products. In a frame of the centroids, with c~ = float32(scale c - centre), p~ likewise, u =
// 2^-24, C = |c~|, P = |p~|, the screen is v = |c~|^2 - 2 c~.p~ in float32. In scaled units:
//   rounding c, p      at most 4 u (C^2 + P^2)
//   the dot product    2 |error| <= 2 gamma_D C P <= gamma_D (C^2 + P^2), gamma_n = n u / (1 - n u)
//   putting together   rounding |c~|^2 and v to float32: at most 3 u (C^2 + P^2)
//   underflow          less than eta = (D + 8) 2^-118 in all, even where denormals are flushed to zero
// so | dist2 - (P^2 + v) | <= kappa (C^2 + P^2) + eta with kappa = gamma_{D+8}; D < 2^20 keeps it below 1/8.
//
// One centroid, by differences: sum_d (p_d - c_d)^2 in float32 is within a factor of 1 -+ (D / 32 + 41) u, but for
// underflow and overflow, which send the pair to float64.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../kmeans.h"

namespace clmfast {

// What is known of a distance, in the units of the points.
struct Between {
  float low, high;
};

// What is found out about points. Null: not asked for.
struct Found {
  int32_t* label;         // the nearest centroid
  float* within;          // at least the distance to it
  float* beyond;          // [groups, stride]: at most that to any other of the group
  int64_t stride;

  Found from(int64_t i) const {
    return {label + i, within ? within + i : nullptr, beyond ? beyond + i : nullptr, stride};
  }
};

class Centroids {
 public:
  // centroid [K, D]; one that is not finite is nobody's nearest. Keeps the pointer.
  void pack(const float* centroid, int64_t K, int64_t D);

  // Of each of n rows of points [N, D] the nearest centroid: by float64 dist2, of equals the smaller index, and not the
  // `excluded` one of the row (null: none is); -1 for rows that are not finite.
  // reach [D], or null: the largest of what it was and the bits of all |coordinate| of a column, also not finite ones.
  void nearest(const float* points, const int64_t* row, int64_t n, const int32_t* excluded, const Found& found,
               int32_t* reach = nullptr) const;

  // The same for one row, whose bounds are good and may show that the label is: those of all groups but `near` (bits) do.
  void renew(const float* point, uint32_t near, const Found& found) const;

 private:
  Between between(const float* point, int64_t k) const;
  struct Nearest {
    int32_t label;
    double dist2;
  };
  // By float64, of those whose v [K, stride of a panel] is at most the limit.
  Nearest decide(const float* point, const float* v, float limit, int32_t excluded) const;

  const float* centroid_;
  int64_t K_, D_, n_tiles_;
  float scale_;
  double kappa_, eta_, largest_norm2_;
  std::vector<float> centre_, rows_, norm2_;  // [D], [n_tiles, D, TILE_ROWS] (tile.h), [K]
};

constexpr int64_t TRIALS = 4;

// Points laid out for products, about one of them.
class Panels {
 public:
  Panels(const float* points, int64_t N, int64_t D, int64_t centre);

  // Room for one number of each point.
  int64_t stride() const { return static_cast<int64_t>(norm2_.size()); }
  // [N]: squared distances to the centre.
  const float* norm2() const { return norm2_.data(); }

  // least[t, i] of [TRIALS, stride]: the least of closest[i] and the dist2 of the point to trial[t], one of the points. A
  // point whose `closest` is at most the limit of its nearest centroid is nearer to that than to any of the trials.
  // float32 in any order.
  //   closest [stride], nearest [N]
  void least_dist2(const int64_t* trial, const float* closest, const int32_t* nearest, const float* limit,
                   float* least) const;

 private:
  const float* points_;
  int64_t N_, D_, n_;
  std::unique_ptr<float[]> panel_;  // [n, D, points of a panel]
  std::vector<float> norm2_;
};

}  // namespace clmfast
