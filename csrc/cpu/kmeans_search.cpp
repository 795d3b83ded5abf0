// kmeans_search on the CPU: one set is one task. In the projection everything is small and dense, so that nothing is
// kept between iterations but labels.
#include "../kmeans_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "grid.h"
#include "../kmeans.h"
#include "isa.h"
#include "pair.h"
#include "projection.h"
#include "sums.h"
#include "tile.h"
#include "uniform.h"
#include "vector.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double MARGIN = 0.01, SAME = 1e-4;
constexpr int64_t WARM_ITERATIONS = 2, COLD_ITERATIONS = 20, MOVE_ITERATIONS = 3, SPLIT_ITERATIONS = 3;

// A partition of the points in the projection.
struct Partition {
  std::vector<int32_t> label;   // [n]
  std::vector<float> own2;      // [n] dist2 to the centroid that the label was given by
  std::vector<float> sum;       // [K, M]
  std::vector<int64_t> count;   // [K]
  double inertia = INF;
  int64_t origin = 0;  // the start that it comes from: known ones, then cold ones
};

// ---- inner loops

// best[c], label[c] of PANEL points: the smallest norm2[k] - 2 dot[k][c], of centroids first, ..., first + n - 1.
CLMFAST_BODY void nearer_body(const float* dot, const float* norm2, int64_t first, int64_t n, float* best,
                              int32_t* label) {
  for (int64_t k = 0; k < n; ++k)
    for (int64_t c = 0; c < PANEL; ++c) {
      const float x = norm2[k] - 2 * dot[k * PANEL + c];
      label[c] = x < best[c] ? static_cast<int32_t>(first + k) : label[c];
      best[c] = x < best[c] ? x : best[c];
    }
}

CLMFAST_PER_ISA(void, nearer,
                (const float* dot, const float* norm2, int64_t first, int64_t n, float* best, int32_t* label),
                (dot, norm2, first, n, best, label))

// sum[label[i]] += row i, for rows of M = a multiple of LANES floats; labels that are none are left out.
CLMFAST_BODY void sum_rows_body(const float* row, const int32_t* label, int64_t n, int64_t M, float* sum) {
  for (int64_t i = 0; i < n; ++i) {
    if (label[i] < 0) continue;
    float* to = sum + label[i] * M;
    for (int64_t m = 0; m < M; m += LANES) store<float>(to + m, load(to + m) + load(row + i * M + m));
  }
}

CLMFAST_PER_ISA(void, sum_rows, (const float* row, const int32_t* label, int64_t n, int64_t M, float* sum),
                (row, label, n, M, sum))

// dist2[e] of rows member[e] from a point [M].
CLMFAST_BODY void dist2_from_body(const float* row, const int32_t* member, int64_t n, int64_t M, const float* from,
                                  float* dist2) {
  for (int64_t e = 0; e < n; ++e) {
    const float* at = row + member[e] * M;
    Vector<float> squares = {};
    for (int64_t m = 0; m < M; m += LANES) {
      const Vector<float> x = load(at + m) - load(from + m);
      squares += x * x;
    }
    dist2[e] = sum_of<float>(squares);
  }
}

CLMFAST_PER_ISA(void, dist2_from,
                (const float* row, const int32_t* member, int64_t n, int64_t M, const float* from, float* dist2),
                (row, member, n, M, from, dist2))

// Which rows member[e] are nearer to a than to b, and the sum of those; returns their number.
CLMFAST_BODY int64_t sum_side_body(const float* row, const int32_t* member, int64_t n, int64_t M, const float* a,
                                   const float* b, float* sum, char* is_a) {
  // |x - a|^2 < |x - b|^2 where x.(a - b) > (|a|^2 - |b|^2) / 2
  float limit = 0;
  for (int64_t m = 0; m < M; ++m) limit += (a[m] * a[m] - b[m] * b[m]) / 2, sum[m] = 0;
  int64_t n_a = 0;
  for (int64_t e = 0; e < n; ++e) {
    const float* at = row + member[e] * M;
    Vector<float> dot = {};
    for (int64_t m = 0; m < M; m += LANES) dot += load(at + m) * (load(a + m) - load(b + m));
    is_a[e] = sum_of<float>(dot) >= limit;
    if (!is_a[e]) continue;
    ++n_a;
    for (int64_t m = 0; m < M; m += LANES) store<float>(sum + m, load(sum + m) + load(at + m));
  }
  return n_a;
}

