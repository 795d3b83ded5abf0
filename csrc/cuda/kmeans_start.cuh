// The first centroids: greedy k-means++, or points of different index, or those that were given.
//
// k-means++ takes one step for each centroid. In step r every block finds out, from what all blocks wrote in step r - 1,
// which of the points drawn there was the best, and draws the next ones; then it measures its own points. So blocks wait
// once for each centroid.
//
// Distances are float32 sums of squared differences in the lanes of cpu/pair.h, with fused multiply-add: the bits of the
// CPU's, where it has that instruction. Sums of them are float64 in an order of our own: they agree to rounding. Most are
// never computed: the screen of kmeans_label.cuh shows that a point stays with the centroid that it has.
#pragma once

#include "kmeans_label.cuh"

namespace clmfast::kmeans_gpu {

// Uniform in [0, 1), as in cpu/kmeans.cpp.
__device__ inline double uniform(const Kmeans& op, int64_t run, int64_t draw) {
  uint64_t hash = 0;
  const int64_t set = set_of(op, run);
  for (int64_t x : {op.seed, set, run - set * op.n_init, draw}) {
    hash += static_cast<uint64_t>(x) + 0x9e3779b97f4a7c15;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
  }
  return static_cast<double>(hash >> 11) * 0x1p-53;
}

// ---- by one warp

__device__ inline int first_lane(uint32_t ballot) { return __ffs(static_cast<int>(ballot)) - 1; }
__device__ inline int last_lane(uint32_t ballot) { return 31 - __clz(static_cast<int>(ballot)); }

// Of n parts the first with which the sum of the parts exceeds the target; `before`: the sum in front of it. Rounding
// may leave no such part: then the last that is not 0. Parts of 0 are never found. value(i): part i.
template <class X, class Value>
__device__ int64_t find_part(int64_t n, X target, X& before, const Value& value) {
  X base = 0;
  int64_t last = 0;
  before = 0;
#pragma unroll 1
  for (int64_t first = 0; first < n; first += LANES) {
    const X x = first + lane_id() < n ? value(first + lane_id()) : X(0), sum = base + warp_prefix(x);
    const uint32_t found = warp_ballot(x > 0 && sum > target), any = warp_ballot(x > 0);
    if (any) {
      const int lane = found ? first_lane(found) : last_lane(any);
      const X in_front = warp_shuffle(sum, lane > 0 ? lane - 1 : 0);
      before = lane > 0 ? in_front : base;
      last = first + lane;
    }
    if (found) return last;
    base = warp_shuffle(sum, LANES - 1);
  }
  return last;
}

// Finite point number j of a run.
__device__ inline int64_t finite_point(const Sizes& z, const Run& run, int32_t j) {
  int32_t before;
  const int64_t tile = find_part<int32_t>(z.n_tiles, j, before, [&](int64_t i) { return run.tile_finite[i]; });
  const int64_t first = tile * TILE, n = z.N - first < TILE ? z.N - first : TILE;
  return first +
         find_part<int32_t>(n, j - before, before, [&](int64_t r) { return isnan(run.norm[first + r].norm) ? 0 : 1; });
}

// The point that is drawn by a target, in proportion to `least`.
__device__ inline int64_t drawn_point(const Sizes& z, const float* least, const double* total, double target) {
  constexpr int ROWS = TILE / LANES;  // of a lane
  double before;
  const int64_t tile = find_part<double>(z.n_tiles, target, before, [&](int64_t i) { return total[i]; });
  target -= before;
  const int64_t first = tile * TILE + lane_id() * ROWS;
  float x[ROWS];
  double sum = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) x[r] = first + r < z.N ? least[first + r] : 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sum += x[r];
  double running = warp_prefix(sum) - sum;  // about; a lane's points are searched from there
  int found = -1, last = -1;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    running += x[r];
    if (x[r] > 0) last = r;
    if (x[r] > 0 && running > target && found < 0) found = r;
  }
  const uint32_t has_found = warp_ballot(found >= 0), has_any = warp_ballot(last >= 0);
  if (has_any == 0) return tile * TILE;  // of a tile whose sum is not 0, some point is at a distance
  const int lane = has_found ? first_lane(has_found) : last_lane(has_any);
  return tile * TILE + lane * ROWS + warp_shuffle(has_found ? found : last, lane);
}

__device__ inline double sum_of_tiles(const Sizes& z, const double* total) {
  double sum = 0;
#pragma unroll 1
  for (int64_t tile = lane_id(); tile < z.n_tiles; tile += LANES) sum += total[tile];
  return warp_sum(sum);
}

