#include "fused.h"  // the search works with approximate distances anyway

// kmeans_search on the CPU: one set is one task. In the projection everything is small and dense.
#include "../kmeans_search.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "grid.h"
#include "isa.h"
#include "lanes.h"
#include "pair.h"
#include "projection.h"
#include "sums.h"
#include "tile.h"
#include "uniform.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double SAME = 1e-4;
constexpr double ROUNDING = 1e-6;  // an inertia of so much of the scatter is 0
constexpr int64_t COLD_ITERATIONS = 20, MOVE_ITERATIONS = 4, SPLIT_ITERATIONS = 3;

// A partition of the points in the projection.
struct Partition {
  std::vector<int32_t> label;  // [n]; -1: none yet
  std::vector<float> own;      // [n]: |c|^2 - 2 c . row of the point's own centroid c, when it was looked at last
  std::vector<float> sum;      // [K, M]
  std::vector<int64_t> count;  // [K]
  double inertia = INF;
  int64_t origin = 0;  // the start that it comes from: known ones, then cold ones
};

// ---- inner loops, of rows of M = a multiple of SIDE floats

using Eight = Lanes<SIDE>;
typedef LanesOf<SIDE>::Int EightI;

// Of PANEL points: own[c] = norm2[j] - 2 dot[j][c] and label[c] = name[j] of the smallest of n such numbers, or what they
// are if that is smaller. Returns whether a label changed.
CLMFAST_BODY bool take_nearest_body(const float* dot, const float* norm2, const int32_t* name, int64_t n, float* own,
                                    int32_t* label) {
  EightI changed = {};
  for (int64_t c = 0; c < PANEL; c += SIDE) {
    Eight best = lanes<SIDE>(own + c);
    EightI& to = *reinterpret_cast<EightI*>(label + c);
    EightI of = to;
    for (int64_t j = 0; j < n; ++j) {
      const Eight x = norm2[j] - 2 * lanes<SIDE>(dot + j * PANEL + c);
      of = x < best ? EightI{} + name[j] : of;
      best = x < best ? x : best;
    }
    lanes<SIDE>(own + c) = best;
    changed |= of ^ to;
    to = of;
  }
  int32_t any = 0;
  for (int64_t c = 0; c < SIDE; ++c) any |= changed[c];
  return any != 0;
}

CLMFAST_PER_ISA(bool, take_nearest,
                (const float* dot, const float* norm2, const int32_t* name, int64_t n, float* own, int32_t* label),
                (dot, norm2, name, n, own, label))

// Of PANEL points: least[c] = min(closest[c], |x|^2 + norm2[c] - 2 dot[c]); returns their sum.
CLMFAST_BODY float closer_body(const float* dot, float x2, const float* norm2, const float* closest, float* least) {
  Eight sum = {};
  for (int64_t c = 0; c < PANEL; c += SIDE) {
    Eight dist2 = x2 + lanes<SIDE>(norm2 + c) - 2 * lanes<SIDE>(dot + c);
    const Eight before = lanes<SIDE>(closest + c);
    dist2 = dist2 < 0 ? Eight{} : dist2;
    dist2 = dist2 < before ? dist2 : before;
    lanes<SIDE>(least + c) = dist2;
    sum += dist2;
  }
  return sum_of(sum);
}

CLMFAST_PER_ISA(float, closer, (const float* dot, float x2, const float* norm2, const float* closest, float* least),
                (dot, x2, norm2, closest, least))

// sum[label[i]] += row i; labels that are none are left out.
CLMFAST_BODY void sum_rows_body(const float* row, const int32_t* label, int64_t n, int64_t M, float* sum) {
  for (int64_t i = 0; i < n; ++i) {
    if (label[i] < 0) continue;
    float* to = sum + label[i] * M;
    for (int64_t m = 0; m < M; m += SIDE) lanes<SIDE>(to + m) += lanes<SIDE>(row + i * M + m);
  }
}

CLMFAST_PER_ISA(void, sum_rows, (const float* row, const int32_t* label, int64_t n, int64_t M, float* sum),
                (row, label, n, M, sum))

// A row leaves one sum (null: none) and enters another.
CLMFAST_BODY void move_row_body(const float* row, int64_t M, float* from, float* to) {
  for (int64_t m = 0; m < M; m += SIDE) {
    if (from) lanes<SIDE>(from + m) -= lanes<SIDE>(row + m);
    lanes<SIDE>(to + m) += lanes<SIDE>(row + m);
  }
}

CLMFAST_PER_ISA(void, move_row, (const float* row, int64_t M, float* from, float* to), (row, M, from, to))

// dot[i] = row i . x, for n = a multiple of SIDE rows.
CLMFAST_BODY void dots_body(const float* row, int64_t n, int64_t M, const float* x, float* dot) {
  for (int64_t i = 0; i < n; i += SIDE) {
    Eight sum[SIDE] = {};
    for (int64_t m = 0; m < M; m += SIDE)
      for (int64_t r = 0; r < SIDE; ++r) sum[r] += lanes<SIDE>(row + (i + r) * M + m) * lanes<SIDE>(x + m);
    transpose<SIDE>(sum);
    lanes<SIDE>(dot + i) = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }
}

