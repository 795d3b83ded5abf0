// Moves out of an optimum of Lloyd's algorithm: a cluster is split, two others are merged.
#include <algorithm>
#include <utility>

#include "kmeans_run.h"
#include "pair.h"

namespace clmfast {
namespace {

struct Split {
  double worth = 0;  // inertia that it saves
  std::vector<float> a, b;
};

// 2-means of the points of one cluster.
Split split(const Kmeans& op, const KmeansRun& run, const std::vector<int64_t>& member, const float* centroid) {
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
std::vector<Move> moves_of(const Kmeans& op, const KmeansRun& run, const std::vector<int64_t>& count,
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

}  // namespace

void kmeans_moves(const Kmeans& op, int64_t n_moves, KmeansRun& run, ParallelFor parallel_for) {
  const int64_t D = op.D;
  Kmeans few = op;
  few.max_iter = MOVE_ITERATIONS;
  int64_t n_left = n_moves;
  bool has_moved_once = false;
  const auto begin = [&](std::vector<float> centroid) {
    KmeansRun begun(op, run.s, run.restart);
    begun.centroid = std::move(centroid);
    return begun;
  };
  for (bool is_active = n_moves > 0; is_active;) {
    std::vector<std::vector<int64_t>> members(op.K);
    for (int64_t i = 0; i < op.N; ++i)
      if (run.label[i] >= 0) members[run.label[i]].push_back(i);
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
      KmeansRun trial = begin(std::move(centroid));
      kmeans_lloyd(few, trial, parallel_for);
      if (!(trial.inertia < run.inertia)) continue;
      trial.n_iter += run.n_iter;
      run = std::move(trial);
      is_active = has_moved_once = true;
      break;
    }
  }
  if (!has_moved_once) return;
  KmeansRun last = begin(run.centroid);
  kmeans_lloyd(op, last, parallel_for);
  last.n_iter += run.n_iter;
  run = std::move(last);
}

}  // namespace clmfast