// ---- k-means++

// Which trial of the step before was the best, and the sum that it leaves; every warp finds out for itself.
struct Best {
  int trial;
  double potential;
};

__device__ inline Best best_trial(const Sizes& z, const Run& run, int64_t step) {
  const int n = step == 1 ? 1 : static_cast<int>(z.n_trials);
  const double* total = run.total + (step + 1) % 2 * z.n_trials * z.n_tiles;
  Best best{0, 0};
#pragma unroll 1
  for (int base = 0; base < n; base += 4) {
    double potential[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) potential[e] = sum_of_tiles(z, total + min(base + e, n - 1) * z.n_tiles);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (base + e == 0 || (base + e < n && potential[e] < best.potential)) best = {base + e, potential[e]};
  }
  return best;
}

// The points that this step tries, to `trial`.
__device__ inline void draw(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, int64_t step,
                            const Best& best, int32_t* trial) {
  if (step == 0) {
    if (warp_id() > 0) return;
    const int64_t i = finite_point(z, run, static_cast<int32_t>(uniform(op, team.run, 0) * run.control->n_finite));
    if (lane_id() == 0) trial[0] = static_cast<int32_t>(i);
    return;
  }
  const int64_t before = (step + 1) % 2 * z.n_trials + best.trial;
#pragma unroll 1
  for (int64_t t = warp_id(); t < z.n_trials; t += N_WARPS) {
    const int64_t i = best.potential > 0
                          ? drawn_point(z, run.least + before * z.N, run.total + before * z.n_tiles,
                                        uniform(op, team.run, 1 + (step - 1) * z.n_trials + t) * best.potential)
                          : run.trial[before];  // with every point on a centroid, the last one is taken again
    if (lane_id() == 0) trial[t] = static_cast<int32_t>(i);
  }
}

// float32 dist2 of two points whose coordinates are first multiplied by powers of two, which keep squares from leaving
// float32; by four threads. IS_NEAR: b is in shared memory.
template <bool IS_NEAR, class A, class B>
__device__ float trial_dist2(const A* a, float unit_of_a, const B* b, float unit_of_b, int64_t D) {
  const int64_t n_whole = D / 16 * 16;
  float lane[4] = {};
  visit_fours<IS_NEAR>(a, b, n_whole, [&](const float4& x, const float4& y) {
    const float difference[4] = {x.x * unit_of_a - y.x * unit_of_b, x.y * unit_of_a - y.y * unit_of_b,
                                 x.z * unit_of_a - y.z * unit_of_b, x.w * unit_of_a - y.w * unit_of_b};
#pragma unroll
    for (int e = 0; e < 4; ++e) lane[e] = fmaf(difference[e], difference[e], lane[e]);
  });
  float dist2 = sum_of_lanes(lane);
#pragma unroll 1
  for (int64_t d = n_whole; d < D; ++d) {
    const float difference = widen(a[d]) * unit_of_a - widen(b[d]) * unit_of_b;
    dist2 = fmaf(difference, difference, dist2);
  }
  return dist2;
}

// Where a block that keeps its points in shared memory keeps those that it tries, unplaced but for the scale: behind
// their placed form, where the other columns are when centroids are screened.
struct TrialRows {
  float* first;
  int stride;  // so that rows begin in different banks

  __device__ TrialRows(const Sizes& z, const Tiles& tiles)
      : first(reinterpret_cast<float*>(tiles.columns + TRIALS * tiles.stride)), stride(static_cast<int>(z.depth) + 16) {
    static_assert(TRIALS * (16 + 16) * sizeof(float) <= (COLUMNS - TRIALS) * (16 + PAD) * sizeof(half), "");
    static_assert(TRIALS * sizeof(float) <= (COLUMNS - TRIALS) * sizeof(half), "for any greater depth");
  }
};