CLMFAST_PER_ISA(void, dots, (const float* row, int64_t n, int64_t M, const float* x, float* dot), (row, n, M, x, dot))

// Sum of those of n rows whose dot[i] is at least `limit`; returns their number.
template <int C>
CLMFAST_BODY void sum_side_of(const float* row, const float* dot, float limit, int64_t n, int64_t M, float* sum) {
  Eight side[C] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float is_side = dot[i] >= limit ? 1.0f : 0.0f;
    for (int c = 0; c < C; ++c) side[c] += is_side * lanes<SIDE>(row + i * M + c * SIDE);
  }
  for (int c = 0; c < C; ++c) lanes<SIDE>(sum + c * SIDE) = side[c];
}

CLMFAST_BODY int64_t sum_side_body(const float* row, const float* dot, float limit, int64_t n, int64_t M, float* sum) {
  int64_t n_side = 0, m = 0;
  for (int64_t i = 0; i < n; ++i) n_side += dot[i] >= limit;
  for (; m + 6 * SIDE <= M; m += 6 * SIDE) sum_side_of<6>(row + m, dot, limit, n, M, sum + m);
  for (; m < M; m += SIDE) sum_side_of<1>(row + m, dot, limit, n, M, sum + m);
  return n_side;
}

CLMFAST_PER_ISA(int64_t, sum_side, (const float* row, const float* dot, float limit, int64_t n, int64_t M, float* sum),
                (row, dot, limit, n, M, sum))

// to row e = row index[e]
CLMFAST_BODY void gather_body(const float* row, const int32_t* index, int64_t n, int64_t M, float* to) {
  for (int64_t e = 0; e < n; ++e)
    for (int64_t m = 0; m < M; m += SIDE) lanes<SIDE>(to + e * M + m) = lanes<SIDE>(row + index[e] * M + m);
}

CLMFAST_PER_ISA(void, gather, (const float* row, const int32_t* index, int64_t n, int64_t M, float* to),
                (row, index, n, M, to))

// |a s - b t|^2
CLMFAST_BODY float dist2_of_body(const float* a, float s, const float* b, float t, int64_t M) {
  Eight squares = {};
  for (int64_t m = 0; m < M; m += SIDE) {
    const Eight x = lanes<SIDE>(a + m) * s - lanes<SIDE>(b + m) * t;
    squares += x * x;
  }
  return sum_of(squares);
}

CLMFAST_PER_ISA(float, dist2_of, (const float* a, float s, const float* b, float t, int64_t M), (a, s, b, t, M))

CLMFAST_BODY double norm2_of_body(const float* a, int64_t M) {
  Eight squares = {};
  for (int64_t m = 0; m < M; m += SIDE) squares += lanes<SIDE>(a + m) * lanes<SIDE>(a + m);
  return sum_of(squares);
}

CLMFAST_PER_ISA(double, norm2_of, (const float* a, int64_t M), (a, M))

// panels [n / PANEL, M, PANEL] and squared norms of rows [n, M], n a multiple of PANEL.
CLMFAST_BODY void lay_out_body(const float* rows, int64_t n, int64_t M, float* panels, float* norm2) {
  for (int64_t i = 0; i < n; i += SIDE) {
    Eight squares = {};
    for (int64_t m = 0; m < M; m += SIDE) {
      Eight square[SIDE];
      for (int64_t r = 0; r < SIDE; ++r) square[r] = lanes<SIDE>(rows + (i + r) * M + m);
      transpose<SIDE>(square);
      for (int64_t r = 0; r < SIDE; ++r) {
        lanes<SIDE>(panels + i / PANEL * PANEL * M + (m + r) * PANEL + i % PANEL) = square[r];
        squares += square[r] * square[r];
      }
    }
    lanes<SIDE>(norm2 + i) = squares;
  }
}

CLMFAST_PER_ISA(void, lay_out, (const float* rows, int64_t n, int64_t M, float* panels, float* norm2),
                (rows, n, M, panels, norm2))

// panel [D, PANEL] of n points about the centre, zeros behind the last, and their squared norms [PANEL].
CLMFAST_BODY void lay_out_points_body(const float* points, const int64_t* source, int64_t n, int64_t D,
                                      const float* centre, float unit, float* panel, float* norm2) {
  for (int64_t c = 0; c < PANEL; c += SIDE) {
    Eight squares = {};
    int64_t d = 0;
    for (; d + SIDE <= D; d += SIDE) {
      Eight square[SIDE] = {};
      for (int64_t r = 0; r < SIDE && c + r < n; ++r)
        square[r] = lanes<SIDE>(points + source[c + r] * D + d) - lanes<SIDE>(centre + d);
      for (int64_t r = 0; r < SIDE; ++r) square[r] *= unit;
      transpose<SIDE>(square);
      for (int64_t r = 0; r < SIDE; ++r) {
        lanes<SIDE>(panel + (d + r) * PANEL + c) = square[r];
        squares += square[r] * square[r];
      }
    }
    for (; d < D; ++d) {
      Eight row = {};
      for (int64_t r = 0; r < SIDE && c + r < n; ++r) row[r] = (points[source[c + r] * D + d] - centre[d]) * unit;
      lanes<SIDE>(panel + d * PANEL + c) = row;
      squares += row * row;
    }
    lanes<SIDE>(norm2 + c) = squares;
  }
}

