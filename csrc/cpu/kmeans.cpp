// kmeans on the CPU, one restart of one set at a time or side by side.
//
// Bounds on distances (Elkan 2003; by group of centroids, as in Ding et al. 2015) tell which labels may have changed, so
// that most points of most iterations meet no centroid. Sums are exact (sums.h): a point that changes its cluster
// leaves the one and enters the other, and no order shows in a result.
#include "../kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "centroids.h"
#include "isa.h"
#include "pair.h"
#include "sums.h"
#include "uniform.h"

namespace clmfast {
namespace {

constexpr int64_t CHUNK = 256;      // points that one task labels
constexpr int64_t SUM_BLOCK = 128;  // coordinates that one task sums
constexpr float INF = std::numeric_limits<float>::infinity();

int64_t n_chunks(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

struct Run {
  int64_t s, restart;
  const float* points;                 // [N, D]
  std::vector<float> centroid, next;   // [K, D]
  Centroids packed;
  KnownSet known;                      // this set's part of what is known, or our own memory
  std::vector<int32_t> own_label;
  std::vector<float> own_floats;
  std::vector<double> own_sum;
  std::vector<int32_t> summed;         // [N]: the cluster whose sum a point is in, or -1
  std::vector<int64_t> count;          // [K]: points in each sum
  std::vector<int64_t> changed;        // points whose label is not that of the sum they are in
  std::vector<float> move, group_move; // [K], [GROUPS]: at least how far the centroids moved last
  std::vector<double> inertia;         // [n_chunks]
  int64_t n_finite = 0, n_iter = 0;
  double most_variance = 0;            // at least the mean over the coordinates of the variance
  double moved2 = 0;                   // of all centroids
  double bound = -1;                   // on moved2, once it is known

  const double* magic(const Kmeans& op) const { return known.sum + op.K * op.D; }
};

double uniform(const Run& run, int64_t seed, int64_t draw) {
  return clmfast::uniform(seed, run.s, run.restart, draw);
}

// Scattered rows come from a far cache: asking for them early hides the way.
constexpr int64_t AHEAD = 3;

void prefetch(const float* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(row + d);
}

bool is_fresh(const Run& run, int64_t i) { return run.known.within[i] == INF; }

std::vector<int64_t> finite_points(const Kmeans& op, const float* points) {
  std::vector<int64_t> finite;
  for (int64_t i = 0; i < op.N; ++i)
    if (is_finite_row(points + i * op.D, op.D)) finite.push_back(i);
  return finite;
}

// ---- start

constexpr int64_t WIDTH = 8;

// In one fixed order.
CLMFAST_BODY double total_body(const float* x, int64_t N) {
  double sum[WIDTH] = {};
  int64_t i = 0;
  for (; i + WIDTH <= N; i += WIDTH)
    for (int64_t l = 0; l < WIDTH; ++l) sum[l] += x[i + l];
  for (; i < N; ++i) sum[0] += x[i];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

CLMFAST_PER_ISA(double, total, (const float* x, int64_t N), (x, N))

// Greedy k-means++ on float32 distances. Points whose squares would leave float32 are scaled by a power of two first.
void start_plus_plus(const Kmeans& op, const std::vector<int64_t>& finite, Run& run) {
  const int64_t N = op.N, D = op.D, K = op.K, n_trials = 2 + static_cast<int64_t>(std::log(static_cast<double>(K)));
  const float* points = run.points;
  float reach = 0;
  for (int64_t i : finite) reach = std::max(reach, row_reach(points + i * D, D));
  std::vector<float> scaled;
  if (reach > 0 && (reach > 0x1p40f || reach < 0x1p-20f)) {
    const int exponent = -std::ilogb(reach);
    scaled.resize(N * D);
    for (int64_t i = 0; i < N * D; ++i) scaled[i] = std::ldexp(points[i], exponent);
    points = scaled.data();
  }
  // Not finite: at no distance from anything, so that none is ever drawn.
  std::vector<float> closest(N, 0.0f), least((n_trials + TRIALS - 1) / TRIALS * TRIALS * N);
  std::vector<int32_t> nearest(N);  // of the chosen
  for (int64_t i : finite) closest[i] = INF;
  std::vector<int64_t> chosen;
  auto measure = [&](const std::vector<int64_t>& trial) {
    const int64_t n = static_cast<int64_t>(trial.size()), n_chosen = static_cast<int64_t>(chosen.size());
    for (int64_t first = 0; first < n; first += TRIALS) {
      const float* row[TRIALS];
      std::vector<float> limit(n_chosen + 1, INF);
      for (int64_t t = 0; t < TRIALS; ++t) {
        row[t] = points + trial[std::min(first + t, n - 1)] * D;
        // Half the way to the trial, less what float32 may have got wrong.
        for (int64_t k = 0; k < n_chosen; ++k)
          limit[k] = std::min(limit[k], static_cast<float>(pair_dist2(points + chosen[k] * D, row[t], D) * (0.25 - 0x1p-5)));
      }
      if (n_chosen == 0) limit[0] = -1;
      least_dist2(points, N, D, row, closest.data(), nearest.data(), limit.data(), least.data() + first * N);
    }
  };
  auto choose = [&](int64_t i, const float* dist2) {
    const int32_t k = static_cast<int32_t>(chosen.size());
    for (int64_t e = 0; e < N; ++e) nearest[e] = dist2[e] < closest[e] ? k : nearest[e];
    std::copy_n(dist2, N, closest.data());
    chosen.push_back(i);
  };
  int64_t draw = 0;
  const int64_t n_finite = static_cast<int64_t>(finite.size());
  std::vector<int64_t> trial{finite[static_cast<int64_t>(uniform(run, op.seed, draw++) * n_finite)]};
  measure(trial);
  choose(trial[0], least.data());
  trial.resize(n_trials);
  double potential = total(closest.data(), N);

  while (static_cast<int64_t>(chosen.size()) < K) {
    if (potential == 0) {  // every point already lies on a centroid
      chosen.push_back(chosen.back());
      continue;
    }
    std::vector<double> target(n_trials);
    for (double& x : target) x = uniform(run, op.seed, draw++) * potential;
    std::fill(trial.begin(), trial.end(), -1);
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < N; ++i) {
      if (closest[i] == 0) continue;
      sum += closest[i];
      last = i;
      for (int64_t t = 0; t < n_trials; ++t)
        if (trial[t] < 0 && sum > target[t]) trial[t] = i;
    }
    for (int64_t& i : trial)
      if (i < 0) i = last;
    measure(trial);
    int64_t best = -1;
    for (int64_t t = 0; t < n_trials; ++t) {
      const double sum_t = total(least.data() + t * N, N);
      if (best < 0 || sum_t < potential) {
        best = t;
        potential = sum_t;
      }
    }
    choose(trial[best], least.data() + best * N);
  }
  for (int64_t k = 0; k < K; ++k) std::copy_n(run.points + chosen[k] * D, D, run.centroid.data() + k * D);
}

void start_random(const Kmeans& op, std::vector<int64_t> deck, Run& run) {
  const int64_t D = op.D, n_finite = static_cast<int64_t>(deck.size());
  for (int64_t k = 0; k < op.K; ++k) {
    if (k < n_finite) std::swap(deck[k], deck[k + static_cast<int64_t>(uniform(run, op.seed, k) * (n_finite - k))]);
    std::copy_n(run.points + deck[k % n_finite] * D, D, run.centroid.data() + k * D);
  }
}

void start_given(const Kmeans& op, Run& run) {
  const int64_t D = op.D;
  std::copy_n(op.init + run.s * op.K * D, op.K * D, run.centroid.data());
  for (int64_t k = 0; k < op.K; ++k) {
    if (is_finite_row(run.centroid.data() + k * D, D)) continue;
    std::vector<double> mean(D);
    const std::vector<int64_t> finite = finite_points(op, run.points);
    for (int64_t i : finite)
      for (int64_t d = 0; d < D; ++d) mean[d] += run.points[i * D + d];
    for (int64_t d = 0; d < D; ++d)
      run.centroid[k * D + d] = static_cast<float>(mean[d] / static_cast<double>(std::max<size_t>(finite.size(), 1)));
  }
}

// Points that left their place leave the sums as well.
void take_leave(const Kmeans& op, Run& run) {
  const int64_t D = op.D;
  run.summed.assign(run.known.label, run.known.label + op.N);
  run.count.assign(op.K, 0);
  for (int64_t i = 0; i < op.N; ++i) {
    int32_t& k = run.summed[i];
    if (is_fresh(run, i)) {
      if (k >= 0) add_point(run.known.point + i * D, run.magic(op), -1, 0, D, run.known.sum + k * D);
      if (run.known.point) std::copy_n(run.points + i * D, D, run.known.point + i * D);
      k = -1;
    }
    if (k >= 0) ++run.count[k];
  }
}

// Memory for a run, and what is known before it begins.
void prepare(const Kmeans& op, Run& run) {
  const int64_t N = op.N, D = op.D, K = op.K;
  run.points = op.points + run.s * N * D;
  run.centroid.resize(K * D);
  run.next.resize(K * D);
  run.move.resize(K);
  run.group_move.resize(GROUPS);
  run.inertia.resize(n_chunks(N));
  if (op.known) {
    run.known = op.known->set(run.s, D, K);
  } else {
    run.own_label.assign(N, -1);
    run.own_floats.resize(N * (1 + GROUPS) + n_reaches(N) * D);
    run.own_sum.resize((K + 1) * D);
    float* floats = run.own_floats.data();
    run.known = {run.own_label.data(), floats, floats + N, nullptr, floats + N * (1 + GROUPS), run.own_sum.data()};
    std::fill_n(run.known.within, N, INF);
  }
  take_leave(op, run);
}

void start(const Kmeans& op, Run& run) {
  prepare(op, run);
  if (op.init) return start_given(op, run);
  const std::vector<int64_t> finite = finite_points(op, run.points);
  if (finite.empty()) std::fill(run.centroid.begin(), run.centroid.end(), 0.0f);
  else if (op.start == KmeansStart::plus_plus) start_plus_plus(op, finite, run);
  else start_random(op, finite, run);
}

// ---- label

// Compares rows with all centroids.
void label_anew(const Kmeans&, Run& run, const int64_t* row, int64_t n) {
  int32_t label[CHUNK];
  float within[CHUNK], beyond[CHUNK * GROUPS];
  run.packed.nearest(run.points, row, n, nullptr, label, within, beyond);
  for (int64_t e = 0; e < n; ++e) {
    run.known.label[row[e]] = label[e];
    run.known.within[row[e]] = within[e];
    std::copy_n(beyond + e * GROUPS, GROUPS, run.known.beyond + row[e] * GROUPS);
  }
}

// The labels of the points that are new, all others being those of these centroids.
void label_fresh(const Kmeans& op, Run& run, int64_t chunk) {
  for (int64_t at = chunk * CHUNK; at < std::min(op.N, (chunk + 1) * CHUNK); at += REACH_ROWS) {
    int64_t row[REACH_ROWS], n = 0;
    const int64_t end = std::min(op.N, at + REACH_ROWS);
    for (int64_t i = at; i < end; ++i)
      if (is_fresh(run, i)) row[n++] = i;
    if (n == 0) continue;
    reach_of(run.points + at * op.D, end - at, op.D, run.known.reach + at / REACH_ROWS * op.D);
    label_anew(op, run, row, n);
  }
}

// Widens the bounds of n points by how far the centroids moved; bit g of near[i]: group g may have come nearer than the
// point's own centroid.
CLMFAST_BODY void widen_bounds_body(const int32_t* label, int64_t n, const float* move, const float* group_move,
                                    float* within, float* beyond, uint32_t* near) {
  uint32_t bit[GROUPS];
  for (int64_t g = 0; g < GROUPS; ++g) bit[g] = 1u << g;
  for (int64_t i = 0; i < n; ++i) {
    near[i] = 0;
    if (label[i] < 0) continue;
    const float own = (within[i] + move[label[i]]) * (1 + 0x1p-22f);
    within[i] = own;
    uint32_t groups = 0;
    for (int64_t g = 0; g < GROUPS; ++g) {
      const float other = (beyond[i * GROUPS + g] - group_move[g]) * (1 - 0x1p-22f);
      beyond[i * GROUPS + g] = other;
      groups |= own < other ? 0 : bit[g];
    }
    near[i] = groups;
  }
}

CLMFAST_PER_ISA(void, widen_bounds,
                (const int32_t* label, int64_t n, const float* move, const float* group_move, float* within,
                 float* beyond, uint32_t* near),
                (label, n, move, group_move, within, beyond, near))

// Labels the points of a chunk after the centroids moved.
void label_chunk(const Kmeans& op, Run& run, int64_t chunk) {
  // With more near groups than these four, all centroids at once cost less than one by one.
  auto is_few = [](uint32_t groups) {
    for (int e = 0; e < 4; ++e) groups &= groups - 1;
    return groups == 0;
  };
  uint32_t near[CHUNK];
  int64_t row[CHUNK], one_by_one[CHUNK], n_rows = 0, n_one_by_one = 0;
  const int64_t first = chunk * CHUNK, n = std::min(CHUNK, op.N - first), D = op.D;
  KnownSet& known = run.known;
  widen_bounds(known.label + first, n, run.move.data(), run.group_move.data(), known.within + first,
               known.beyond + first * GROUPS, near);
  for (int64_t e = 0; e < n; ++e) {
    if (near[e] == 0) continue;
    if (is_few(near[e])) one_by_one[n_one_by_one++] = first + e;
    else row[n_rows++] = first + e;
  }
  for (int64_t e = 0; e < n_one_by_one; ++e) {
    if (e + AHEAD < n_one_by_one) prefetch(run.points + one_by_one[e + AHEAD] * D, D);
    const int64_t i = one_by_one[e];
    run.packed.renew(run.points + i * D, near[i - first], known.label[i], known.within[i], known.beyond + i * GROUPS);
  }
  if (n_rows > 0) label_anew(op, run, row, n_rows);
}

// ---- move

// Chooses the quantum of the sums; where it is another, all points have to enter anew.
void set_quantum(const Kmeans& op, Run& run) {
  const int64_t D = op.D;
  std::vector<float> reach(D);
  for (int64_t e = 0; e < n_reaches(op.N); ++e)
    for (int64_t d = 0; d < D; ++d) reach[d] = std::max(reach[d], run.known.reach[e * D + d]);
  run.n_finite = op.N - std::count(run.known.label, run.known.label + op.N, -1);
  std::vector<double> magic(D);
  find_magic(reach.data(), D, run.n_finite, magic.data());
  double squares = 0;
  for (float x : reach) squares += static_cast<double>(x) * x;
  run.most_variance = squares / static_cast<double>(std::max<int64_t>(D, 1));
  if (std::equal(magic.begin(), magic.end(), run.magic(op))) return;
  std::fill_n(run.known.sum, op.K * D, 0.0);
  std::copy(magic.begin(), magic.end(), run.known.sum + op.K * D);
  std::fill(run.summed.begin(), run.summed.end(), -1);
  std::fill(run.count.begin(), run.count.end(), 0);
}

// Brings the sums up to date with the labels.
void sum_changed(const Kmeans& op, Run& run, ParallelFor parallel_for) {
  const int64_t D = op.D;
  run.changed.clear();
  for (int64_t i = 0; i < op.N; ++i)
    if (run.known.label[i] != run.summed[i]) run.changed.push_back(i);
  for_each(parallel_for, (D + SUM_BLOCK - 1) / SUM_BLOCK, [&](int64_t block) {
    const int64_t first = block * SUM_BLOCK, last = std::min(D, first + SUM_BLOCK);
    const int64_t n = static_cast<int64_t>(run.changed.size());
    for (int64_t e = 0; e < n; ++e) {
      if (e + AHEAD < n) prefetch(run.points + run.changed[e + AHEAD] * D + first, last - first);
      const int64_t i = run.changed[e];
      const int32_t from = run.summed[i], to = run.known.label[i];
      if (from >= 0) add_point(run.points + i * D, run.magic(op), -1, first, last, run.known.sum + from * D);
      if (to >= 0) add_point(run.points + i * D, run.magic(op), 1, first, last, run.known.sum + to * D);
    }
  });
  for (int64_t i : run.changed) {
    const int32_t from = run.summed[i], to = run.known.label[i];
    if (from >= 0) --run.count[from];
    if (to >= 0) ++run.count[to];
    run.summed[i] = to;
  }
}

// A point that an empty cluster takes over from another, until the centroids have moved.
struct Taken {
  int64_t i;
  int32_t from, to;
};

// The points farthest from their centroids, one for each empty cluster.
std::vector<Taken> take_over(const Kmeans& op, const Run& run) {
  std::vector<int32_t> empty;
  for (int64_t k = 0; k < op.K; ++k)
    if (run.count[k] == 0) empty.push_back(static_cast<int32_t>(k));
  if (empty.empty()) return {};
  std::vector<std::pair<double, int64_t>> far;  // (-dist2, point): the farthest first, of equals the smaller index
  std::vector<double> dist2(op.N);
  dist2_to_groups(run.points, 0, op.N, op.D, run.known.label, run.centroid.data(), dist2.data());
  for (int64_t i = 0; i < op.N; ++i)
    if (dist2[i] > 0) far.emplace_back(-dist2[i], i);
  const size_t n = std::min(far.size(), empty.size());
  std::partial_sort(far.begin(), far.begin() + n, far.end());
  std::vector<Taken> taken;
  for (size_t e = 0; e < n; ++e) taken.push_back({far[e].second, run.known.label[far[e].second], empty[e]});
  return taken;
}

void move_points(const Kmeans& op, Run& run, const std::vector<Taken>& taken, int64_t sign) {
  for (const Taken& t : taken) {
    const float* point = run.points + t.i * op.D;
    add_point(point, run.magic(op), static_cast<double>(-sign), 0, op.D, run.known.sum + t.from * op.D);
    add_point(point, run.magic(op), static_cast<double>(sign), 0, op.D, run.known.sum + t.to * op.D);
    run.count[t.from] -= sign;
    run.count[t.to] += sign;
  }
}

void move_centroids(const Kmeans& op, Run& run) {
  const int64_t D = op.D;
  run.moved2 = 0;
  std::fill(run.group_move.begin(), run.group_move.end(), 0.0f);
  for (int64_t k = 0; k < op.K; ++k) {
    const double n = static_cast<double>(run.count[k]);
    for (int64_t d = 0; d < D; ++d)
      run.next[k * D + d] = n > 0 ? static_cast<float>(run.known.sum[k * D + d] / n) : run.centroid[k * D + d];
    const double move2 = pair_dist2(run.centroid.data() + k * D, run.next.data() + k * D, D);
    run.moved2 += move2;
    run.move[k] = move2 > 0 ? static_cast<float>(std::sqrt(move2) * (1 + 0x1p-20) + 0x1p-120) : 0;
    run.group_move[k % GROUPS] = std::max(run.group_move[k % GROUPS], run.move[k]);
  }
  std::swap(run.centroid, run.next);
}

// ---- the whole

// The mean over the coordinates of the variance of the points.
double variance(const Kmeans& op, const Run& run) {
  const int64_t D = op.D;
  const double n = static_cast<double>(std::max<int64_t>(run.n_finite, 1));
  std::vector<double> mean(D);
  for (int64_t i = 0; i < op.K * D; ++i) mean[i % D] += run.known.sum[i] / n;
  const std::vector<float> centre(mean.begin(), mean.end());
  double squares = 0;
  for (int64_t i = 0; i < op.N; ++i)
    if (run.known.label[i] >= 0) squares += pair_dist2(run.points + i * D, centre.data(), D);
  squares /= n;
  for (int64_t d = 0; d < D; ++d) squares -= (mean[d] - centre[d]) * (mean[d] - centre[d]);
  return std::max(squares, 0.0) / static_cast<double>(std::max<int64_t>(D, 1));
}

// Did the centroids move by more than tol? Mostly an upper bound of it is enough to tell, and saves a pass over the
// points.
bool has_moved(const Kmeans& op, Run& run) {
  if (run.moved2 > op.tol * run.most_variance) return true;
  if (run.bound < 0) run.bound = op.tol * variance(op, run);
  return run.moved2 > run.bound;
}

void sum_inertia(const Kmeans& op, Run& run, int64_t chunk) {
  const int64_t first = chunk * CHUNK, n = std::min(CHUNK, op.N - first);
  double dist2[CHUNK], sum = 0;
  dist2_to_groups(run.points, first, n, op.D, run.known.label + first, run.centroid.data(), dist2);
  for (int64_t e = 0; e < n; ++e) sum += dist2[e];
  run.inertia[chunk] = sum;
}

// One restart of one set, from its start to the end.
void lloyd(const Kmeans& op, Run& run, ParallelFor parallel_for) {
  auto label = [&](auto&& one_chunk) {
    run.packed.pack(run.centroid.data(), op.K, op.D);
    for_each(parallel_for, n_chunks(op.N), [&](int64_t chunk) { one_chunk(op, run, chunk); });
  };
  label(label_fresh);
  set_quantum(op, run);
  bool is_consistent = false;  // is label that of centroid?
  for (bool is_active = true; is_active;) {
    sum_changed(op, run, parallel_for);
    // The first labels are new, also where they were known.
    const bool has_changed = run.n_iter == 0 ? run.n_finite > 0 : !run.changed.empty();
    const std::vector<Taken> taken = take_over(op, run);
    move_points(op, run, taken, 1);
    move_centroids(op, run);
    move_points(op, run, taken, -1);
    ++run.n_iter;
    // Unchanged labels have the same means as before, so the centroids fit, unless an empty cluster took a point.
    is_consistent = !has_changed && taken.empty();
    is_active = has_changed && run.n_iter < op.max_iter && has_moved(op, run);
    if (is_active) label(label_chunk);
  }
  if (is_consistent) {
    for_each(parallel_for, n_chunks(op.N), [&](int64_t chunk) { sum_inertia(op, run, chunk); });
    return;
  }
  label([](const Kmeans& op, Run& run, int64_t chunk) {
    label_chunk(op, run, chunk);
    sum_inertia(op, run, chunk);
  });
  if (op.known) sum_changed(op, run, parallel_for);
}

double inertia_of(const Run& run) {
  double inertia = 0;
  for (double x : run.inertia) inertia += x;
  return inertia;
}

// ---- moves: a cluster is split, two others are merged

struct Split {
  double worth = 0;  // inertia that it saves
  std::vector<float> a, b;
};

// 2-means of the points of one cluster.
Split split(const Kmeans& op, const Run& run, const std::vector<int64_t>& member, const float* centroid) {
  const int64_t D = op.D, n = static_cast<int64_t>(member.size());
  const auto point = [&](int64_t e) { return run.points + member[e] * D; };
  const auto farthest = [&](const float* from) {
    int64_t far = 0;
    double most = -1;
    for (int64_t e = 0; e < n; ++e) {
      const double dist2 = pair_dist2(point(e), from, D);
      if (dist2 > most) most = dist2, far = e;
    }
    return point(far);
  };
  if (n < 2) return {};
  const float* first = farthest(centroid);
  const float* second = farthest(first);
  std::vector<float> a(first, first + D), b(second, second + D);
  std::vector<char> is_a(n), was_a;
  int64_t n_a = 0;
  for (int64_t i = 0; i < SPLIT_ITERATIONS; ++i) {
    n_a = 0;
    for (int64_t e = 0; e < n; ++e) {
      is_a[e] = pair_dist2(point(e), a.data(), D) <= pair_dist2(point(e), b.data(), D);
      n_a += is_a[e];
    }
    if (n_a == 0 || n_a == n) return {};  // equal points
    if (is_a == was_a) break;
    was_a = is_a;
    std::vector<double> sum_a(D), sum_b(D);
    for (int64_t e = 0; e < n; ++e) {
      double* sum = is_a[e] ? sum_a.data() : sum_b.data();
      for (int64_t d = 0; d < D; ++d) sum[d] += point(e)[d];
    }
    for (int64_t d = 0; d < D; ++d) {
      a[d] = static_cast<float>(sum_a[d] / static_cast<double>(n_a));
      b[d] = static_cast<float>(sum_b[d] / static_cast<double>(n - n_a));
    }
  }
  const double worth = static_cast<double>(n_a) * static_cast<double>(n - n_a) / static_cast<double>(n);
  return {worth * pair_dist2(a.data(), b.data(), D), std::move(a), std::move(b)};
}

// Cluster `freed` joins `into`, and takes one half of `split`.
struct Move {
  double worth;
  int64_t split, into, freed;
};

// The moves of one round, the most promising first.
std::vector<Move> moves_of(const Kmeans& op, const Run& run, const std::vector<int64_t>& count,
                           const std::vector<Split>& splits) {
  std::vector<Move> merges, moves;
  for (int64_t i = 0; i < op.K; ++i) {
    for (int64_t j = i + 1; j < op.K; ++j) {
      const double n = static_cast<double>(count[i] + count[j]);
      const double weight = n > 0 ? static_cast<double>(count[i]) * static_cast<double>(count[j]) / n : 0;
      const float* centroid = run.centroid.data();
      merges.push_back({weight * pair_dist2(centroid + i * op.D, centroid + j * op.D, op.D), -1, i, j});
    }
  }
  const auto cheaper = [](const Move& a, const Move& b) { return a.worth < b.worth; };
  const auto better = [](const Move& a, const Move& b) { return a.worth > b.worth; };
  std::stable_sort(merges.begin(), merges.end(), cheaper);
  for (int64_t k = 0; k < op.K; ++k) {
    if (splits[k].a.empty()) continue;
    const auto without_k = [k](const Move& m) { return m.into != k && m.freed != k; };
    const auto merge = std::find_if(merges.begin(), merges.end(), without_k);
    if (merge != merges.end()) moves.push_back({splits[k].worth - merge->worth, k, merge->into, merge->freed});
  }
  std::stable_sort(moves.begin(), moves.end(), better);
  if (moves.size() > MOVES_PER_ROUND) moves.resize(MOVES_PER_ROUND);
  return moves;
}

void improve(const Kmeans& op, int64_t n_moves, Run& run, ParallelFor parallel_for) {
  const int64_t D = op.D;
  Kmeans few = op;
  few.max_iter = MOVE_ITERATIONS;
  double least = inertia_of(run);
  int64_t n_left = n_moves;
  bool has_moved_once = false;
  const auto begin = [&](std::vector<float> centroid) {
    Run begun;
    begun.s = run.s, begun.restart = run.restart;
    prepare(op, begun);
    begun.centroid = std::move(centroid);
    return begun;
  };
  for (bool is_active = n_moves > 0; is_active;) {
    std::vector<std::vector<int64_t>> members(op.K);
    for (int64_t i = 0; i < op.N; ++i)
      if (run.known.label[i] >= 0) members[run.known.label[i]].push_back(i);
    std::vector<Split> splits(op.K);
    std::vector<int64_t> count(op.K);
    for_each(parallel_for, op.K, [&](int64_t k) {
      count[k] = static_cast<int64_t>(members[k].size());
      splits[k] = split(op, run, members[k], run.centroid.data() + k * D);
    });
    is_active = false;
    for (const Move& move : moves_of(op, run, count, splits)) {
      if (n_left-- == 0) break;
      std::vector<float> centroid = run.centroid;
      float *into = &centroid[move.into * D], *freed = &centroid[move.freed * D];
      const double n_into = static_cast<double>(count[move.into]), n_freed = static_cast<double>(count[move.freed]);
      for (int64_t d = 0; d < D && n_into + n_freed > 0; ++d)
        into[d] = static_cast<float>((n_into * into[d] + n_freed * freed[d]) / (n_into + n_freed));
      std::copy_n(splits[move.split].a.data(), D, &centroid[move.split * D]);
      std::copy_n(splits[move.split].b.data(), D, freed);
      Run trial = begin(std::move(centroid));
      lloyd(few, trial, parallel_for);
      const double inertia = inertia_of(trial);
      if (!(inertia < least)) continue;
      least = inertia;
      trial.n_iter += run.n_iter;
      run = std::move(trial);
      is_active = has_moved_once = true;
      break;
    }
  }
  if (!has_moved_once) return;
  Run last = begin(run.centroid);
  lloyd(op, last, parallel_for);
  last.n_iter += run.n_iter;
  run = std::move(last);
}

void write_best(const Kmeans& op, int64_t s, const std::vector<Run>& runs) {
  const Run* best = nullptr;
  double least = 0;
  for (int64_t restart = 0; restart < op.n_init; ++restart) {
    const Run& run = runs[s * op.n_init + restart];
    const double inertia = inertia_of(run);
    if (best && !(inertia < least)) continue;
    best = &run;
    least = inertia;
  }
  std::copy_n(best->known.label, op.N, op.label + s * op.N);
  std::copy(best->centroid.begin(), best->centroid.end(), op.centroid + s * op.K * op.D);
  op.inertia[s] = least;
  op.n_iter[s] = best->n_iter;
}

}  // namespace

void kmeans_cpu(const Kmeans& op, int64_t moves, ParallelFor parallel_for) {
  std::vector<Run> runs(op.S * op.n_init);
  const int64_t n_runs = static_cast<int64_t>(runs.size());
  for (int64_t i = 0; i < n_runs; ++i) runs[i].s = i / op.n_init, runs[i].restart = i % op.n_init;
  // Many runs: each is a task, so that its points stay in a core's cache. Few: their phases are split.
  constexpr int64_t MANY = 8;
  if (n_runs >= MANY) {
    for_each(parallel_for, n_runs, [&](int64_t i) {
      start(op, runs[i]);
      lloyd(op, runs[i], in_line);
      improve(op, moves, runs[i], in_line);
    });
  } else {
    for_each(parallel_for, n_runs, [&](int64_t i) { start(op, runs[i]); });
    for (Run& run : runs) {
      lloyd(op, run, parallel_for);
      improve(op, moves, run, parallel_for);
    }
  }
  for (int64_t s = 0; s < op.S; ++s) write_best(op, s, runs);
}

}  // namespace clmfast