CLMFAST_PER_ISA(int64_t, sum_side,
                (const float* row, const int32_t* member, int64_t n, int64_t M, const float* a, const float* b,
                 float* sum, char* is_a),
                (row, member, n, M, a, b, sum, is_a))

double dot_of(const float* a, const float* b, int64_t M) {
  double sum = 0;
  for (int64_t m = 0; m < M; ++m) sum += static_cast<double>(a[m]) * b[m];
  return sum;
}

// ---- the search in one set

struct Split {
  double worth = 0;            // inertia that it saves
  std::vector<int32_t> other;  // points of the second half
};

class Search {
 public:
  Search(const KmeansSearch& op, int64_t s)
      : op_(op), s_(s), K_(op.K), points_(op.points + s * op.N * op.D), projection_(points_, op.N, op.D, op.K + 4),
        M_(projection_.width()), n_(projection_.n()) {}

  void run() {
    std::fill_n(op_.centroid + s_ * K_ * op_.D, K_ * op_.D, 0.0f);
    op_.origin[s_] = 0;
    if (n_ == 0) return write();
    for (int64_t p = 0; p < op_.P; ++p) begin(go_on(op_.known + (p * op_.S + s_) * op_.N));
    if (op_.P > 0 && op_.moves > 0) {
      const int64_t best = least(found_);
      move(found_[best]);
      if (op_.P > 1) move(found_[(best + 1 + (op_.seed % (op_.P - 1) + op_.P - 1) % (op_.P - 1)) % op_.P]);
    }
    for (int64_t restart = 0; restart < op_.n_cold[s_]; ++restart) {
      begin(cold(restart));
      move(found_.back());
    }
    write();
  }

 private:
  void begin(Partition p) {
    p.origin = static_cast<int64_t>(found_.size());
    found_.push_back(std::move(p));
  }

  static int64_t least(const std::vector<Partition>& all) {
    const auto lower = [](const Partition& a, const Partition& b) { return a.inertia < b.inertia; };
    return std::min_element(all.begin(), all.end(), lower) - all.begin();
  }

  const float* row(int64_t i) const { return projection_.rows() + i * M_; }

  // ---- Lloyd's algorithm

  // Sums, counts and inertia of the labels that are there.
  void measure(Partition& p) const {
    p.sum.assign(K_ * M_, 0);
    p.count.assign(K_, 0);
    sum_rows(projection_.rows(), p.label.data(), n_, M_, p.sum.data());
    for (int32_t k : p.label)
      if (k >= 0) ++p.count[k];
    p.inertia = projection_.scatter();
    for (int64_t k = 0; k < K_; ++k)
      if (p.count[k]) p.inertia -= dot_of(&p.sum[k * M_], &p.sum[k * M_], M_) / static_cast<double>(p.count[k]);
    p.inertia /= projection_.unit2();
  }

