// Lloyd's algorithm on the CPU.
//
// Bounds on distances (Elkan 2003; by group of centroids, as in Ding et al. 2015) tell which labels may have changed, so
// that most points of most iterations meet no centroid. Sums are exact (sums.h): a point that changes its cluster
// leaves the one and enters the other, and no order shows in a result.
#include <cmath>
#include <numeric>
#include <utility>

#include "isa.h"
#include "kmeans_run.h"
#include "pair.h"
#include "sums.h"

namespace clmfast {
namespace {

constexpr int64_t CHUNK = 256;      // points that one task labels
constexpr int64_t SUM_BLOCK = 128;  // coordinates that one task sums

int64_t n_chunks(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

// Scattered rows come from a far cache: asking for them early hides the way.
constexpr int64_t AHEAD = 3;

void prefetch(const float* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(row + d);
}

// ---- label

// Compares rows with all centroids.
void label_anew(KmeansRun& run, const int64_t* row, int64_t n) {
  int32_t label[CHUNK];
  float within[CHUNK], beyond[CHUNK * GROUPS];
  run.packed.nearest(run.points, row, n, nullptr, label, within, beyond);
  for (int64_t e = 0; e < n; ++e) {
    run.label[row[e]] = label[e];
    run.within[row[e]] = within[e];
    std::copy_n(beyond + e * GROUPS, GROUPS, run.beyond.data() + row[e] * GROUPS);
  }
}

// The first labels of a chunk.
void label_first(const Kmeans& op, KmeansRun& run, int64_t chunk) {
  int64_t row[CHUNK];
  const int64_t first = chunk * CHUNK, n = std::min(CHUNK, op.N - first);
  std::iota(row, row + n, first);
  reach_of(run.points + first * op.D, n, op.D, run.reach.data() + chunk * op.D);
  label_anew(run, row, n);
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
void label_chunk(const Kmeans& op, KmeansRun& run, int64_t chunk) {
  // With more near groups than these four, all centroids at once cost less than one by one.
  auto is_few = [](uint32_t groups) {
    for (int e = 0; e < 4; ++e) groups &= groups - 1;
    return groups == 0;
  };
  uint32_t near[CHUNK];
  int64_t row[CHUNK], one_by_one[CHUNK], n_rows = 0, n_one_by_one = 0;
  const int64_t first = chunk * CHUNK, n = std::min(CHUNK, op.N - first), D = op.D;
  widen_bounds(run.label.data() + first, n, run.move.data(), run.group_move.data(), run.within.data() + first,
               run.beyond.data() + first * GROUPS, near);
  for (int64_t e = 0; e < n; ++e) {
    if (near[e] == 0) continue;
    if (is_few(near[e])) one_by_one[n_one_by_one++] = first + e;
    else row[n_rows++] = first + e;
  }
  for (int64_t e = 0; e < n_one_by_one; ++e) {
    if (e + AHEAD < n_one_by_one) prefetch(run.points + one_by_one[e + AHEAD] * D, D);
    const int64_t i = one_by_one[e];
    run.packed.renew(run.points + i * D, near[i - first], run.label[i], run.within[i], run.beyond.data() + i * GROUPS);
  }
  if (n_rows > 0) label_anew(run, row, n_rows);
}

// ---- move

// Chooses the quantum of the sums.
void set_quantum(const Kmeans& op, KmeansRun& run) {
  const int64_t D = op.D;
  std::vector<float> reach(D);
  for (int64_t e = 0; e < n_chunks(op.N); ++e)
    for (int64_t d = 0; d < D; ++d) reach[d] = std::max(reach[d], run.reach[e * D + d]);
  run.n_finite = op.N - std::count(run.label.begin(), run.label.end(), -1);
  find_magic(reach.data(), D, run.n_finite, run.magic.data());
  double squares = 0;
  for (float x : reach) squares += static_cast<double>(x) * x;
  run.most_variance = squares / static_cast<double>(std::max<int64_t>(D, 1));
}

// Brings the sums up to date with the labels.
void sum_changed(const Kmeans& op, KmeansRun& run, ParallelFor parallel_for) {
  const int64_t D = op.D;
  run.changed.clear();
  for (int64_t i = 0; i < op.N; ++i)
    if (run.label[i] != run.summed[i]) run.changed.push_back(i);
  for_each(parallel_for, (D + SUM_BLOCK - 1) / SUM_BLOCK, [&](int64_t block) {
    const int64_t first = block * SUM_BLOCK, last = std::min(D, first + SUM_BLOCK);
    const int64_t n = static_cast<int64_t>(run.changed.size());
    for (int64_t e = 0; e < n; ++e) {
      if (e + AHEAD < n) prefetch(run.points + run.changed[e + AHEAD] * D + first, last - first);
      const int64_t i = run.changed[e];
      const int32_t from = run.summed[i], to = run.label[i];
      if (from >= 0) add_point(run.points + i * D, run.magic.data(), -1, first, last, run.sum.data() + from * D);
      if (to >= 0) add_point(run.points + i * D, run.magic.data(), 1, first, last, run.sum.data() + to * D);
    }
  });
  for (int64_t i : run.changed) {
    const int32_t from = run.summed[i], to = run.label[i];
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
std::vector<Taken> take_over(const Kmeans& op, const KmeansRun& run) {
  std::vector<int32_t> empty;
  for (int64_t k = 0; k < op.K; ++k)
    if (run.count[k] == 0) empty.push_back(static_cast<int32_t>(k));
  if (empty.empty()) return {};
  std::vector<std::pair<double, int64_t>> far;  // (-dist2, point): the farthest first, of equals the smaller index
  std::vector<double> dist2(op.N);
  dist2_to_groups(run.points, 0, op.N, op.D, run.label.data(), run.centroid.data(), dist2.data());
  for (int64_t i = 0; i < op.N; ++i)
    if (dist2[i] > 0) far.emplace_back(-dist2[i], i);
  const size_t n = std::min(far.size(), empty.size());
  std::partial_sort(far.begin(), far.begin() + n, far.end());
  std::vector<Taken> taken;
  for (size_t e = 0; e < n; ++e) taken.push_back({far[e].second, run.label[far[e].second], empty[e]});
  return taken;
}

void move_points(const Kmeans& op, KmeansRun& run, const std::vector<Taken>& taken, int64_t sign) {
  for (const Taken& t : taken) {
    const float* point = run.points + t.i * op.D;
    add_point(point, run.magic.data(), static_cast<double>(-sign), 0, op.D, run.sum.data() + t.from * op.D);
    add_point(point, run.magic.data(), static_cast<double>(sign), 0, op.D, run.sum.data() + t.to * op.D);
    run.count[t.from] -= sign;
    run.count[t.to] += sign;
  }
}

void move_centroids(const Kmeans& op, KmeansRun& run) {
  const int64_t D = op.D;
  run.moved2 = 0;
  std::fill(run.group_move.begin(), run.group_move.end(), 0.0f);
  for (int64_t k = 0; k < op.K; ++k) {
    const double n = static_cast<double>(run.count[k]);
    for (int64_t d = 0; d < D; ++d)
      run.next[k * D + d] = n > 0 ? static_cast<float>(run.sum[k * D + d] / n) : run.centroid[k * D + d];
    const double move2 = pair_dist2(run.centroid.data() + k * D, run.next.data() + k * D, D);
    run.moved2 += move2;
    run.move[k] = move2 > 0 ? static_cast<float>(std::sqrt(move2) * (1 + 0x1p-20) + 0x1p-120) : 0;
    run.group_move[k % GROUPS] = std::max(run.group_move[k % GROUPS], run.move[k]);
  }
  std::swap(run.centroid, run.next);
}

// ---- the whole

// The mean over the coordinates of the variance of the points.
double variance(const Kmeans& op, const KmeansRun& run) {
  const int64_t D = op.D;
  const double n = static_cast<double>(std::max<int64_t>(run.n_finite, 1));
  std::vector<double> mean(D);
  for (int64_t i = 0; i < op.K * D; ++i) mean[i % D] += run.sum[i] / n;
  const std::vector<float> centre(mean.begin(), mean.end());
  double squares = 0;
  for (int64_t i = 0; i < op.N; ++i)
    if (run.label[i] >= 0) squares += pair_dist2(run.points + i * D, centre.data(), D);
  squares /= n;
  for (int64_t d = 0; d < D; ++d) squares -= (mean[d] - centre[d]) * (mean[d] - centre[d]);
  return std::max(squares, 0.0) / static_cast<double>(std::max<int64_t>(D, 1));
}

// Did the centroids move by more than tol? Mostly an upper bound of it is enough to tell, and saves a pass over the
// points.
bool has_moved(const Kmeans& op, KmeansRun& run) {
  if (run.moved2 > op.tol * run.most_variance) return true;
  if (run.bound < 0) run.bound = op.tol * variance(op, run);
  return run.moved2 > run.bound;
}

void sum_inertia(const Kmeans& op, KmeansRun& run, int64_t chunk) {
  const int64_t first = chunk * CHUNK, n = std::min(CHUNK, op.N - first);
  double dist2[CHUNK], sum = 0;
  dist2_to_groups(run.points, first, n, op.D, run.label.data() + first, run.centroid.data(), dist2);
  for (int64_t e = 0; e < n; ++e) sum += dist2[e];
  run.inertia_part[chunk] = sum;
}

}  // namespace

// Memory for a run.
KmeansRun::KmeansRun(const Kmeans& op, int64_t s, int64_t restart)
    : s(s), restart(restart), points(op.points + s * op.N * op.D), centroid(op.K * op.D), next(op.K * op.D),
      label(op.N, -1), within(op.N), beyond(op.N * GROUPS), reach(n_chunks(op.N) * op.D), magic(op.D),
      sum(op.K * op.D), summed(op.N, -1), count(op.K), move(op.K), group_move(GROUPS), inertia_part(n_chunks(op.N)) {}

void kmeans_lloyd(const Kmeans& op, KmeansRun& run, ParallelFor parallel_for) {
  auto label = [&](auto&& one_chunk) {
    run.packed.pack(run.centroid.data(), op.K, op.D);
    for_each(parallel_for, n_chunks(op.N), [&](int64_t chunk) { one_chunk(op, run, chunk); });
  };
  label(label_first);
  set_quantum(op, run);
  bool is_consistent = false;  // is label that of centroid?
  for (bool is_active = true; is_active;) {
    sum_changed(op, run, parallel_for);
    const bool has_changed = !run.changed.empty();
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
  const auto finish = [is_consistent](const Kmeans& op, KmeansRun& run, int64_t chunk) {
    if (!is_consistent) label_chunk(op, run, chunk);
    sum_inertia(op, run, chunk);
  };
  label(finish);
  run.inertia = std::accumulate(run.inertia_part.begin(), run.inertia_part.end(), 0.0);
}

}  // namespace clmfast
