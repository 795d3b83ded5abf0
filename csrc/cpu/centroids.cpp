#include "fused.h"  // screens promise a bound, not bits

#include "centroids.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "isa.h"
#include "lanes.h"
#include "pair.h"
#include "tile.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t ROWS = TILE_COLS;  // points that are compared side by side

// A squared distance that is less than this part of the two squared norms has lost too many digits as their difference.
constexpr float CANCELLED = 0x1p-7f;

// The coordinates of ROWS points in the frame, p~, interleaved; their squared norms; and the largest bits of |coordinate|
// of each column, from what they were.
//   panel [D, ROWS], norm2 [ROWS], reach [D]; next: points that will be asked for soon, on their way from a far cache
template <int W>
CLMFAST_BODY void place_body(const float* const* point, const float* const* next, int64_t D, float scale,
                             const float* centre, float* panel, float* norm2, int32_t* reach) {
  using Int = typename LanesOf<W>::Int;
  constexpr int64_t LINE = 64 / sizeof(float);
  // n columns, d floats behind the beginning of W rows; `to` is the first of them in the panel.
  const auto square = [&](const float* const* from, int64_t d, const float* middle, int64_t n, float* to,
                          Lanes<W>& squares, int32_t* most) __attribute__((always_inline)) {
    Lanes<W> row[W];
    Int largest = *reinterpret_cast<const Int*>(most);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      row[r] = lanes<W>(from[r] + d);
      const Int bits = reinterpret_cast<Int>(row[r]) & 0x7fffffff;
      largest = largest > bits ? largest : bits;
      row[r] = row[r] * scale - lanes<W>(middle);
    }
    *reinterpret_cast<Int*>(most) = largest;
    transpose<W>(row);
#pragma GCC unroll 16
    for (int e = 0; e < W; ++e) {
      if (e < n) lanes<W>(to + e * ROWS) = row[e];
      squares += row[e] * row[e];
    }
  };
  const int64_t whole = D / W * W, n_left = D - whole;
  for (int64_t part = 0; part < ROWS; part += W) {
    Lanes<W> squares = {};
    for (int64_t d = 0; d < whole; d += W) {
      if (d % LINE == 0)
        for (int64_t r = 0; r < W; ++r) __builtin_prefetch(next[part + r] + d, 0, 2);
      square(point + part, d, centre + d, W, panel + d * ROWS + part, squares, reach + d);
    }
    if (n_left > 0) {
      float last[W + 1][W] = {};
      int32_t most[W] = {};
      const float* row[W];
      for (int64_t r = 0; r < W; ++r) {
        std::memcpy(last[r], point[part + r] + whole, n_left * sizeof(float));
        row[r] = last[r];
      }
      std::memcpy(last[W], centre + whole, n_left * sizeof(float));
      square(row, 0, last[W], n_left, panel + whole * ROWS + part, squares, most);
      for (int64_t e = 0; e < n_left; ++e) reach[whole + e] = std::max(reach[whole + e], most[e]);
    }
    lanes<W>(norm2 + part) = squares;
  }
}

CLMFAST_PER_WIDTH(place,
                  (const float* const* point, const float* const* next, int64_t D, float scale, const float* centre,
                   float* panel, float* norm2, int32_t* reach),
                  (point, next, D, scale, centre, panel, norm2, reach))

// What the screen says of ROWS points.
struct Verdict {
  float least[ROWS], limit[ROWS], slack[ROWS];  // centroids whose v is at most the limit may be the nearest
  int32_t label[ROWS], n_close[ROWS];           // the first of them, and how many there are
};

// At least the distance.
float above(double dist2) { return static_cast<float>(std::sqrt(dist2) * (1 + 0x1p-20)) + 0x1p-120f; }

struct Screen {
  const float* norm2;  // [K]
  int64_t K;
  float kappa, eta, largest_norm2;
};