  // The label of each point is the nearest of the centroids; returns whether any changed.
  bool assign(Partition& p) const {
    const int64_t n_rows = (K_ + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    std::vector<float> centroid(n_rows * M_), norm2(n_rows, INF);
    for (int64_t k = 0; k < K_; ++k) {
      if (p.count[k] == 0) continue;
      const float scale = 1 / static_cast<float>(p.count[k]);
      float* to = &centroid[k / TILE_ROWS * TILE_ROWS * M_ + k % TILE_ROWS];
      double squares = 0;
      for (int64_t m = 0; m < M_; ++m) {
        const float x = p.sum[k * M_ + m] * scale;
        to[m * TILE_ROWS] = x;
        squares += static_cast<double>(x) * x;
      }
      norm2[k] = static_cast<float>(squares);
    }
    bool has_changed = false;
    p.own2.resize(n_);
    float dot[TILE_ROWS * PANEL];
    for (int64_t i = 0; i < n_; i += PANEL) {
      float best[PANEL];
      int32_t label[PANEL] = {};
      std::fill_n(best, PANEL, INF);
      for (int64_t k = 0; k < K_; k += TILE_ROWS) {
        const int64_t n = std::min(TILE_ROWS, K_ - k);
        dot_tile(&centroid[k * M_], n, projection_.panels() + i * M_, M_, dot);
        nearer(dot, &norm2[k], k, n, best, label);
      }
      for (int64_t c = 0; c < std::min(PANEL, n_ - i); ++c) {
        p.own2[i + c] = best[c] + projection_.norm2()[i + c];
        has_changed |= p.label[i + c] != label[c];
        p.label[i + c] = label[c];
      }
    }
    return has_changed;
  }

  // Clusters without points take over those farthest from their centroids, one each.
  void fill_empty(Partition& p) const {
    std::vector<int64_t> count(K_);
    for (int32_t k : p.label) ++count[k];
    for (int64_t k = 0; k < K_; ++k) {
      if (count[k]) continue;
      const int64_t far = std::max_element(p.own2.begin(), p.own2.end()) - p.own2.begin();
      if (!(p.own2[far] > 0)) return;
      p.own2[far] = 0;
      p.label[far] = static_cast<int32_t>(k);
    }
  }

  void lloyd(Partition& p, int64_t max_iter) const {
    measure(p);
    for (int64_t i = 0; i < max_iter && assign(p); ++i) {
      fill_empty(p);
      measure(p);
    }
  }

  Partition go_on(const int64_t* known) const {
    Partition p;
    p.label.resize(n_);
    bool has_any = false;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t k = known[projection_.source()[i]];
      p.label[i] = 0 <= k && k < K_ ? static_cast<int32_t>(k) : -1;
      has_any |= p.label[i] >= 0;
    }
    if (!has_any) std::fill(p.label.begin(), p.label.end(), 0);
    lloyd(p, WARM_ITERATIONS);
    return p;
  }

