// kmeans on the CPU: all restarts of all sets advance together, one phase of an iteration at a time.
//
// Labels are screened in float32 by tiles and decided in float64 where the screen leaves more than one centroid
// (panels.h has the bound). Every sum has a fixed order of its own, so no thread count shows in a result.
#include "../kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "isa.h"
#include "pair.h"
#include "panels.h"

namespace clmfast {
namespace {

constexpr int64_t CHUNK_PANELS = 8;  // panels that one task labels
constexpr int64_t CHUNK = CHUNK_PANELS * TILE_COLS;
constexpr float INF = std::numeric_limits<float>::infinity();

int64_t n_chunks(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

struct PackedSet {
  Frame frame;
  std::vector<float> panels;    // [n_panels, D, TILE_COLS]
  std::vector<float> norm2;     // [n_panels * TILE_COLS], infinity where there is no finite point
  std::vector<int64_t> finite;  // indices of the finite points
  std::vector<double> mean;     // of the finite points
  double tol;                   // bound on sum_k |move_k|^2, in the units of the points
};

struct Run {
  int64_t s, restart;
  std::vector<float> centroid, next;   // [K, D]
  std::vector<float> rows, low_norm2;  // the centroids as dot_tile wants them, and (1 - kappa) |c~|^2
  double largest_norm2;                // of |c~|^2
  std::vector<int32_t> label;          // [N]
  std::vector<int32_t> owner;          // [N]: label, but for points that an empty cluster took over
  std::vector<int64_t> member, first;  // points ordered by owner, then index; where each owner's begin [K + 1]
  std::vector<char> has_changed;       // [n_chunks]: was a point labelled anew?
  std::vector<double> move2;           // [K]
  std::vector<double> inertia;         // [n_chunks]
  int64_t n_iter = 0;
  bool is_active = true, is_consistent = false;  // is label that of centroid?
};

// Uniform in [0, 1): a hash of its coordinates (the finalizer of splitmix64, Steele et al. 2014, once per coordinate).
double uniform(const Run& run, int64_t seed, int64_t draw) {
  uint64_t hash = 0;
  for (int64_t x : {seed, run.s, run.restart, draw}) {
    hash += static_cast<uint64_t>(x) + 0x9e3779b97f4a7c15;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
  }
  return static_cast<double>(hash >> 11) * 0x1p-53;
}

void pack_set(const Kmeans& op, int64_t s, PackedSet& set) {
  const int64_t N = op.N, D = op.D;
  const float* points = op.points + s * N * D;
  set.frame = op.init ? frame_of(points, N, op.init + s * op.K * D, op.K, D) : frame_of(points, N, nullptr, 0, D);
  set.panels.resize(n_panels(N) * D * TILE_COLS);
  set.norm2.resize(n_panels(N) * TILE_COLS);
  set.mean.assign(D, 0.0);
  for (int64_t i = 0; i < N; ++i) {
    if (!is_finite_row(points + i * D, D)) continue;
    set.finite.push_back(i);
    for (int64_t d = 0; d < D; ++d) set.mean[d] += points[i * D + d];
  }
  const double n_finite = static_cast<double>(std::max<size_t>(set.finite.size(), 1));
  for (double& x : set.mean) x /= n_finite;
  double squares = 0;
  for (int64_t i : set.finite) {
    for (int64_t d = 0; d < D; ++d) {
      double x = points[i * D + d] - set.mean[d];
      squares += x * x;
    }
  }
  set.tol = op.tol * squares / n_finite / static_cast<double>(std::max<int64_t>(D, 1));
}

// ---- start

// dist2[r, i], scaled, of n <= TILE_ROWS chosen points to all points; 0 for points that are not finite, so that none
// is ever drawn.
void dist2_to_all(const Kmeans& op, const PackedSet& set, const float* points, const int64_t* chosen, int64_t n,
                  float* dist2) {
  const int64_t N = op.N, D = op.D;
  std::vector<float> rows(D * TILE_ROWS);
  float norm2[TILE_ROWS], dot[TILE_ROWS * TILE_COLS];
  for (int64_t r = 0; r < n; ++r)
    norm2[r] = static_cast<float>(pack_row(set.frame, points + chosen[r] * D, &rows[r], TILE_ROWS));
  for (int64_t i_panel = 0; i_panel < n_panels(N); ++i_panel) {
    dot_tile(rows.data(), n, &set.panels[i_panel * D * TILE_COLS], D, dot);
    const float* panel_norm2 = &set.norm2[i_panel * TILE_COLS];
    const int64_t n_cols = std::min(TILE_COLS, N - i_panel * TILE_COLS);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < n_cols; ++c) {
        int64_t i = i_panel * TILE_COLS + c;
        float sum = norm2[r] + panel_norm2[c], screened = sum - 2 * dot[r * TILE_COLS + c];
        // Where cancellation ate the value, a duplicate of a chosen point would have the chance of noise, not none.
        bool is_noise = screened < 64 * set.frame.kappa * sum;
        if (is_noise && sum < INF) {
          double exact = pair_dist2(points + chosen[r] * D, points + i * D, D);
          screened = static_cast<float>(exact * set.frame.scale * set.frame.scale);
        }
        dist2[r * N + i] = sum < INF ? screened : 0;
      }
    }
  }
}

void start_plus_plus(const Kmeans& op, const PackedSet& set, Run& run) {
  const int64_t N = op.N, D = op.D, K = op.K, n_finite = static_cast<int64_t>(set.finite.size());
  const int64_t n_trials = 2 + static_cast<int64_t>(std::log(static_cast<double>(K)));
  const float* points = op.points + run.s * N * D;
  int64_t draw = 0;
  std::vector<int64_t> chosen{set.finite[static_cast<int64_t>(uniform(run, op.seed, draw++) * n_finite)]},
      trial(n_trials);
  std::vector<float> closest(N), dist2(n_trials * N);
  dist2_to_all(op, set, points, chosen.data(), 1, closest.data());
  double potential = 0;
  for (float x : closest) potential += x;

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
    for (int64_t t = 0; t < n_trials; t += TILE_ROWS)
      dist2_to_all(op, set, points, &trial[t], std::min(TILE_ROWS, n_trials - t), &dist2[t * N]);
    int64_t best = -1;
    for (int64_t t = 0; t < n_trials; ++t) {
      double sum_t = 0;
      for (int64_t i = 0; i < N; ++i) {
        float& x = dist2[t * N + i];
        x = std::min(x, closest[i]);
        sum_t += x;
      }
      if (best < 0 || sum_t < potential) {
        best = t;
        potential = sum_t;
      }
    }
    chosen.push_back(trial[best]);
    std::copy_n(&dist2[best * N], N, closest.begin());
  }
  for (int64_t k = 0; k < K; ++k) std::copy_n(points + chosen[k] * D, D, &run.centroid[k * D]);
}