// v [K, ROWS]: products c~.p~ become |c~|^2 - 2 c~.p~.
template <int W>
CLMFAST_BODY void judge_body(const Screen& screen, const float* norm2, const int32_t* excluded, float* v,
                             Verdict* verdict) {
  using Int = typename LanesOf<W>::Int;
  for (int64_t c = 0; c < ROWS; c += W) {
    Lanes<W> least = Lanes<W>{} + INF;
    const Int without = *reinterpret_cast<const Int*>(excluded + c);
    for (int64_t k = 0; k < screen.K; ++k) {
      Lanes<W> x = screen.norm2[k] - 2 * lanes<W>(v + k * ROWS + c);
      x = without == static_cast<int32_t>(k) ? Lanes<W>{} + INF : x;
      lanes<W>(v + k * ROWS + c) = x;
      least = x < least ? x : least;
    }
    // Twice the bound, for the best and for its rival; twice that again covers the float32 arithmetic done here.
    const Lanes<W> slack = 4 * (screen.kappa * (screen.largest_norm2 + lanes<W>(norm2 + c)) + screen.eta);
    const Lanes<W> limit = least + slack;
    Int label = {}, n_close = {};
    for (int64_t k = screen.K - 1; k >= 0; --k) {
      const Int is_close = lanes<W>(v + k * ROWS + c) <= limit;
      label = is_close ? Int{} + static_cast<int32_t>(k) : label;
      n_close -= is_close;
    }
    lanes<W>(verdict->least + c) = least;
    lanes<W>(verdict->limit + c) = limit;
    lanes<W>(verdict->slack + c) = slack;
    *reinterpret_cast<Int*>(verdict->label + c) = label;
    *reinterpret_cast<Int*>(verdict->n_close + c) = n_close;
  }
}

CLMFAST_PER_WIDTH(judge,
                  (const Screen& screen, const float* norm2, const int32_t* excluded, float* v, Verdict* verdict),
                  (screen, norm2, excluded, v, verdict))

// least [n_groups, ROWS]: of each group the least v, without that of the own centroid.
template <int W>
CLMFAST_BODY void least_others_body(const float* v, int64_t K, int64_t n_groups, const int32_t* label, float* least) {
  using Int = typename LanesOf<W>::Int;
  for (int64_t c = 0; c < ROWS; c += W) {
    const Int own = *reinterpret_cast<const Int*>(label + c);
    for (int64_t g = 0; g < n_groups; ++g) {
      Lanes<W> of_group = Lanes<W>{} + INF;
      for (int64_t k = g; k < K; k += GROUPS) {
        Lanes<W> x = lanes<W>(v + k * ROWS + c);
        x = own == static_cast<int32_t>(k) ? Lanes<W>{} + INF : x;
        of_group = x < of_group ? x : of_group;
      }
      lanes<W>(least + g * ROWS + c) = of_group;
    }
  }
}

CLMFAST_PER_WIDTH(least_others, (const float* v, int64_t K, int64_t n_groups, const int32_t* label, float* least),
                  (v, K, n_groups, label, least))

// Distances of n points from screens: the root of v + offset, in the units of the points.
CLMFAST_BODY void to_distances_body(const float* v, const float* offset, float factor, int64_t n, float* distance) {
  for (int64_t c = 0; c < n; ++c) {
    const float dist2 = v[c] + offset[c];
    distance[c] = std::sqrt(dist2 > 0 ? dist2 : 0) * factor;
  }
}

CLMFAST_PER_ISA(void, to_distances, (const float* v, const float* offset, float factor, int64_t n, float* distance),
                (v, offset, factor, n, distance))

// sum_d (a_d - b_d)^2
CLMFAST_BODY float difference2_body(const float* a, const float* b, int64_t D) {
  constexpr int64_t W = 8;  // on every machine: the order of a sum
  Lanes<W> squares[4] = {};
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) {
    for (int64_t e = 0; e < 4; ++e) {
      const Lanes<W> x = lanes<W>(a + d + e * W) - lanes<W>(b + d + e * W);
      squares[e] += x * x;
    }
  }
  float sum = sum_of((squares[0] + squares[2]) + (squares[1] + squares[3]));
  for (; d < D; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

CLMFAST_PER_ISA(float, difference2, (const float* a, const float* b, int64_t D), (a, b, D))

// least [TRIALS, N], of one panel's points: the least of closest and |p~|^2 + |t~|^2 - 2 t~.p~. Returns whether any is
// so much less than its terms that differences must decide.
template <int W>
CLMFAST_BODY bool least_of_panel_body(const float* dot, const float* norm2, const float* of_trial, const float* closest,
                                      float* least, int64_t N) {
  typename LanesOf<W>::Int is_close = {};
  for (int64_t t = 0; t < TRIALS; ++t) {
    for (int64_t c = 0; c < ROWS; c += W) {
      const Lanes<W> squares = lanes<W>(norm2 + c) + of_trial[t], before = lanes<W>(closest + c);
      const Lanes<W> x = squares - 2 * lanes<W>(dot + t * ROWS + c);
      is_close |= x < squares * CANCELLED;
      lanes<W>(least + t * N + c) = x < before ? x : before;
    }
  }
  int32_t any = 0;
  for (int l = 0; l < W; ++l) any |= is_close[l];
  return any != 0;
}

bool least_of_panel_baseline(const float* dot, const float* norm2, const float* of_trial, const float* closest,
                             float* least, int64_t N) {
  return least_of_panel_body<4>(dot, norm2, of_trial, closest, least, N);
}
CLMFAST_AVX2 bool least_of_panel_avx2(const float* dot, const float* norm2, const float* of_trial,
                                      const float* closest, float* least, int64_t N) {
  return least_of_panel_body<8>(dot, norm2, of_trial, closest, least, N);
}
CLMFAST_AVX512 bool least_of_panel_avx512(const float* dot, const float* norm2, const float* of_trial,
                                          const float* closest, float* least, int64_t N) {
  return least_of_panel_body<16>(dot, norm2, of_trial, closest, least, N);
}

}  // namespace

