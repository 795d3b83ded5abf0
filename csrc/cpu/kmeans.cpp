// kmeans on the CPU, one restart of one set at a time or side by side.
//
// Labels are screened in float32 by tiles and decided in float64 where the screen leaves more than one centroid
// (panels.h has the bound). Every sum has a fixed order of its own, so no thread count shows in a result.
#include "../kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "centroids.h"
#include "pair.h"
#include "panels.h"
#include "tile.h"

namespace clmfast {
namespace {

constexpr int64_t CHUNK_PANELS = 8;  // panels that one task labels
constexpr int64_t CHUNK = CHUNK_PANELS * PANEL;
constexpr float INF = std::numeric_limits<float>::infinity();

int64_t n_chunks(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

// What is known of a set of points besides its panels.
struct Set {
  int64_t s;
  Frame frame;
  const float* points;  // [N, D]
  const float* panels;  // of the points
  const double* norm2;  // [N]; infinity where a point is not finite
  int64_t n_finite;
  double most_variance;  // at least the mean over d of the variance, in the units of the points
};

struct Run {
  int64_t s, restart;
  std::vector<float> centroid, next;   // [K, D]
  Centroids packed;
  std::vector<int32_t> label;          // [N]
  std::vector<int32_t> owner;          // [N]: label, but for points that an empty cluster took over
  std::vector<int64_t> count;          // [K]: points of each owner
  std::vector<double> mean;            // [K, D] of each owner's points
  std::vector<float> within, beyond;   // [N]: of Nearest, at the time of the last labelling
  std::vector<float> move;             // [K]: at least how far the centroids moved since
  int32_t farthest = 0, next_farthest = 0;  // of these moves
  std::vector<char> has_changed;       // [n_chunks]: was a point labelled anew?
  std::vector<double> move2;           // [K]
  std::vector<double> inertia;         // [n_chunks]
  int64_t n_iter = 0;

  float largest_move_beside(int32_t k) const { return move[k == farthest ? next_farthest : farthest]; }
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

Set set_of(const Kmeans& op, const Packed& packed, int64_t s) {
  Set set{s, frame_of(packed, s), op.points + s * op.N * op.D, packed.panel(s, 0), packed.norm2_of(s), 0, 0};
  double squares = 0;
  for (int64_t i = 0; i < op.N; ++i) {
    if (!(set.norm2[i] < INF)) continue;
    ++set.n_finite;
    squares += set.norm2[i];
  }
  // The mean square about any centre is at least that about the mean; what is added is above all rounding.
  set.most_variance = squares / static_cast<double>(std::max<int64_t>(set.n_finite * op.D, 1)) / set.frame.scale /
                      set.frame.scale * (1 + 0x1p-10);
  return set;
}

std::vector<double> mean_of(const Kmeans& op, const Set& set) {
  std::vector<double> mean(op.D);
  for (int64_t i = 0; i < op.N; ++i)
    if (set.norm2[i] < INF)
      for (int64_t d = 0; d < op.D; ++d) mean[d] += set.points[i * op.D + d];
  for (double& x : mean) x /= static_cast<double>(std::max<int64_t>(set.n_finite, 1));
  return mean;
}

std::vector<int64_t> finite_points(const Kmeans& op, const Set& set) {
  std::vector<int64_t> finite;
  for (int64_t i = 0; i < op.N; ++i)
    if (set.norm2[i] < INF) finite.push_back(i);
  return finite;
}

// The bound on sum_k |move_k|^2, in the units of the points.
double tol_of(const Kmeans& op, const Set& set) {
  const std::vector<double> mean = mean_of(op, set);
  double squares = 0;
  for (int64_t i = 0; i < op.N; ++i) {
    if (!(set.norm2[i] < INF)) continue;
    for (int64_t d = 0; d < op.D; ++d) {
      double x = set.points[i * op.D + d] - mean[d];
      squares += x * x;
    }
  }
  return op.tol * squares / static_cast<double>(std::max<int64_t>(set.n_finite, 1)) /
         static_cast<double>(std::max<int64_t>(op.D, 1));
}

bool init_suits(const Kmeans& op) {
  for (int64_t i = 0; op.init && i < op.S * op.K; ++i)
    if (!suits(*op.packed, i / op.K, op.init + i * op.D)) return false;
  return true;
}

// ---- start

// dist2[r, i], scaled, of n <= TILE_ROWS chosen points to all points; 0 for points that are not finite, so that none
// is ever drawn.
void dist2_to_all(const Kmeans& op, const Set& set, const float* points, const int64_t* chosen, int64_t n,
                  float* dist2) {
  const int64_t N = op.N, D = op.D;
  std::vector<float> rows(D * TILE_ROWS);
  float norm2[TILE_ROWS], dot[TILE_ROWS * PANEL];
  for (int64_t r = 0; r < n; ++r)
    norm2[r] = static_cast<float>(pack_row(set.frame, points + chosen[r] * D, &rows[r], TILE_ROWS));
  for (int64_t i_panel = 0; i_panel < n_panels(N); ++i_panel) {
    dot_tile(rows.data(), n, &set.panels[i_panel * D * PANEL], D, dot);
    const double* panel_norm2 = &set.norm2[i_panel * PANEL];
    const int64_t n_cols = std::min(PANEL, N - i_panel * PANEL);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < n_cols; ++c) {
        int64_t i = i_panel * PANEL + c;
        float sum = norm2[r] + static_cast<float>(panel_norm2[c]), screened = sum - 2 * dot[r * PANEL + c];
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

void start_plus_plus(const Kmeans& op, const Set& set, Run& run) {
  const int64_t N = op.N, D = op.D, K = op.K;
  const std::vector<int64_t> finite = finite_points(op, set);
  const int64_t n_trials = 2 + static_cast<int64_t>(std::log(static_cast<double>(K)));
  const float* points = op.points + run.s * N * D;
  int64_t draw = 0;
  std::vector<int64_t> chosen{finite[static_cast<int64_t>(uniform(run, op.seed, draw++) * set.n_finite)]}, trial(n_trials);
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

void start_random(const Kmeans& op, const Set& set, Run& run) {
  const int64_t D = op.D, n_finite = set.n_finite;
  std::vector<int64_t> deck = finite_points(op, set);
  for (int64_t k = 0; k < op.K; ++k) {
    if (k < n_finite) std::swap(deck[k], deck[k + static_cast<int64_t>(uniform(run, op.seed, k) * (n_finite - k))]);
    std::copy_n(op.points + (run.s * op.N + deck[k % n_finite]) * D, D, &run.centroid[k * D]);
  }
}

void start(const Kmeans& op, const Set& set, Run& run) {
  const int64_t N = op.N, D = op.D, K = op.K;
  run.centroid.resize(K * D);
  run.next.resize(K * D);
  run.label.assign(N, -1);
  run.within.assign(N, INF);
  run.beyond.assign(N, 0);
  run.move.assign(K, 0);
  for (int64_t i = 0; op.known_label && i < N; ++i) {
    const int64_t at = run.s * op.known_stride + i;
    if (!(op.known_within[at] < INF)) continue;
    run.label[i] = op.known_label[at];
    run.within[i] = op.known_within[at];
    run.beyond[i] = op.known_beyond[at];
  }
  run.has_changed.resize(n_chunks(N));
  run.mean.resize(K * D);
  run.move2.resize(K);
  run.inertia.resize(n_chunks(N));
  if (op.init) {
    for (int64_t k = 0; k < K; ++k) {
      const float* row = op.init + (run.s * K + k) * D;
      if (is_finite_row(row, D)) {
        std::copy_n(row, D, &run.centroid[k * D]);
      } else {
        const std::vector<double> mean = mean_of(op, set);
        std::copy(mean.begin(), mean.end(), &run.centroid[k * D]);
      }
    }
  } else if (set.n_finite == 0) {
    std::fill(run.centroid.begin(), run.centroid.end(), 0.0f);
  } else if (op.start == KmeansStart::plus_plus) {
    start_plus_plus(op, set, run);
  } else {
    start_random(op, set, run);
  }
}

// ---- label

// Labels the points of a chunk that may have got another nearest centroid since they were labelled last.
// A label is certain while the point's own centroid, after all its moves, is nearer than the others can have come
// (Hamerly 2010): for most points of most iterations nothing is computed.
void label_chunk(const Kmeans& op, const Set& set, Run& run, int64_t chunk) {
  const int64_t D = op.D;
  bool has_changed = false;
  auto note = [&](const Nearest& nearest, const int64_t* row, int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
      const int64_t i = row[c];
      if (!(set.norm2[i] < INF)) continue;  // keeps its -1
      has_changed |= run.label[i] != nearest.label[c];
      run.label[i] = nearest.label[c];
      run.within[i] = nearest.within[c];
      run.beyond[i] = nearest.beyond[c];
    }
  };
  // Doubtful points of panels that are mostly certain are gathered into panels of their own.
  int64_t gathered[PANEL];
  int64_t n_gathered = 0;
  std::vector<float> panel(D * PANEL);
  auto label_gathered = [&] {
    double norm2[PANEL];
    pack_panel(set.frame, set.points, gathered, n_gathered, panel.data(), norm2);
    note(run.packed.nearest(set.points, gathered, panel.data(), norm2, nullptr), gathered, n_gathered);
    n_gathered = 0;
  };

  const int64_t end = std::min((chunk + 1) * CHUNK_PANELS, n_panels(op.N));
  for (int64_t i_panel = chunk * CHUNK_PANELS; i_panel < end; ++i_panel) {
    const int64_t first = i_panel * PANEL, n = std::min(PANEL, op.N - first);
    int64_t doubtful[PANEL], n_doubtful = 0;
    for (int64_t i = first; i < first + n; ++i) {
      const int32_t own = run.label[i];
      if (own >= 0) {
        run.within[i] = (run.within[i] + run.move[own]) * (1 + 0x1p-22f);
        run.beyond[i] = (run.beyond[i] - run.largest_move_beside(own)) * (1 - 0x1p-22f);
        if (run.within[i] < run.beyond[i]) continue;
      }
      if (set.norm2[i] < INF) doubtful[n_doubtful++] = i;
    }
    if (n_doubtful > PANEL / 2) {
      int64_t row[PANEL];
      std::iota(row, row + PANEL, first);
      note(run.packed.nearest(set.points, row, set.panels + i_panel * D * PANEL, set.norm2 + first, nullptr), row, n);
      continue;
    }
    for (int64_t e = 0; e < n_doubtful; ++e) {
      gathered[n_gathered++] = doubtful[e];
      if (n_gathered == PANEL) label_gathered();
    }
  }
  if (n_gathered > 0) label_gathered();
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
bool settle_owners(const Kmeans& op, Run& run) {
  run.owner = run.label;
  run.count.assign(op.K, 0);
  for (int32_t k : run.owner)
    if (k >= 0) ++run.count[k];
  return relocate_empty(op, run, run.count);
}

void move_centroids(const Kmeans& op, Run& run) {
  for (int64_t i = 0; i < op.K * op.D; ++i)
    run.next[i] = run.count[i / op.D] > 0 ? static_cast<float>(run.mean[i]) : run.centroid[i];
  std::swap(run.centroid, run.next);
  for (int64_t k = 0; k < op.K; ++k) {
    run.move2[k] = pair_dist2(&run.centroid[k * op.D], &run.next[k * op.D], op.D);
    run.move[k] = static_cast<float>(std::sqrt(run.move2[k]) * (1 + 0x1p-20) + 0x1p-120);
  }
  // With one centroid alone there is nothing beside it, and any move will do.
  run.farthest = run.next_farthest = 0;
  for (int32_t k = 1; k < op.K; ++k) {
    if (run.move[k] > run.move[run.farthest]) run.next_farthest = run.farthest, run.farthest = k;
    else if (run.next_farthest == run.farthest || run.move[k] > run.move[run.next_farthest]) run.next_farthest = k;
  }
}

void sum_inertia(const Kmeans& op, Run& run, int64_t chunk) {
  const float* points = op.points + run.s * op.N * op.D;
  double sum = 0;
  for (int64_t i = chunk * CHUNK; i < std::min((chunk + 1) * CHUNK, op.N); ++i)
    if (run.label[i] >= 0) sum += pair_dist2(points + i * op.D, &run.centroid[run.label[i] * op.D], op.D);
  run.inertia[chunk] = sum;
}

// ---- the whole

// Did the centroids move by more than tol? Mostly an upper bound of it is enough to tell, and saves two passes over the
// points.
bool has_moved(const Kmeans& op, const Set& set, const Run& run) {
  double moved2 = 0;
  for (double move2 : run.move2) moved2 += move2;
  return moved2 > op.tol * set.most_variance || moved2 > tol_of(op, set);
}

// One restart of one set, from start to end.
void lloyd(const Kmeans& op, const Set& set, Run& run, ParallelFor parallel_for) {
  auto label = [&] {
    run.packed.pack(set.frame, run.centroid.data(), op.K);
    for_each(parallel_for, n_chunks(op.N), [&](int64_t chunk) { label_chunk(op, set, run, chunk); });
  };
  start(op, set, run);
  bool is_consistent = false;  // is label that of centroid?
  for (bool is_active = true; is_active;) {
    label();
    const bool has_relocated = settle_owners(op, run);
    for_each(parallel_for, n_sum_blocks(op.D), [&](int64_t block) {
      mean_of_groups(set.points, run.owner, run.count, op.D, block, run.mean.data());
    });
    move_centroids(op, run);
    // The first labels are new, also where they were known.
    const bool has_changed = run.n_iter == 0 ? set.n_finite > 0 : std::count(run.has_changed.begin(), run.has_changed.end(), 1) > 0;
    ++run.n_iter;
    // Unchanged labels have the same means as before, so the centroids fit, unless an empty cluster took a point.
    is_consistent = !has_changed && !has_relocated;
    is_active = has_changed && run.n_iter < op.max_iter && has_moved(op, set, run);
  }
  if (!is_consistent) label();
  for_each(parallel_for, n_chunks(op.N), [&](int64_t chunk) { sum_inertia(op, run, chunk); });
}

void write_best(const Kmeans& op, int64_t s, const std::vector<Run>& runs) {
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
  if (!op.known_label) return;
  std::copy(best->label.begin(), best->label.end(), op.known_label + s * op.known_stride);
  std::copy(best->within.begin(), best->within.end(), op.known_within + s * op.known_stride);
  std::copy(best->beyond.begin(), best->beyond.end(), op.known_beyond + s * op.known_stride);
}

}  // namespace

void kmeans_cpu(const Kmeans& op, ParallelFor parallel_for) {
  std::optional<PackedMemory> own;
  if (!op.packed || !init_suits(op)) {
    own.emplace(op.S, op.N, op.D);
    make_frames(*own, op.points, op.N, op.init, op.init ? op.K : 0, op.init ? op.K : 0, parallel_for);
    pack_rows(*own, op.points, op.N, 0, op.N, parallel_for);
  }
  std::vector<Set> sets(op.S);
  for_each(parallel_for, op.S, [&](int64_t s) { sets[s] = set_of(op, own ? *own : *op.packed, s); });
  std::vector<Run> runs(op.S * op.n_init);
  const int64_t n_runs = static_cast<int64_t>(runs.size());
  for (int64_t i = 0; i < n_runs; ++i) runs[i].s = i / op.n_init, runs[i].restart = i % op.n_init;
  // Many runs: each is a task, so that its points stay in a core's cache. Few: their phases are split.
  constexpr int64_t MANY = 8;
  if (n_runs >= MANY) {
    for_each(parallel_for, n_runs, [&](int64_t i) { lloyd(op, sets[runs[i].s], runs[i], in_line); });
  } else {
    for (Run& run : runs) lloyd(op, sets[run.s], run, parallel_for);
  }
  for (int64_t s = 0; s < op.S; ++s) write_best(op, s, runs);
}

}  // namespace clmfast