void start_random(const Kmeans& op, const PackedSet& set, Run& run) {
  const int64_t D = op.D, n_finite = static_cast<int64_t>(set.finite.size());
  std::vector<int64_t> deck = set.finite;
  for (int64_t k = 0; k < op.K; ++k) {
    if (k < n_finite) std::swap(deck[k], deck[k + static_cast<int64_t>(uniform(run, op.seed, k) * (n_finite - k))]);
    std::copy_n(op.points + (run.s * op.N + deck[k % n_finite]) * D, D, &run.centroid[k * D]);
  }
}

void start(const Kmeans& op, const PackedSet& set, Run& run) {
  const int64_t N = op.N, D = op.D, K = op.K;
  run.centroid.resize(K * D);
  run.next.resize(K * D);
  run.label.assign(N, -1);
  run.has_changed.resize(n_chunks(N));
  run.move2.resize(K);
  run.inertia.resize(n_chunks(N));
  if (op.init) {
    for (int64_t k = 0; k < K; ++k) {
      const float* row = op.init + (run.s * K + k) * D;
      bool is_finite = is_finite_row(row, D);
      for (int64_t d = 0; d < D; ++d)
        run.centroid[k * D + d] = is_finite ? row[d] : static_cast<float>(set.mean[d]);
    }
  } else if (set.finite.empty()) {
    std::fill(run.centroid.begin(), run.centroid.end(), 0.0f);
  } else if (op.start == KmeansStart::plus_plus) {
    start_plus_plus(op, set, run);
  } else {
    start_random(op, set, run);
  }
}