  // Greedy k-means++ (Arthur & Vassilvitskii 2007), then Lloyd's algorithm.
  Partition cold(int64_t restart) const {
    const int64_t n_trials = std::min<int64_t>(2 + static_cast<int64_t>(std::log(static_cast<double>(K_))), TILE_ROWS);
    Partition p;
    p.label.assign(n_, 0);
    std::vector<float> closest(n_, INF), least(n_trials * n_), rows(TILE_ROWS * M_);
    int64_t draw = 0;
    std::vector<int64_t> trial{static_cast<int64_t>(uniform(op_.seed, s_, restart, draw++) * static_cast<double>(n_))};
    for (int64_t k = 0; k < K_; ++k) {
      if (k > 0) {
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
      std::vector<float> norm2(n);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t m = 0; m < M_; ++m) rows[m * TILE_ROWS + t] = row(trial[t])[m];
        norm2[t] = projection_.norm2()[trial[t]];
      }
      std::vector<double> sum(n);
      float dot[TILE_ROWS * PANEL];
      for (int64_t i = 0; i < n_; i += PANEL) {
        dot_tile(rows.data(), n, projection_.panels() + i * M_, M_, dot);
        for (int64_t t = 0; t < n; ++t)
          for (int64_t c = 0; c < std::min(PANEL, n_ - i); ++c) {
            const float dist2 = std::max(0.0f, norm2[t] + projection_.norm2()[i + c] - 2 * dot[t * PANEL + c]);
            least[t * n_ + i + c] = std::min(closest[i + c], dist2);
            sum[t] += least[t * n_ + i + c];
          }
      }
      const int64_t best = std::min_element(sum.begin(), sum.end()) - sum.begin();
      for (int64_t i = 0; i < n_; ++i)
        if (least[best * n_ + i] < closest[i]) p.label[i] = static_cast<int32_t>(k);
      std::copy_n(&least[best * n_], n_, closest.data());
    }
    lloyd(p, COLD_ITERATIONS);
    return p;
  }

  // ---- moves

  // Cluster k of points `member` in two.
  Split split(const Partition& p, int64_t k, const std::vector<int32_t>& member) const {
    const int64_t n = static_cast<int64_t>(member.size());
    if (n < 2) return {};
    std::vector<float> dist2(n), a(M_), b(M_), sum(M_), all(p.sum.begin() + k * M_, p.sum.begin() + (k + 1) * M_);
    for (int64_t m = 0; m < M_; ++m) a[m] = all[m] / static_cast<float>(n);
    for (std::vector<float>* to : {&a, &b}) {
      dist2_from(projection_.rows(), member.data(), n, M_, a.data(), dist2.data());
      std::copy_n(row(member[std::max_element(dist2.begin(), dist2.end()) - dist2.begin()]), M_, to->begin());
    }
    std::vector<char> is_a(n), was_a;
    int64_t n_a = 0;
    for (int64_t i = 0; i < SPLIT_ITERATIONS; ++i) {
      n_a = sum_side(projection_.rows(), member.data(), n, M_, a.data(), b.data(), sum.data(), is_a.data());
      if (n_a == 0 || n_a == n) return {};  // equal points
      for (int64_t m = 0; m < M_; ++m) {
        a[m] = sum[m] / static_cast<float>(n_a);
        b[m] = (all[m] - sum[m]) / static_cast<float>(n - n_a);
      }
      if (is_a == was_a) break;
      was_a = is_a;
    }
    Split found;
    double dist2_ab = 0;
    for (int64_t m = 0; m < M_; ++m) dist2_ab += (a[m] - b[m]) * (a[m] - b[m]);
    found.worth = static_cast<double>(n_a) * static_cast<double>(n - n_a) / static_cast<double>(n) * dist2_ab;
    for (int64_t e = 0; e < n; ++e)
      if (!is_a[e]) found.other.push_back(member[e]);
    return found;
  }

  // What merging two clusters costs.
  double cost(const Partition& p, int64_t i, int64_t j) const {
    const double n_i = static_cast<double>(p.count[i]), n_j = static_cast<double>(p.count[j]);
    if (n_i == 0 || n_j == 0) return 0;
    double dist2 = 0;
    for (int64_t m = 0; m < M_; ++m) {
      const double x = p.sum[i * M_ + m] / n_i - p.sum[j * M_ + m] / n_j;
      dist2 += x * x;
    }
    return n_i * n_j / (n_i + n_j) * dist2;
  }

  void move(Partition& p) const {
    for (int64_t i = 0; i < op_.moves && K_ > 2; ++i) {
      std::vector<std::vector<int32_t>> members(K_);
      for (int64_t e = 0; e < n_; ++e) members[p.label[e]].push_back(static_cast<int32_t>(e));
      Split best;
      int64_t of = 0, into = -1, freed = -1;
      for (int64_t k = 0; k < K_; ++k) {
        Split found = split(p, k, members[k]);
        if (found.worth > best.worth) best = std::move(found), of = k;
      }
      if (best.other.empty()) return;
      double least = std::numeric_limits<double>::infinity();
      for (int64_t a = 0; a < K_; ++a)
        for (int64_t b = a + 1; b < K_; ++b) {
          if (a == of || b == of) continue;
          const double x = cost(p, a, b);
          if (x < least) least = x, into = a, freed = b;
        }
      Partition trial;
      trial.label = p.label, trial.origin = p.origin;
      for (int32_t e : members[freed]) trial.label[e] = static_cast<int32_t>(into);
      for (int32_t e : best.other) trial.label[e] = static_cast<int32_t>(freed);
      lloyd(trial, MOVE_ITERATIONS);
      if (!(trial.inertia < p.inertia)) return;
      p = std::move(trial);
    }
  }

  // ---- the end

  double full_inertia(const Partition& p, float* centroid) const {
    const int64_t N = op_.N, D = op_.D;
    std::vector<int32_t> group(N, -1);
    for (int64_t i = 0; i < n_; ++i) group[projection_.source()[i]] = p.label[i];
    std::vector<double> sum(K_ * D);
    sum_groups(points_, N, D, group.data(), sum.data());
    double between = 0;
    for (int64_t k = 0; k < K_; ++k) {
      const double n = static_cast<double>(p.count[k]);
      for (int64_t d = 0; d < D; ++d) {
        const double mean = projection_.mean()[d], x = n > 0 ? sum[k * D + d] / n - mean : 0;
        between += n * x * x;
        if (centroid) centroid[k * D + d] = n > 0 ? static_cast<float>(x + mean) : std::nanf("");
      }
    }
    return projection_.full_scatter() - between;
  }

  void write() {
    const int64_t S = op_.S, N = op_.N, keep = op_.keep;
    std::vector<std::pair<double, int64_t>> order;  // inertia, place
    for (size_t e = 0; e < found_.size(); ++e) order.emplace_back(found_[e].inertia, e);
    std::sort(order.begin(), order.end());
    // One of each, and in all dimensions.
    std::vector<std::pair<double, int64_t>> kept;
    double last = -1, beyond = 0;
    for (auto [inertia, e] : order) {
      if (!kept.empty() && inertia - last <= SAME * (last + beyond)) continue;
      if (static_cast<int64_t>(kept.size()) == keep) break;
      last = inertia;
      const bool is_close = kept.empty() || inertia + beyond <= (1 + MARGIN) * (order[0].first + beyond);
      const double full = is_close ? full_inertia(found_[e], nullptr) : inertia + beyond;
      if (kept.empty()) beyond = full - inertia;
      kept.emplace_back(full, e);
    }
    std::sort(kept.begin(), kept.end());
    for (int64_t e = 0; e < keep; ++e) {
      const bool is_there = e < static_cast<int64_t>(kept.size());
      int64_t* label = op_.label + (e * S + s_) * N;
      std::fill_n(label, N, -1);
      op_.inertia[e * S + s_] = is_there ? kept[e].first : std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < n_ && is_there; ++i) label[projection_.source()[i]] = found_[kept[e].second].label[i];
    }
    if (kept.empty()) return;
    op_.origin[s_] = found_[kept[0].second].origin;
    full_inertia(found_[kept[0].second], op_.centroid + s_ * K_ * op_.D);
  }

  const KmeansSearch& op_;
  const int64_t s_, K_;
  const float* points_;
  const Projection projection_;
  const int64_t M_, n_;
  std::vector<Partition> found_;
};

}  // namespace

void kmeans_search_cpu(const KmeansSearch& op, ParallelFor parallel_for) {
  for_each(parallel_for, op.S, [&](int64_t s) { Search(op, s).run(); });
  const std::vector<float> init(op.centroid, op.centroid + op.S * op.K * op.D);
  Kmeans last{};
  last.points = op.points, last.init = init.data();
  last.S = op.S, last.N = op.N, last.D = op.D, last.K = op.K;
  last.start = KmeansStart::plus_plus, last.n_init = 1, last.max_iter = op.max_iter, last.tol = op.tol, last.seed = op.seed;
  last.label = op.label, last.centroid = op.centroid, last.inertia = op.inertia, last.n_iter = op.n_iter;
  kmeans_cpu(last, parallel_for);
}

}  // namespace clmfast