CLMFAST_PER_ISA(void, lay_out_points,
                (const float* points, const int64_t* source, int64_t n, int64_t D, const float* centre, float unit,
                 float* panel, float* norm2),
                (points, source, n, D, centre, unit, panel, norm2))

static_assert(n_directions(1 << 20, 1 << 20, 1) % SIDE == 0);

int64_t padded_to(int64_t side, int64_t n) { return (n + side - 1) / side * side; }

// ---- the search in one set

// A cluster in two.
struct Split {
  double worth = 0;  // inertia that it saves
  int64_t of = -1;
  std::vector<int32_t> other;  // points of the second half
};

class Search {
 public:
  Search(const KmeansSearch& op, int64_t s)
      : op_(op), s_(s), N_(op.N), D_(op.D), K_(op.K), points_(op.points + s * op.N * op.D), all_(op.K) {
    std::iota(all_.begin(), all_.end(), 0);
    project_points();
    centroids_.resize(padded_to(TILE_ROWS, K_) * M_), norm2_of_.resize(K_);
    dot_.resize(padded_to(TILE_ROWS, K_) * PANEL), is_in_.resize(K_ + 1), name_.resize(K_);
    side_.resize(padded_to(PANEL, n_) * M_), side_dot_.resize(padded_to(PANEL, n_));
  }

  void run() {
    std::fill_n(op_.centroid + s_ * K_ * D_, K_ * D_, 0.0f);
    op_.origin[s_] = op_.n_iter[s_] = 0;
    if (n_ == 0) return write();
    for (int64_t p = 0; p < op_.P; ++p) {
      const int64_t* known = op_.known + (p * op_.S + s_) * N_;
      if (p > 0 && std::none_of(known, known + N_, [&](int64_t k) { return is_label(k); })) continue;
      begin(go_on(known), p);
    }
    const int64_t P = static_cast<int64_t>(found_.size()), n_cold = op_.n_cold[s_];
    if (P > 0 && op_.moves > 0) {
      const int64_t best = best_found();
      move(found_[best]);
      if (P > 1) move(found_[(best + 1 + (op_.seed % (P - 1) + P - 1) % (P - 1)) % P]);
    }
    for (int64_t restart = 0; restart < n_cold; ++restart) {
      begin(cold(restart), op_.P + restart);
      move(found_.back());
    }
    for (int64_t i = 0; i < op_.renewals && K_ > 1; ++i) {
      const int64_t best = best_found();
      if (is_perfect(found_[best])) break;
      begin(renewed(found_[best], n_cold + i), op_.P + n_cold + i);
      move(found_.back());
      if (!(found_.back().inertia < (1 - SAME) * found_[best].inertia)) break;
    }
    write();
  }

 private:
  // ---- the points

  // Where the caller keeps no projection, it is made here.
  void project_points() {
    const int64_t M = n_directions(N_, D_, K_);
    const bool is_kept = op_.directions != nullptr;
    if (!is_kept) frame_.resize((1 + M) * D_), projected_.resize(N_ * (M > 0 ? M : D_));
    float* centre = is_kept ? op_.directions + s_ * (1 + M) * D_ : frame_.data();
    float* rows = is_kept ? op_.projected + s_ * N_ * M : projected_.data();
    float* directions = centre + D_;
    const auto length2 = [&] {
      double sum = 0;
      for (int64_t d = 0; d < D_ && M > 0; ++d) sum += static_cast<double>(directions[d]) * directions[d];
      return sum;
    };
    const bool is_new = !is_kept || op_.P == 0 || op_.n_cold[s_] > 0 || length2() == 0;
    centre_ = centre;
    const float unit = is_new ? main_directions(points_, N_, D_, M, centre, directions) : 1;
    if (M == 0) {
      unit2_ = static_cast<double>(unit) * unit;
      for (int64_t i = 0; i < N_ * D_; ++i) rows[i] = (points_[i] - centre[i % D_]) * unit;
      return look_at(rows, D_);
    }
    if (length2() > 0) unit2_ = length2();
    for (int64_t i = 0; i < N_;) {
      int64_t end = i;
      while (end < N_ && (is_new || op_.known[s_ * N_ + end] < 0)) ++end;
      if (end > i) project(points_ + i * D_, end - i, D_, centre, directions, M, rows + i * M);
      i = std::max(end, i + 1);
    }
    look_at(rows, M);
  }