// ---- label

void pack_centroids(const Kmeans& op, const PackedSet& set, Run& run) {
  const int64_t D = op.D, K = op.K, groups = (K + TILE_ROWS - 1) / TILE_ROWS;
  run.rows.resize(groups * D * TILE_ROWS);
  run.low_norm2.resize(K);
  run.largest_norm2 = 0;
  for (int64_t k = 0; k < K; ++k) {
    float* rows = &run.rows[k / TILE_ROWS * TILE_ROWS * D + k % TILE_ROWS];
    double norm2 = pack_row(set.frame, &run.centroid[k * D], rows, TILE_ROWS);
    run.low_norm2[k] = static_cast<float>((1 - set.frame.kappa) * norm2);
    run.largest_norm2 = std::max(run.largest_norm2, norm2);
  }
}

// Turns dot [K, TILE_COLS] into screened values; label[c] is the first centroid within slack[c] of column c's best,
// n_close their number.
CLMFAST_BODY void nearest_body(float* dot, int64_t K, const float* low_norm2, const float* slack, int32_t* label,
                               int32_t* n_close) {
  float best[TILE_COLS];
  for (int64_t c = 0; c < TILE_COLS; ++c) best[c] = INF;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      float screened = low_norm2[k] - 2 * dot[k * TILE_COLS + c];
      dot[k * TILE_COLS + c] = screened;
      best[c] = screened < best[c] ? screened : best[c];
    }
  }
  for (int64_t c = 0; c < TILE_COLS; ++c) {
    best[c] += slack[c];
    n_close[c] = 0;
    label[c] = 0;
  }
  for (int64_t k = K - 1; k >= 0; --k) {
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      bool is_close = dot[k * TILE_COLS + c] <= best[c];
      label[c] = is_close ? static_cast<int32_t>(k) : label[c];
      n_close[c] += is_close;
    }
  }
}

void nearest_baseline(float* dot, int64_t K, const float* b, const float* slack, int32_t* label, int32_t* n_close) {
  nearest_body(dot, K, b, slack, label, n_close);
}
CLMFAST_AVX2 void nearest_avx2(float* dot, int64_t K, const float* b, const float* slack, int32_t* label,
                               int32_t* n_close) {
  nearest_body(dot, K, b, slack, label, n_close);
}
CLMFAST_AVX512 void nearest_avx512(float* dot, int64_t K, const float* b, const float* slack, int32_t* label,
                                   int32_t* n_close) {
  nearest_body(dot, K, b, slack, label, n_close);
}

void label_chunk(const Kmeans& op, const PackedSet& set, Run& run, int64_t chunk) {
  static const auto nearest = pick(nearest_baseline, nearest_avx2, nearest_avx512);
  const int64_t N = op.N, D = op.D, K = op.K;
  const float* points = op.points + run.s * N * D;
  std::vector<float> dot((K + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * TILE_COLS);
  float slack[TILE_COLS];
  int32_t label[TILE_COLS], n_close[TILE_COLS];
  bool has_changed = false;
  for (int64_t i_panel = chunk * CHUNK_PANELS; i_panel < std::min((chunk + 1) * CHUNK_PANELS, n_panels(N)); ++i_panel) {
    for (int64_t k = 0; k < K; k += TILE_ROWS)
      dot_tile(&run.rows[k * D], std::min(TILE_ROWS, K - k), &set.panels[i_panel * D * TILE_COLS], D,
               &dot[k * TILE_COLS]);
    // The best and a rival may both be off by kappa (C^2 + P^2) + eta; twice that again covers the float32 arithmetic
    // done here.
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      double norm2 = run.largest_norm2 + set.norm2[i_panel * TILE_COLS + c];
      slack[c] = static_cast<float>(4 * (set.frame.kappa * norm2 + set.frame.eta));
    }
    nearest(dot.data(), K, run.low_norm2.data(), slack, label, n_close);
    for (int64_t c = 0; c < std::min(TILE_COLS, N - i_panel * TILE_COLS); ++c) {
      const int64_t i = i_panel * TILE_COLS + c;
      if (!(set.norm2[i] < INF)) continue;  // keeps its -1
      if (n_close[c] > 1) {
        float limit = INF;
        for (int64_t k = 0; k < K; ++k) limit = std::min(limit, dot[k * TILE_COLS + c]);
        limit += slack[c];
        double best = std::numeric_limits<double>::infinity();
        for (int64_t k = label[c]; k < K; ++k) {
          if (dot[k * TILE_COLS + c] > limit) continue;
          double dist2 = pair_dist2(points + i * D, &run.centroid[k * D], D);
          if (dist2 < best) {
            best = dist2;
            label[c] = static_cast<int32_t>(k);
          }
        }
      }
      has_changed |= run.label[i] != label[c];
      run.label[i] = label[c];
    }
  }
  run.has_changed[chunk] = has_changed;
}