// Coordinates first_d ... of n points, placed as columns; zeros behind them. A row each warp.
template <class T, bool IS_RESIDENT>
__device__ void load_trials(const Sizes& z, const Run& run, const T* points, const Tiles& tiles, const int32_t* trial,
                            int n, int64_t first_d, int width) {
  constexpr int AHEAD = 8;
  const float scale = scale_of(run);
  const TrialRows rows(z, tiles);
#pragma unroll 1
  for (int t = warp_id(); t < TRIALS; t += N_WARPS) {
    const T* point = points + (t < n ? trial[t] : 0) * z.D + first_d;
    const int n_there = t < n ? min(width, static_cast<int>(z.D - first_d)) : 0;
#pragma unroll 1
    for (int base = lane_id(); base < width; base += LANES * AHEAD) {
      float x[AHEAD], centre[AHEAD];
      const T* from = point + base;
      const float* from_centre = run.centre + first_d + base;
#pragma unroll
      for (int e = 0; e < AHEAD; ++e) {
        const bool is_there = base + e * LANES < n_there;
        x[e] = is_there ? widen(from[e * LANES]) : 0;
        centre[e] = is_there ? from_centre[e * LANES] : 0;
      }
#pragma unroll
      for (int e = 0; e < AHEAD; ++e) {
        const int at = base + e * LANES;
        if (at >= width) break;
        tiles.columns[t * tiles.stride + at] = narrow<half>(place(x[e], scale, centre[e]));
        if (IS_RESIDENT) rows.first[t * rows.stride + at] = x[e] * scale;
      }
    }
  }
}

// Which of n points tried (bits) may be nearer to this thread's point than `closest`, by the screen.
__device__ inline uint32_t nearer_trials(const Sizes& z, const Work* work, Norm norm, const Norm* of_trial, int n,
                                         float closest) {
  const float doubt = (static_cast<float>(z.D) + 64) * 0x1p-21f,
              gamma = static_cast<float>(z.depth / 16) * 18 * 0x1p-23f;
  uint32_t nearer = 0;
#pragma unroll 2
  for (int t = 0; t < n; ++t) {
    const Norm other = of_trial[t];
    const float squares = norm.norm * norm.norm + other.norm * other.norm;
    const float slack = 2 * (norm.error * other.norm + norm.norm * other.error) + (doubt + 3 * gamma) * squares;
    const float least = squares - 2 * work->screened[warp_id()][lane_id()][t] - 1.01f * slack - 0x1p-60f;
    if (!(least > closest * (1 + doubt))) nearer |= 1u << t;
  }
  return nearer;
}

// Measures a tile against n <= TRIALS of the points drawn: work.least of `first_trial` and on, from this thread's
// `closest`. norm: of this thread's point.
template <class T, bool IS_RESIDENT>
__device__ void measure_trials(const Sizes& z, const Run& run, const T* points, const Tiles& tiles,
                               const int32_t* trial, int first_trial, int n, int64_t first, int n_rows, int64_t row,
                               Norm norm, float closest) {
  struct OfTrials {
    Norm norm[TRIALS];
  };
  auto& of_trial = static_shared<OfTrials>().norm;
  Work* work = tiles.work;
  trial += first_trial;
  if (thread() < n) of_trial[thread()] = run.norm[trial[thread()]];
  if (thread() == 0) work->n_pairs = 0;
  if (IS_RESIDENT) load_trials<T, true>(z, run, points, tiles, trial, n, 0, static_cast<int>(z.depth));
  uint32_t nearer = closest > 0 ? (1u << n) - 1 : 0;
  if (__syncthreads_or(closest > 0 && closest < INFINITY)) {
    screen<T, IS_RESIDENT>(z, run, points, tiles, first, n_rows, row, TRIALS, [&](int64_t d, int width) {
      if (!IS_RESIDENT) load_trials<T, false>(z, run, points, tiles, trial, n, d, width);
    });
    if (closest > 0) nearer = nearer_trials(z, work, norm, of_trial, n, closest);
  }
  __syncthreads();
#pragma unroll 1
  for (int t = 0; t < n; ++t) work->least[first_trial + t][thread()] = closest;
  const int n_nearer = __popc(nearer), up_to = warp_prefix(n_nearer);
  int at = lane_id() == LANES - 1 && up_to > 0 ? atomicAdd(&work->n_pairs, up_to) : 0;
  at = warp_shuffle(at, LANES - 1) + up_to - n_nearer;
#pragma unroll 1
  for (; nearer; nearer &= nearer - 1)
    work->trial_pair[at++] = static_cast<uint16_t>(thread() * TRIALS + __ffs(static_cast<int>(nearer)) - 1);
  __syncthreads();
  const float scale = scale_of(run);
  const TrialRows rows(z, tiles);
#pragma unroll 1
  for (int base = warp_id() * LANES / QUAD; base < work->n_pairs; base += THREADS / QUAD) {
    const int e = base + lane_id() / QUAD;
    const int pair = work->trial_pair[e < work->n_pairs ? e : base], r = pair / TRIALS, t = pair % TRIALS;
    const T* point = points + (first + r) * z.D;
    const float dist2 = IS_RESIDENT ? trial_dist2<true>(point, scale, rows.first + t * rows.stride, 1.0f, z.D)
                                      : trial_dist2<false>(point, scale, points + trial[t] * z.D, scale, z.D);
    float& least = work->least[first_trial + t][r];
    if (e < work->n_pairs && lane_id() % QUAD == 0 && dist2 < least) least = dist2;
  }
  __syncthreads();
}