  // The finite ones of rows [N, width]; the search keeps the pointer.
  void look_at(const float* rows, int64_t width) {
    M_ = padded_to(SIDE, std::max<int64_t>(width, 1));
    const int64_t n_padded = padded_to(PANEL, N_);
    panels_.reset(new float[n_padded * M_]);
    norm2_.resize(n_padded);
    rows_ = rows;
    const auto own_rows = [&] {
      own_rows_.resize(n_padded * M_);
      for (int64_t i = 0; i < n_; ++i) std::copy_n(rows + source_[i] * width, width, &own_rows_[i * M_]);
      rows_ = own_rows_.data();
    };
    source_.resize(N_);
    std::iota(source_.begin(), source_.end(), 0);
    n_ = N_;
    if (width != M_ || n_ != n_padded) own_rows();
    lay_out(rows_, n_padded, M_, panels_.get(), norm2_.data());
    const auto is_not_finite = [&](int64_t i) { return !(norm2_[i] < INF); };
    source_.erase(std::remove_if(source_.begin(), source_.end(), is_not_finite), source_.end());
    n_ = static_cast<int64_t>(source_.size());
    if (n_ < N_) {
      own_rows_.clear();
      own_rows();
      lay_out(rows_, n_padded, M_, panels_.get(), norm2_.data());
    }
    for (int64_t i = 0; i < n_; ++i) scatter_ += norm2_[i];
  }

  const float* row(int64_t i) const { return rows_ + i * M_; }

  void begin(Partition p, int64_t origin) {
    p.origin = origin;
    found_.push_back(std::move(p));
  }

  int64_t best_found() const {
    const auto lower = [](const Partition& a, const Partition& b) { return a.inertia < b.inertia; };
    return std::min_element(found_.begin(), found_.end(), lower) - found_.begin();
  }

  // Could anything be gained but rounding?
  bool is_perfect(const Partition& p) const { return p.inertia <= ROUNDING * scatter_; }

  bool is_label(int64_t k) const { return 0 <= k && k < K_; }

  // ---- Lloyd's algorithm

  // Sums and counts of the labels that are there.
  void sum_up(Partition& p) const {
    p.sum.assign(K_ * M_, 0);
    p.count.assign(K_, 0);
    sum_rows(rows_, p.label.data(), n_, M_, p.sum.data());
    for (int32_t k : p.label)
      if (k >= 0) ++p.count[k];
  }

  void set_inertia(Partition& p) const {
    p.inertia = scatter_;
    for (int64_t k = 0; k < K_; ++k)
      if (p.count[k]) p.inertia -= norm2_of(&p.sum[k * M_], M_) / static_cast<double>(p.count[k]);
  }

  // Compares points with the centroids of some clusters, and each takes the nearest of these and its own. Returns the
  // clusters that changed. Points: n of them in panels, which are index[0..n), or 0..n where that is null; if `only_new`,
  // those of them that have no label.
  std::vector<int32_t> assign(Partition& p, const std::vector<int32_t>& clusters, const float* panels, int64_t n,
                              const int32_t* index, bool only_new = false) {
    int64_t n_present = 0;
    std::fill(is_in_.begin(), is_in_.end(), 0);
    for (int32_t k : clusters) {
      if (p.count[k] == 0) continue;
      const float scale = 1 / static_cast<float>(p.count[k]);
      float* to = &centroids_[n_present / TILE_ROWS * TILE_ROWS * M_ + n_present % TILE_ROWS];
      for (int64_t m = 0; m < M_; ++m) to[m * TILE_ROWS] = p.sum[k * M_ + m] * scale;
      norm2_of_[n_present] = static_cast<float>(norm2_of(&p.sum[k * M_], M_)) * scale * scale;
      name_[n_present++] = k;
      is_in_[k] = 1;
    }
    is_in_[K_] = 1;  // of points that have no label
    const bool is_all = n_present == K_;
    const auto at = [&](int64_t i) { return index ? index[i] : i; };
    changed_.assign(K_, 0);
    for (int64_t i = 0; i < n; i += PANEL) {
      const int64_t n_here = std::min(PANEL, n - i);
      float own[PANEL];
      int32_t label[PANEL], before[PANEL];
      for (int64_t c = 0; c < n_here; ++c) before[c] = p.label[at(i + c)];
      for (int64_t c = n_here; c < PANEL; ++c) before[c] = 0;
      const auto is_left_out = [only_new](int32_t k) { return only_new && k >= 0; };
      if (std::all_of(before, before + n_here, is_left_out)) continue;
      if (is_all) std::fill_n(own, PANEL, INF);
      else
        for (int64_t c = 0; c < n_here; ++c)
          own[c] = is_in_[before[c] < 0 ? K_ : before[c]] ? INF : p.own[at(i + c)];
      std::copy_n(before, PANEL, label);
      for (int64_t j = 0; j < n_present; j += TILE_ROWS)
        dot_tile(&centroids_[j * M_], std::min(TILE_ROWS, n_present - j), panels + i * M_, M_, &dot_[j * PANEL]);
      const bool has_changed = take_nearest(dot_.data(), norm2_of_.data(), name_.data(), n_present, own, label);
      for (int64_t c = 0; c < n_here; ++c)
        if (!is_left_out(before[c])) p.own[at(i + c)] = own[c];
      for (int64_t c = 0; c < n_here && has_changed; ++c)
        if (label[c] != before[c] && !is_left_out(before[c])) relabel(p, at(i + c), label[c]);
    }
    std::vector<int32_t> found;
    for (int32_t k : all_)
      if (changed_[k]) found.push_back(k);
    return found;
  }