// ---- move

// Gives empty clusters the points farthest from their centroids; returns whether it gave any.
bool relocate_empty(const Kmeans& op, Run& run, std::vector<int64_t>& count) {
  std::vector<int32_t> empty;
  for (int64_t k = 0; k < op.K; ++k)
    if (count[k] == 0) empty.push_back(static_cast<int32_t>(k));
  if (empty.empty()) return false;
  const float* points = op.points + run.s * op.N * op.D;
  std::vector<std::pair<double, int64_t>> far;  // (-dist2, point): the farthest first, of equals the smaller index
  for (int64_t i = 0; i < op.N; ++i) {
    if (run.label[i] < 0) continue;
    double dist2 = pair_dist2(points + i * op.D, &run.centroid[run.label[i] * op.D], op.D);
    if (dist2 > 0) far.emplace_back(-dist2, i);
  }
  size_t n = std::min(far.size(), empty.size());
  std::partial_sort(far.begin(), far.begin() + n, far.end());
  for (size_t e = 0; e < n; ++e) {
    int64_t i = far[e].second;
    --count[run.owner[i]];
    ++count[empty[e]];
    run.owner[i] = empty[e];
  }
  return n > 0;
}

// Settles who owns which point; returns whether owner and label differ.
bool gather_members(const Kmeans& op, Run& run) {
  run.owner = run.label;
  std::vector<int64_t> count(op.K);
  for (int32_t k : run.owner)
    if (k >= 0) ++count[k];
  bool has_relocated = relocate_empty(op, run, count);
  run.first.assign(op.K + 1, 0);
  for (int64_t k = 0; k < op.K; ++k) run.first[k + 1] = run.first[k] + count[k];
  run.member.resize(run.first[op.K]);
  std::vector<int64_t> end(run.first.begin(), run.first.end() - 1);
  for (int64_t i = 0; i < op.N; ++i)
    if (run.owner[i] >= 0) run.member[end[run.owner[i]]++] = i;
  return has_relocated;
}

void move_centroid(const Kmeans& op, Run& run, int64_t k) {
  const int64_t D = op.D;
  const float* points = op.points + run.s * op.N * D;
  const float* centroid = &run.centroid[k * D];
  float* next = &run.next[k * D];
  std::copy_n(centroid, D, next);
  if (run.first[k] < run.first[k + 1]) {
    std::vector<double> sum(D);
    for (int64_t m = run.first[k]; m < run.first[k + 1]; ++m) {
      const float* point = points + run.member[m] * D;
      for (int64_t d = 0; d < D; ++d) sum[d] += point[d];
    }
    for (int64_t d = 0; d < D; ++d)
      next[d] = static_cast<float>(sum[d] / static_cast<double>(run.first[k + 1] - run.first[k]));
  }
  run.move2[k] = pair_dist2(centroid, next, D);
}

void sum_inertia(const Kmeans& op, Run& run, int64_t chunk) {
  const float* points = op.points + run.s * op.N * op.D;
  double sum = 0;
  for (int64_t i = chunk * CHUNK; i < std::min((chunk + 1) * CHUNK, op.N); ++i)
    if (run.label[i] >= 0) sum += pair_dist2(points + i * op.D, &run.centroid[run.label[i] * op.D], op.D);
  run.inertia[chunk] = sum;
}

// ---- the whole

struct Lloyd {
  const Kmeans& op;
  ParallelFor parallel_for;
  std::vector<PackedSet> sets;
  std::vector<Run> runs;  // [S, n_init]