Panels::Panels(const float* points, int64_t N, int64_t D, int64_t centre)
    : points_(points), N_(N), D_(D), n_((N + ROWS - 1) / ROWS), panel_(new float[n_ * ROWS * D]), norm2_(n_ * ROWS) {
  std::vector<int32_t> reach(D);
  for (int64_t i = 0; i < n_; ++i) {
    const float *point[ROWS], *next[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) {
      point[r] = points + std::min(i * ROWS + r, N - 1) * D;
      next[r] = points + std::min((i + 1) * ROWS + r, N - 1) * D;
    }
    place(point, next, D, 1, points + centre * D, panel_.get() + i * ROWS * D, &norm2_[i * ROWS], reach.data());
  }
}

void Panels::least_dist2(const int64_t* trial, const float* closest, const int32_t* nearest, const float* limit,
                         float* least) const {
  static const auto least_of_panel = pick(least_of_panel_baseline, least_of_panel_avx2, least_of_panel_avx512);
  std::vector<float> row(D_ * TILE_ROWS);
  float of_trial[TRIALS], dot[TILE_ROWS * ROWS];
  for (int64_t t = 0; t < TRIALS; ++t) {
    of_trial[t] = norm2_[trial[t]];
    const float* from = panel_.get() + trial[t] / ROWS * ROWS * D_ + trial[t] % ROWS;
    for (int64_t d = 0; d < D_; ++d) row[d * TILE_ROWS + t] = from[d * ROWS];
  }
  const int64_t stride = n_ * ROWS;
  for (int64_t i = 0; i < n_; ++i) {
    const int64_t first = i * ROWS, n = std::min(ROWS, N_ - first);
    const auto is_far = [&](int64_t c) { return closest[first + c] <= limit[nearest[first + c]]; };
    bool is_needed = false;
    for (int64_t c = 0; c < n; ++c) is_needed |= !is_far(c);
    if (!is_needed) {
      for (int64_t t = 0; t < TRIALS; ++t) std::copy_n(closest + first, ROWS, least + t * stride + first);
      continue;
    }
    dot_tile(row.data(), TRIALS, panel_.get() + first * D_, D_, dot);
    if (!least_of_panel(dot, &norm2_[first], of_trial, closest + first, least + first, stride)) continue;
    for (int64_t t = 0; t < TRIALS; ++t) {
      for (int64_t c = 0; c < n; ++c) {
        const float squares = norm2_[first + c] + of_trial[t];
        if (!(squares - 2 * dot[t * ROWS + c] < 2 * squares * CANCELLED)) continue;
        const float exact = difference2(points_ + (first + c) * D_, points_ + trial[t] * D_, D_);
        least[t * stride + first + c] = std::min(exact, closest[first + c]);
      }
    }
  }
}