  void relabel(Partition& p, int64_t i, int32_t to) {
    const int32_t from = p.label[i];
    if (from >= 0) --p.count[from], changed_[from] = 1;
    move_row(row(i), M_, from >= 0 ? &p.sum[from * M_] : nullptr, &p.sum[to * M_]);
    ++p.count[to], changed_[to] = 1;
    p.label[i] = to;
  }

  // Clusters without points take over those farthest from their centroids, one each.
  void fill_empty(Partition& p) {
    if (std::find(p.count.begin(), p.count.end(), 0) == p.count.end()) return;
    std::vector<float> own2(n_);
    for (int64_t i = 0; i < n_; ++i) own2[i] = p.own[i] + norm2_[i];
    for (int64_t k = 0; k < K_; ++k) {
      if (p.count[k]) continue;
      const int64_t far = std::max_element(own2.begin(), own2.end()) - own2.begin();
      if (!(own2[far] > 0)) return;
      own2[far] = 0;
      relabel(p, far, static_cast<int32_t>(k));
    }
  }

  // From sums and counts. The first iteration compares points with the centroids of `clusters`, every other one with
  // those of the clusters that changed in the one before.
  void lloyd(Partition& p, int64_t max_iter, std::vector<int32_t> clusters) {
    for (int64_t i = 0; i < max_iter && !clusters.empty(); ++i) {
      clusters = assign(p, clusters, panels_.get(), n_, nullptr);
      fill_empty(p);
    }
    set_inertia(p);
  }