  void pack() {
    const int64_t panels = n_panels(op.N);
    for_each(parallel_for, op.S, [&](int64_t s) { pack_set(op, s, sets[s]); });
    for_each(parallel_for, op.S * panels, [&](int64_t task) {
      PackedSet& set = sets[task / panels];
      int64_t i_panel = task % panels;
      double norm2[TILE_COLS];
      pack_panel(set.frame, op.points + task / panels * op.N * op.D, op.N, i_panel,
                 &set.panels[i_panel * op.D * TILE_COLS], norm2);
      std::copy_n(norm2, TILE_COLS, &set.norm2[i_panel * TILE_COLS]);
    });
  }

  // Runs task(run, i) for every chosen run and i in [0, n).
  template <class Task>
  void for_each_run(const std::vector<Run*>& chosen, int64_t n, const Task& task) {
    for_each(parallel_for, static_cast<int64_t>(chosen.size()) * n, [&](int64_t i) { task(*chosen[i / n], i % n); });
  }

  template <class Condition>
  std::vector<Run*> runs_that(const Condition& condition) {
    std::vector<Run*> chosen;
    for (Run& run : runs)
      if (condition(run)) chosen.push_back(&run);
    return chosen;
  }

  void label(const std::vector<Run*>& chosen) {
    for_each_run(chosen, 1, [&](Run& run, int64_t) { pack_centroids(op, sets[run.s], run); });
    for_each_run(chosen, n_chunks(op.N), [&](Run& run, int64_t chunk) { label_chunk(op, sets[run.s], run, chunk); });
  }

  void iterate(const std::vector<Run*>& active) {
    label(active);
    std::vector<char> has_relocated(runs.size());
    for_each_run(active, 1, [&](Run& run, int64_t) { has_relocated[&run - runs.data()] = gather_members(op, run); });
    for_each_run(active, op.K, [&](Run& run, int64_t k) { move_centroid(op, run, k); });
    for (Run* run : active) {
      std::swap(run->centroid, run->next);
      ++run->n_iter;
      bool has_changed = std::count(run->has_changed.begin(), run->has_changed.end(), 1) > 0;
      double moved2 = 0;
      for (double move2 : run->move2) moved2 += move2;
      // Unchanged labels have the same means as before, so the centroids fit, unless an empty cluster took a point.
      run->is_consistent = !has_changed && !has_relocated[run - runs.data()];
      run->is_active = has_changed && moved2 > sets[run->s].tol && run->n_iter < op.max_iter;
    }
  }

  void write_best(int64_t s) {
    const Run* best = nullptr;
    double least = 0;
    for (int64_t restart = 0; restart < op.n_init; ++restart) {
      const Run& run = runs[s * op.n_init + restart];
      double inertia = 0;
      for (double x : run.inertia) inertia += x;
      if (best && !(inertia < least)) continue;
      best = &run;
      least = inertia;
    }
    std::copy(best->label.begin(), best->label.end(), op.label + s * op.N);
    std::copy(best->centroid.begin(), best->centroid.end(), op.centroid + s * op.K * op.D);
    op.inertia[s] = least;
    op.n_iter[s] = best->n_iter;
  }

  void run() {
    sets.resize(op.S);
    pack();
    for (int64_t s = 0; s < op.S; ++s) {
      for (int64_t restart = 0; restart < op.n_init; ++restart) {
        runs.emplace_back();
        runs.back().s = s;
        runs.back().restart = restart;
      }
    }
    for_each(parallel_for, static_cast<int64_t>(runs.size()), [&](int64_t i) { start(op, sets[runs[i].s], runs[i]); });
    auto is_active = [](const Run& run) { return run.is_active; };
    for (auto active = runs_that(is_active); !active.empty(); active = runs_that(is_active)) iterate(active);
    label(runs_that([](const Run& run) { return !run.is_consistent; }));
    for_each_run(runs_that([](const Run&) { return true; }), n_chunks(op.N),
                 [&](Run& run, int64_t chunk) { sum_inertia(op, run, chunk); });
    for_each(parallel_for, op.S, [&](int64_t s) { write_best(s); });
  }
};

}  // namespace

void kmeans_cpu(const Kmeans& op, ParallelFor parallel_for) { Lloyd{op, parallel_for, {}, {}}.run(); }

}  // namespace clmfast