void Centroids::pack(const float* centroid, int64_t K, int64_t D) {
  centroid_ = centroid, K_ = K, D_ = D, n_tiles_ = (K + TILE_ROWS - 1) / TILE_ROWS;
  const double steps = (static_cast<double>(D) + 8) * 0x1p-24;
  kappa_ = steps / (1 - steps), eta_ = (static_cast<double>(D) + 8) * 0x1p-118;
  // The frame: half the largest |coordinate| to 1, the mean to 0. Any would do.
  std::vector<char> is_finite(K);
  std::vector<double> mean(D);
  int64_t n_finite = 0;
  float reach = 0;
  for (int64_t k = 0; k < K; ++k) {
    const float of_row = row_reach(centroid + k * D, D);
    is_finite[k] = of_row < INF;
    if (!is_finite[k]) continue;
    ++n_finite;
    reach = std::max(reach, of_row);
    for (int64_t d = 0; d < D; ++d) mean[d] += centroid[k * D + d];
  }
  scale_ = reach > 0 ? std::ldexp(1.0f, std::clamp(-std::ilogb(reach) - 1, -126, 126)) : 1;
  centre_.resize(D);
  for (int64_t d = 0; d < D; ++d)
    centre_[d] = static_cast<float>(mean[d] / static_cast<double>(std::max<int64_t>(n_finite, 1)) * scale_);
  rows_.assign(n_tiles_ * D * TILE_ROWS, 0);
  norm2_.assign(K, INF);
  largest_norm2_ = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (!is_finite[k]) continue;
    float* row = rows_.data() + k / TILE_ROWS * D * TILE_ROWS + k % TILE_ROWS;
    double norm2 = 0;
    for (int64_t d = 0; d < D; ++d) {
      const float x = centroid[k * D + d] * scale_ - centre_[d];
      row[d * TILE_ROWS] = x;
      norm2 += static_cast<double>(x) * x;
    }
    norm2_[k] = static_cast<float>(norm2);
    largest_norm2_ = std::max(largest_norm2_, norm2);
  }
}

void Centroids::nearest(const float* points, const int64_t* row, int64_t n, const int32_t* excluded, const Found& found,
                        int32_t* reach) const {
  constexpr float SUITABLE = 0x1p60f;  // squared norms up to here leave no room for overflow
  const Screen screen{norm2_.data(), K_, static_cast<float>(kappa_), static_cast<float>(eta_),
                      static_cast<float>(largest_norm2_)};
  const int64_t n_groups = std::min(K_, GROUPS), n_v = n_tiles_ * TILE_ROWS * ROWS;
  const std::unique_ptr<float[]> memory(new float[n_v + D_ * ROWS + GROUPS * ROWS]);
  float *v = memory.get(), *panel = v + n_v, *others = panel + D_ * ROWS;
  std::vector<int32_t> not_asked_for(reach ? 0 : D_);
  if (!reach) reach = not_asked_for.data();
  const float in_points = 1 / scale_;
  for (int64_t e = 0; e < n; e += ROWS) {
    const int64_t n_rows = std::min(ROWS, n - e);
    const float *point[ROWS], *next[ROWS];
    int32_t without[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) {
      point[r] = points + row[std::min(e + r, n - 1)] * D_;
      next[r] = points + row[std::min(e + ROWS + r, n - 1)] * D_;
      without[r] = excluded ? excluded[std::min(e + r, n - 1)] : -1;
    }
    float norm2[ROWS], offset[ROWS];
    Verdict verdict;
    place(point, next, D_, scale_, centre_.data(), panel, norm2, reach);
    for (int64_t i = 0; i < n_tiles_; ++i)
      dot_tile(rows_.data() + i * D_ * TILE_ROWS, std::min(TILE_ROWS, K_ - i * TILE_ROWS), panel, D_,
               v + i * TILE_ROWS * ROWS);
    judge(screen, norm2, without, v, &verdict);
    for (int64_t r = 0; r < n_rows; ++r) {
      if (!(norm2[r] <= SUITABLE)) verdict.label[r] = -1;
      else if (verdict.n_close[r] > 1)
        verdict.label[r] = decide(point[r], v + r, verdict.limit[r], without[r]).label;
    }
    std::copy_n(verdict.label, n_rows, found.label + e);
    // The squared norm is another sum that may be off by kappa P^2.
    if (found.within) {
      for (int64_t r = 0; r < n_rows; ++r) verdict.least[r] = v[std::max(verdict.label[r], 0) * ROWS + r];
      for (int64_t r = 0; r < ROWS; ++r) offset[r] = norm2[r] + 2 * verdict.slack[r];
      to_distances(verdict.least, offset, in_points * (1 + 0x1p-20f), n_rows, found.within + e);
    }
    if (found.beyond) {
      least_others(v, K_, n_groups, verdict.label, others);
      for (int64_t r = 0; r < ROWS; ++r) offset[r] = norm2[r] - 2 * verdict.slack[r];
      for (int64_t g = 0; g < n_groups; ++g)
        to_distances(others + g * ROWS, offset, in_points * (1 - 0x1p-20f), n_rows,
                     found.beyond + g * found.stride + e);
    }
    // Points that are out of the screen's range, or not finite.
    for (int64_t r = 0; r < n_rows; ++r) {
      if (verdict.label[r] >= 0) continue;
      const bool is_finite = is_finite_row(point[r], D_);
      const Nearest nearest = is_finite ? decide(point[r], v + r, INF, without[r]) : Nearest{-1, 0};
      const Found one = found.from(e + r);
      *one.label = nearest.label;
      if (one.within) *one.within = above(nearest.dist2);
      for (int64_t g = 0; one.beyond && g < n_groups; ++g) one.beyond[g * one.stride] = is_finite ? 0 : INF;
    }
  }
}