  // Points without a label join the nearest centroid, and one iteration of all follows.
  Partition go_on(const int64_t* known) {
    Partition p;
    p.label.resize(n_), p.own.resize(n_);
    bool has_any = false;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t k = known[source_[i]];
      p.label[i] = is_label(k) ? static_cast<int32_t>(k) : -1;
      has_any |= p.label[i] >= 0;
    }
    if (!has_any) std::fill(p.label.begin(), p.label.end(), 0);
    sum_up(p);
    assign(p, all_, panels_.get(), n_, nullptr, true);
    lloyd(p, 1, all_);
    return p;
  }

  // k-means++, then Lloyd's algorithm.
  Partition cold(int64_t restart) {
    Partition p;
    p.label.assign(n_, -1), p.own.resize(n_);
    p.sum.assign(K_ * M_, 0), p.count.assign(K_, 0);
    int64_t draw = 0;
    seed(p, all_, std::vector<float>(n_, INF), restart, draw);
    return p;
  }

  // A partition with a fifth of its clusters, drawn at random, begun anew.
  Partition renewed(const Partition& from, int64_t restart) {
    Partition p = from;
    int64_t draw = 0;
    std::vector<int32_t> clusters = all_;
    const int64_t n = std::max<int64_t>(K_ / 5, 1);
    for (int64_t e = 0; e < n; ++e) {
      const double rest = static_cast<double>(K_ - e);
      std::swap(clusters[e], clusters[e + static_cast<int64_t>(uniform(op_.seed, s_, restart, draw++) * rest)]);
    }
    clusters.resize(n);
    for (int32_t k : clusters) p.count[k] = 0, std::fill_n(&p.sum[k * M_], M_, 0.0f);
    std::vector<float> closest(n_);
    for (int64_t i = 0; i < n_; ++i) {
      closest[i] = std::max(p.own[i] + norm2_[i], 0.0f);
      if (p.count[p.label[i]] == 0) p.label[i] = -1;
    }
    seed(p, clusters, std::move(closest), restart, draw);
    return p;
  }

  // Greedy k-means++ (Arthur & Vassilvitskii 2007) for clusters that have no points yet, then Lloyd's algorithm for all.
  // closest [n]: the weights that the first is drawn by, dist2 to a centroid; INF: there is none.
  void seed(Partition& p, const std::vector<int32_t>& clusters, std::vector<float> closest, int64_t restart,
            int64_t& draw) {
    const int64_t n_trials = std::min<int64_t>(2 + static_cast<int64_t>(std::log(static_cast<double>(K_))), TILE_ROWS);
    const int64_t n_padded = padded_to(PANEL, n_);
    closest.resize(n_padded, 0);
    std::vector<float> least(n_trials * n_padded), rows(TILE_ROWS * M_);
    for (int32_t k : clusters) {
      std::vector<int64_t> trial;
      if (closest[0] == INF) {
        trial = {static_cast<int64_t>(uniform(op_.seed, s_, restart, draw++) * static_cast<double>(n_))};
      } else {
        double potential = 0;
        for (float x : closest) potential += x;
        if (potential == 0) break;  // every point already lies on a centroid
        std::vector<double> target(n_trials);
        for (double& x : target) x = uniform(op_.seed, s_, restart, draw++) * potential;
        trial.assign(n_trials, n_ - 1);
        std::sort(target.begin(), target.end());
        double sum = 0;
        int64_t t = 0;
        for (int64_t i = 0; i < n_ && t < n_trials; ++i) {
          sum += closest[i];
          for (; t < n_trials && sum > target[t]; ++t) trial[t] = i;
        }
      }
      const int64_t n = static_cast<int64_t>(trial.size());
      for (int64_t t = 0; t < n; ++t)
        for (int64_t m = 0; m < M_; ++m) rows[m * TILE_ROWS + t] = row(trial[t])[m];
      std::vector<double> sum(n);
      float dot[TILE_ROWS * PANEL];
      for (int64_t i = 0; i < n_; i += PANEL) {
        dot_tile(rows.data(), n, panels_.get() + i * M_, M_, dot);
        for (int64_t t = 0; t < n; ++t)
          sum[t] += closer(dot + t * PANEL, norm2_[trial[t]], &norm2_[i], &closest[i], &least[t * n_padded + i]);
      }
      const int64_t best = std::min_element(sum.begin(), sum.end()) - sum.begin();
      std::copy_n(&least[best * n_padded], n_padded, closest.data());
      std::copy_n(row(trial[best]), M_, &p.sum[k * M_]);
      p.count[k] = 1;
    }
    assign(p, all_, panels_.get(), n_, nullptr);
    sum_up(p);  // without the points that stood for centroids
    fill_empty(p);
    lloyd(p, COLD_ITERATIONS, all_);
  }

  // ---- moves

  // The split of cluster k of points `member` if it is worth more than `best`, which it becomes.
  void split(const Partition& p, int64_t k, const int32_t* member, Split& best) {
    const int64_t n = p.count[k], n_padded = padded_to(SIDE, n);
    const float* sum = &p.sum[k * M_];
    std::vector<float> a(M_), b(M_), half(M_);
    gather(rows_, member, n, M_, side_.data());
    for (int64_t m = 0; m < M_; ++m) a[m] = sum[m] / static_cast<float>(n);
    for (std::vector<float>* to : {&a, &b}) {
      dots(side_.data(), n_padded, M_, a.data(), side_dot_.data());
      for (int64_t e = 0; e < n; ++e) side_dot_[e] = norm2_[member[e]] - 2 * side_dot_[e];
      const int64_t far = std::max_element(side_dot_.begin(), side_dot_.begin() + n) - side_dot_.begin();
      std::copy_n(&side_[far * M_], M_, to->begin());
    }
    int64_t n_a = 0, before = -1;
    float limit = 0;
    for (int64_t i = 0; i < SPLIT_ITERATIONS && n_a != before; ++i) {
      before = n_a;
      // |x - a|^2 <= |x - b|^2 where x.(a - b) >= (|a|^2 - |b|^2) / 2
      limit = 0;
      for (int64_t m = 0; m < M_; ++m) {
        limit += (a[m] * a[m] - b[m] * b[m]) / 2;
        half[m] = a[m] - b[m];
      }
      dots(side_.data(), n_padded, M_, half.data(), side_dot_.data());
      n_a = sum_side(side_.data(), side_dot_.data(), limit, n, M_, half.data());
      if (n_a == 0 || n_a == n) return;  // equal points
      for (int64_t m = 0; m < M_; ++m) {
        a[m] = half[m] / static_cast<float>(n_a);
        b[m] = (sum[m] - half[m]) / static_cast<float>(n - n_a);
      }
    }
    const double worth = static_cast<double>(n_a) * static_cast<double>(n - n_a) / static_cast<double>(n) *
                         dist2_of(a.data(), 1, b.data(), 1, M_);
    if (!(worth > best.worth)) return;
    best.worth = worth, best.of = k;
    best.other.clear();
    for (int64_t e = 0; e < n; ++e)
      if (!(side_dot_[e] >= limit)) best.other.push_back(member[e]);
  }

  void move(Partition& p) {
    for (int64_t i = 0; i < op_.moves && K_ > 2 && !is_perfect(p); ++i)
      if (!has_moved(p)) return;
  }

  // What merging two clusters costs.
  double cost(const Partition& p, int64_t a, int64_t b) const {
    const double n_a = static_cast<double>(p.count[a]), n_b = static_cast<double>(p.count[b]);
    if (n_a == 0 || n_b == 0) return 0;
    return n_a * n_b / (n_a + n_b) *
           dist2_of(&p.sum[a * M_], static_cast<float>(1 / n_a), &p.sum[b * M_], static_cast<float>(1 / n_b), M_);
  }

  // The two clusters, other than k, whose merging costs least.
  std::pair<int64_t, int64_t> cheapest_merge(const Partition& p, int64_t k) const {
    double least = std::numeric_limits<double>::infinity();
    std::pair<int64_t, int64_t> found;
    for (int64_t a = 0; a < K_; ++a)
      for (int64_t b = a + 1; b < K_; ++b) {
        if (a == k || b == k) continue;
        const double x = cost(p, a, b);
        if (x < least) least = x, found = {a, b};
      }
    return found;
  }

  // One round; returns whether it lowered the inertia.
  bool has_moved(Partition& p) {
    std::vector<int64_t> end(K_ + 1);  // of each cluster in `members`
    std::vector<int32_t> members(n_);
    std::partial_sum(p.count.begin(), p.count.end(), end.begin() + 1);
    std::vector<std::pair<double, int64_t>> order(K_);  // (-inertia, cluster), which is what a split may save at most
    for (int64_t k = 0; k < K_; ++k)
      order[k] = {p.count[k] ? norm2_of(&p.sum[k * M_], M_) / static_cast<double>(p.count[k]) : 0, k};
    for (int64_t e = 0; e < n_; ++e) {
      members[end[p.label[e]]++] = static_cast<int32_t>(e);
      order[p.label[e]].first -= norm2_[e];
    }
    const auto first_of = [&](int64_t k) { return members.data() + end[k] - p.count[k]; };
    std::sort(order.begin(), order.end());
    Split best;
    for (auto [saved, k] : order)
      if (p.count[k] > 1 && -saved > best.worth) split(p, k, first_of(k), best);
    if (best.of < 0) return false;
    const auto [into, freed] = cheapest_merge(p, best.of);
    Partition trial = p;
    std::vector<int32_t> members_of_three;
    for (int64_t k : {best.of, into, freed})
      members_of_three.insert(members_of_three.end(), first_of(k), first_of(k) + p.count[k]);
    for (int64_t e = 0; e < p.count[freed]; ++e) relabel(trial, first_of(freed)[e], static_cast<int32_t>(into));
    for (int32_t e : best.other) relabel(trial, e, static_cast<int32_t>(freed));
    // The members of these three clusters look for the nearest of all centroids, other points for one of the three.
    const int64_t n = static_cast<int64_t>(members_of_three.size());
    gather(rows_, members_of_three.data(), n, M_, side_.data());
    if (gathered_.empty()) gathered_.resize(side_.size());
    lay_out(side_.data(), padded_to(PANEL, n), M_, gathered_.data(), side_dot_.data());
    std::vector<int32_t> three{static_cast<int32_t>(best.of), static_cast<int32_t>(into), static_cast<int32_t>(freed)};
    std::sort(three.begin(), three.end());
    std::vector<int32_t> changed = assign(trial, three, panels_.get(), n_, nullptr), more, both;
    more = assign(trial, all_, gathered_.data(), n, members_of_three.data());
    fill_empty(trial);
    std::set_union(changed.begin(), changed.end(), more.begin(), more.end(), std::back_inserter(both));
    lloyd(trial, MOVE_ITERATIONS - 1, both);
    if (!(trial.inertia < p.inertia)) return false;
    p = std::move(trial);
    return true;
  }

  // ---- the end

  // Lloyd's algorithm in all dimensions; centroids and iterations go to the outputs. Returns the inertia before and
  // after.
  std::pair<double, double> finish(Partition& p) {
    std::vector<int32_t> group(N_, -1);
    for (int64_t i = 0; i < n_; ++i) group[source_[i]] = p.label[i];
    std::vector<double> sum(K_ * D_), dist2(N_);
    sum_groups(points_, N_, D_, group.data(), sum.data());
    int64_t& n_iter = op_.n_iter[s_];
    double before = 0;
    for (bool has_changed = true; has_changed && n_iter < op_.max_iter; ++n_iter) {
      double inertia = 0;
      has_changed = iterate(p, group, sum, inertia);
      if (n_iter == 0) before = inertia;
    }
    float* centroid = op_.centroid + s_ * K_ * D_;
    for (int64_t k = 0; k < K_; ++k)
      for (int64_t d = 0; d < D_; ++d)
        centroid[k * D_ + d] =
            p.count[k] ? static_cast<float>(sum[k * D_ + d] / static_cast<double>(p.count[k])) : std::nanf("");
    dist2_to_groups(points_, 0, N_, D_, group.data(), centroid, dist2.data());
    const double after = std::accumulate(dist2.begin(), dist2.end(), 0.0);
    return {op_.max_iter ? before : after, after};
  }

  // One iteration: labels, and with them group [N], sum [K, D] and the counts; inertia: of the labels before. Returns
  // whether any changed.
  bool iterate(Partition& p, std::vector<int32_t>& group, std::vector<double>& sum, double& inertia) {
    const double unit = std::sqrt(unit2_);
    std::vector<float> centroid(padded_to(TILE_ROWS, K_) * D_), panel(D_ * PANEL), own2(n_);
    int64_t n_present = 0;
    for (int64_t k = 0; k < K_; ++k) {
      if (p.count[k] == 0) continue;
      float* to = centroid.data() + n_present / TILE_ROWS * TILE_ROWS * D_ + n_present % TILE_ROWS;
      double squares = 0;
      for (int64_t d = 0; d < D_; ++d) {
        const double x = (sum[k * D_ + d] / static_cast<double>(p.count[k]) - centre_[d]) * unit;
        to[d * TILE_ROWS] = static_cast<float>(x);
        squares += x * x;
      }
      inertia -= squares * static_cast<double>(p.count[k]) / unit2_;
      norm2_of_[n_present] = static_cast<float>(squares);
      name_[n_present++] = static_cast<int32_t>(k);
    }
    bool has_changed = false;
    const auto take = [&](int64_t i, int32_t k) {
      const float* point = points_ + source_[i] * D_;
      for (int64_t d = 0; d < D_; ++d) sum[p.label[i] * D_ + d] -= point[d], sum[k * D_ + d] += point[d];
      --p.count[p.label[i]], ++p.count[k];
      group[source_[i]] = p.label[i] = k;
      has_changed = true;
    };
    for (int64_t i = 0; i < n_; i += PANEL) {
      const int64_t n_here = std::min(PANEL, n_ - i);
      float own[PANEL], norm2[PANEL];
      int32_t label[PANEL] = {};
      std::fill_n(own, PANEL, INF);
      lay_out_points(points_, &source_[i], n_here, D_, centre_, static_cast<float>(unit), panel.data(), norm2);
      for (int64_t j = 0; j < n_present; j += TILE_ROWS)
        dot_tile(centroid.data() + j * D_, std::min(TILE_ROWS, n_present - j), panel.data(), D_, &dot_[j * PANEL]);
      take_nearest(dot_.data(), norm2_of_.data(), name_.data(), n_present, own, label);
      for (int64_t c = 0; c < n_here; ++c) {
        own2[i + c] = own[c] + norm2[c];
        inertia += norm2[c] / unit2_;
        if (label[c] != p.label[i + c]) take(i + c, label[c]);
      }
    }
    for (int64_t k = 0; k < K_; ++k) {
      if (p.count[k]) continue;
      const int64_t far = std::max_element(own2.begin(), own2.end()) - own2.begin();
      if (!(own2[far] > 0)) break;
      own2[far] = 0;
      take(far, static_cast<int32_t>(k));
    }
    return has_changed;
  }

  void write() {
    const int64_t S = op_.S, keep = op_.keep;
    std::vector<std::pair<double, int64_t>> order;  // inertia, place
    for (size_t e = 0; e < found_.size(); ++e) order.emplace_back(found_[e].inertia / unit2_, e);
    std::sort(order.begin(), order.end());
    std::vector<std::pair<double, int64_t>> kept;  // one of each
    double last = 0, beyond = 0;  // beyond: what the projection does not see
    for (auto [inertia, e] : order) {
      if (!kept.empty() && inertia - last <= SAME * (last + beyond)) continue;
      if (static_cast<int64_t>(kept.size()) == keep) break;
      last = inertia;
      if (!kept.empty()) {
        kept.emplace_back(inertia + beyond, e);
        continue;
      }
      const auto [before, after] = finish(found_[e]);
      op_.origin[s_] = found_[e].origin;
      beyond = before - inertia;
      kept.emplace_back(after, e);
    }
    for (int64_t e = 0; e < keep; ++e) {
      const bool is_there = e < static_cast<int64_t>(kept.size());
      int64_t* label = op_.label + (e * S + s_) * N_;
      std::fill_n(label, N_, -1);
      op_.inertia[e * S + s_] = is_there ? kept[e].first : std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < n_ && is_there; ++i) label[source_[i]] = found_[kept[e].second].label[i];
    }
  }

  const KmeansSearch& op_;
  const int64_t s_, N_, D_, K_;
  const float* points_;
  int64_t M_ = 0, n_ = 0;
  double unit2_ = 1, scatter_ = 0;
  std::vector<float> frame_, projected_, own_rows_;  // the projection, and rows, where they are not the caller's
  const float* centre_ = nullptr;    // [D]
  std::vector<int64_t> source_;      // [n]: where the points stood
  const float* rows_ = nullptr;      // [n, M]
  std::unique_ptr<float[]> panels_;  // [n / PANEL, M, PANEL]
  std::vector<float> norm2_;         // [n]
  std::vector<int32_t> all_;         // [K]: 0, 1, ...
  // Scratch of assign: centroids side by side, their squared norms, products, which clusters are compared with and which
  // changed, and the points that do. Of moves: rows of some points, side by side or in panels.
  std::vector<float> centroids_, norm2_of_, dot_;
  std::vector<char> is_in_, changed_;
  std::vector<int32_t> name_;
  std::vector<float> side_, side_dot_, gathered_;
  std::vector<Partition> found_;
};

}  // namespace

void kmeans_search_cpu(const KmeansSearch& op, ParallelFor parallel_for) {
  for_each(parallel_for, op.S, [&](int64_t s) { Search(op, s).run(); });
}

}  // namespace clmfast