struct Trials {
  int32_t point[MAX_TRIALS];
};

// Step number `step` of K: chooses the centroid of the step before, draws, measures; step K only chooses. Without any
// finite point it draws some point, which is at no distance from any.
template <class T, bool IS_RESIDENT>
__device__ void start_plus_plus(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, const T* points,
                                const Tiles& tiles, int64_t step) {
  auto& trial = static_shared<Trials>().point;
  Work* work = tiles.work;
  const int64_t now = step % 2 * z.n_trials, before = (step + 1) % 2 * z.n_trials;
  const int n_trials = step == 0 ? 1 : static_cast<int>(z.n_trials);
  const Best best = step > 0 ? best_trial(z, run, step) : Best{0, 0};
  if (step > 0 && team.rank == 0 && thread() == 0) run.chosen[step - 1] = run.trial[before + best.trial];
  if (step == z.K) return;
  draw(op, team, z, run, step, best, trial);
  __syncthreads();
  if (team.rank == 0 && thread() < n_trials) run.trial[now + thread()] = trial[thread()];
  const float* closest = run.least + (before + best.trial) * z.N;
  int64_t row = 0;
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
    const int64_t i = first + thread();
    const Norm norm = thread() < n ? run.norm[i] : Norm{NAN, 0};
    const float to_chosen = step > 0 && thread() < n ? closest[i] : INFINITY;
    // Not finite: at no distance from anything, so that none is ever drawn.
    const float own = isnan(norm.norm) ? 0 : to_chosen;
#pragma unroll 1
    for (int t = 0; t < n_trials; t += TRIALS)
      measure_trials<T, IS_RESIDENT>(z, run, points, tiles, trial, t, min(TRIALS, n_trials - t), first, n, row, norm,
                                      own);
    if (thread() < n)
#pragma unroll 1
      for (int t = 0; t < n_trials; ++t) run.least[(now + t) * z.N + i] = work->least[t][thread()];
#pragma unroll 1
    for (int t = warp_id(); t < n_trials; t += N_WARPS) {
      double sum = 0;
#pragma unroll
      for (int r = 0; r < TILE; r += LANES) sum += work->least[t][r + lane_id()];
      sum = warp_sum(sum);
      if (lane_id() == 0) run.total[(now + t) * z.n_tiles + tile] = sum;
    }
    __syncthreads();
    row += TILE;
  });
}

// ---- random

// A deck of the finite points is shuffled as far as K.
__device__ inline void start_random(const Kmeans& op, const Team& team, const Sizes& z, const Run& run) {
  const int32_t n = run.control->n_finite;
  if (n == 0 || team.rank > 0) return;
#pragma unroll 1
  for (int32_t i = thread(); i < n; i += THREADS) run.deck[i] = i;
  __syncthreads();
  if (thread() == 0) {
#pragma unroll 1
    for (int32_t k = 0; k < z.K && k < n; ++k) {
      const int32_t other = k + static_cast<int32_t>(uniform(op, team.run, k) * (n - k)), card = run.deck[k];
      run.deck[k] = run.deck[other];
      run.deck[other] = card;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int64_t k = warp_id(); k < z.K; k += N_WARPS) {
    const int64_t i = finite_point(z, run, run.deck[k % n]);
    if (lane_id() == 0) run.chosen[k] = static_cast<int32_t>(i);
  }
}

// ---- from points to centroids

template <class T>
__device__ void write_start(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, const T* points) {
  const int64_t s = set_of(op, team.run);
#pragma unroll 1
  for (int64_t k = team.rank * N_WARPS + warp_id(); k < z.K; k += team.n_blocks * N_WARPS) {
    float* centroid = run.centroid + k * z.D;
    const float* given = op.init ? op.init + (s * z.K + k) * z.D : nullptr;
    bool is_spoilt = false;
    for (int64_t d = lane_id(); given && d < z.D; d += LANES) is_spoilt |= !isfinite(given[d]);
    is_spoilt = warp_any(is_spoilt);
    for (int64_t d = lane_id(); d < z.D; d += LANES) {
      if (given)
        centroid[d] = is_spoilt ? static_cast<float>(run.mean[d]) : given[d];
      else
        centroid[d] = run.control->n_finite == 0 ? 0 : widen(points[run.chosen[k] * z.D + d]);
    }
  }
}

}  // namespace clmfast::kmeans_gpu