Centroids::Nearest Centroids::decide(const float* point, const float* v, float limit, int32_t excluded) const {
  Nearest nearest{0, std::numeric_limits<double>::infinity()};
  for (int64_t k = 0; k < K_; ++k) {
    if (k == excluded || !(norm2_[k] < INF) || v[k * ROWS] > limit) continue;
    const double dist2 = pair_dist2(point, centroid_ + k * D_, D_);
    if (dist2 < nearest.dist2) nearest = {static_cast<int32_t>(k), dist2};
  }
  return nearest;
}

Between Centroids::between(const float* point, int64_t k) const {
  const float dist2 = difference2(point, centroid_ + k * D_, D_);
  if (!(dist2 > 0x1p-80f && dist2 < 0x1p120f)) {
    const double exact = pair_dist2(point, centroid_ + k * D_, D_);
    return {static_cast<float>(std::sqrt(exact) * (1 - 0x1p-20)), above(exact)};
  }
  const float error = static_cast<float>(D_ / 32 + 48) * 0x1p-24f, dist = std::sqrt(dist2);  // of the root, half of it
  return {dist * (1 - error), dist * (1 + error)};
}

void Centroids::renew(const float* point, uint32_t near, const Found& found) const {
  int32_t& label = *found.label;
  float& within = *found.within;
  const auto beyond = [&found](int64_t g) -> float& { return found.beyond[g * found.stride]; };
  const Between own = between(point, label);
  within = own.high;
  for (uint32_t rest = near; rest; rest &= rest - 1)
    if (own.high < beyond(__builtin_ctz(rest))) near &= ~(rest & -rest);
  if (!near) return;

  // All that may be nearer.
  constexpr int64_t MOST = 64;
  int32_t rival[MOST];
  float low[MOST], least = own.high;
  rival[0] = label, low[0] = own.low;
  int64_t n = 1;
  for (uint32_t rest = near; rest; rest &= rest - 1) {
    for (int64_t k = __builtin_ctz(rest); k < K_; k += GROUPS) {
      if (k == label || !(norm2_[k] < INF)) continue;
      if (n == MOST) {
        const int64_t row = 0;
        return nearest(point, &row, 1, nullptr, found);
      }
      const Between other = between(point, k);
      rival[n] = static_cast<int32_t>(k), low[n] = other.low, ++n;
      least = std::min(least, other.high);
    }
  }
  within = least;
  int64_t n_close = 0, best = 0;
  for (int64_t e = 0; e < n; ++e)
    if (low[e] <= least) ++n_close, best = e;
  if (n_close > 1) {
    double best2 = std::numeric_limits<double>::infinity();
    best = -1;
    for (int64_t e = 0; e < n; ++e) {
      if (low[e] > least) continue;
      const double dist2 = pair_dist2(point, centroid_ + rival[e] * D_, D_);
      low[e] = static_cast<float>(std::sqrt(dist2) * (1 - 0x1p-20));
      if (best < 0 || dist2 < best2 || (dist2 == best2 && rival[e] < rival[best])) {
        best = e;
        best2 = dist2;
      }
    }
    within = above(best2);
  }
  // The groups that were looked into are known anew, and that of the old label may have got it back.
  for (uint32_t rest = near; rest; rest &= rest - 1) beyond(__builtin_ctz(rest)) = INF;
  for (int64_t e = 0; e < n; ++e)
    if (e != best) beyond(rival[e] % GROUPS) = std::min(beyond(rival[e] % GROUPS), low[e]);
  label = rival[best];
}

}  // namespace clmfast
