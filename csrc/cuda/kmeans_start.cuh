// The first centroids: greedy k-means++, or points of different index, or those that were given.
//
// k-means++ takes one step for each centroid. In step r every block finds out, from what all blocks wrote in step r - 1,
// which of the points drawn there was the best, and draws the next ones; then it measures its own points. So blocks wait
// once for each centroid.
//
// Distances are float32 sums of squared differences in the lanes of cpu/pair.h, with fused multiply-add: the bits of the
// CPU's, where it has that instruction. Sums of them are float64 in an order of our own: they agree to rounding.
#pragma once

#include "kmeans_label.cuh"

namespace clmfast::kmeans_gpu {

// Uniform in [0, 1), as in cpu/kmeans.cpp.
__device__ inline double uniform(const Kmeans& op, int64_t run, int64_t draw) {
  uint64_t hash = 0;
  for (int64_t x : {op.seed, run / op.n_init, run % op.n_init, draw}) {
    hash += static_cast<uint64_t>(x) + 0x9e3779b97f4a7c15;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
  }
  return static_cast<double>(hash >> 11) * 0x1p-53;
}

// ---- by one warp

// Sum of the lanes up to and with this one.
template <class X>
__device__ X warp_prefix(X x) {
#pragma unroll
  for (int h = 1; h < LANES; h *= 2) {
    const X below = warp_shuffle_up(x, h);
    if (lane_id() >= h) x += below;
  }
  return x;
}

__device__ inline int first_lane(uint32_t ballot) { return __ffs(static_cast<int>(ballot)) - 1; }
__device__ inline int last_lane(uint32_t ballot) { return 31 - __clz(static_cast<int>(ballot)); }

// Of n parts the first with which the sum of the parts exceeds the target; `before`: the sum in front of it. Rounding
// may leave no such part: then the last that is not 0. Parts of 0 are never found. value(i): part i.
template <class X, class Value>
__device__ int64_t find_part(int64_t n, X target, X& before, const Value& value) {
  X base = 0;
  int64_t last = 0;
  before = 0;
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
  return first + find_part<int32_t>(n, j - before, before, [&](int64_t r) { return isnan(run.norm[first + r].norm) ? 0 : 1; });
}

// The point that is drawn by a target, in proportion to `least`.
__device__ inline int64_t drawn_point(const Sizes& z, const float* least, const double* total, double target) {
  double before;
  const int64_t tile = find_part<double>(z.n_tiles, target, before, [&](int64_t i) { return total[i]; });
  const int64_t first = tile * TILE, n = z.N - first < TILE ? z.N - first : TILE;
  return first + find_part<double>(n, target - before, before, [&](int64_t r) { return static_cast<double>(least[first + r]); });
}

__device__ inline double sum_of_tiles(const Sizes& z, const double* total) {
  double sum = 0;
  for (int64_t tile = lane_id(); tile < z.n_tiles; tile += LANES) sum += total[tile];
  return warp_sum(sum);
}

// ---- k-means++

struct Drawn {
  double potential[MAX_TRIALS];
  int32_t trial[MAX_TRIALS];
  int32_t best;
};

// Which trial of the step before was the best, in `drawn`, and which point it is.
__device__ inline int32_t choose(const Sizes& z, const Run& run, int64_t step, Drawn& drawn) {
  const int64_t n = step == 1 ? 1 : z.n_trials, before = (step - 1) % 2 * z.n_trials;
  for (int64_t t = warp_id(); t < n; t += N_WARPS) {
    const double potential = sum_of_tiles(z, run.total + (before + t) * z.n_tiles);
    if (lane_id() == 0) drawn.potential[t] = potential;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    drawn.best = 0;
    for (int t = 1; t < n; ++t)
      if (drawn.potential[t] < drawn.potential[drawn.best]) drawn.best = t;
  }
  __syncthreads();
  return run.trial[before + drawn.best];
}

// Draws this step's points to drawn.trial.
__device__ inline void draw(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, int64_t step, Drawn& drawn) {
  if (step == 0) {
    if (warp_id() == 0) {
      const int32_t j = static_cast<int32_t>(uniform(op, team.run, 0) * run.control->n_finite);
      const int64_t i = finite_point(z, run, j);
      if (lane_id() == 0) drawn.trial[0] = static_cast<int32_t>(i);
    }
    return;
  }
  const int64_t before = (step - 1) % 2 * z.n_trials + drawn.best;
  const double potential = drawn.potential[drawn.best];
  for (int64_t t = warp_id(); t < z.n_trials; t += N_WARPS) {
    // With every point on a centroid, the last one is taken again.
    int64_t i = run.trial[before];
    if (potential > 0)
      i = drawn_point(z, run.least + before * z.N, run.total + before * z.n_tiles,
                      uniform(op, team.run, 1 + (step - 1) * z.n_trials + t) * potential);
    if (lane_id() == 0) drawn.trial[t] = static_cast<int32_t>(i);
  }
}

// float32 dist2 of a point to four others, in the frame's units, by half a warp.
template <class T>
__device__ void four_dist2(const T* point, const T* const (&other)[4], int64_t D, float scale, float (&dist2)[4]) {
  const int64_t n_whole = D / HALF * HALF;
#pragma unroll
  for (float& x : dist2) x = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x % HALF; d < n_whole; d += HALF) {
    const float x = widen(point[d]) * scale;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float difference = x - widen(other[t][d]) * scale;
      dist2[t] = fmaf(difference, difference, dist2[t]);
    }
  }
#pragma unroll
  for (float& x : dist2) x = half_sum(x);
  for (int64_t d = n_whole; d < D; ++d) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float difference = widen(point[d]) * scale - widen(other[t][d]) * scale;
      dist2[t] = fmaf(difference, difference, dist2[t]);
    }
  }
}

// Measures this block's points against the points drawn: work.least of `n_trials` and the tile, from `closest`.
template <class T>
__device__ void measure_trials(const Sizes& z, const Run& run, const T* points, Work* work, const Drawn& drawn, int n_trials,
                               int64_t first, int n, const float* closest) {
  const float scale = run.control->scale;
  for (int base = 0; base < TILE; base += THREADS / HALF) {
    const int r = base + threadIdx.x / HALF;
    const int64_t i = first + (r < n ? r : 0);
    // Not finite: at no distance from anything, so that none is ever drawn.
    const float least = r >= n || isnan(run.norm[i].norm) ? 0 : closest ? closest[i] : INFINITY;
    for (int t = 0; t < n_trials; t += 4) {
      const T* other[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) other[e] = points + drawn.trial[t + e < n_trials ? t + e : t] * z.D;
      float dist2[4] = {};
      if (warp_any(least > 0)) four_dist2(points + i * z.D, other, z.D, scale, dist2);
      if (threadIdx.x % HALF == 0)
        for (int e = 0; e < 4 && t + e < n_trials; ++e) work->least[t + e][r] = dist2[e] < least ? dist2[e] : least;
    }
  }
  __syncthreads();
}

// Step number `step` of K: chooses the centroid of the step before, draws, measures.
template <class T>
__device__ void start_plus_plus(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, const T* points, Work* work,
                                int64_t step) {
  if (run.control->n_finite == 0) return;
  Drawn& drawn = static_shared<Drawn>();
  const int64_t now = step % 2 * z.n_trials, before = (step + 1) % 2 * z.n_trials;
  const int n_trials = step == 0 ? 1 : static_cast<int>(z.n_trials);
  if (step > 0) {
    const int32_t i = choose(z, run, step, drawn);
    if (team.rank == 0 && threadIdx.x == 0) run.chosen[step - 1] = i;
  }
  draw(op, team, z, run, step, drawn);
  __syncthreads();
  if (team.rank == 0 && threadIdx.x < n_trials) run.trial[now + threadIdx.x] = drawn.trial[threadIdx.x];
  const float* closest = step == 0 ? nullptr : run.least + (before + drawn.best) * z.N;
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
    measure_trials(z, run, points, work, drawn, n_trials, first, n, closest);
    for (int t = 0; t < n_trials; ++t) {
      const float least = work->least[t][threadIdx.x];
      if (threadIdx.x < n) run.least[(now + t) * z.N + first + threadIdx.x] = least;
      const double sum = warp_sum(static_cast<double>(least));
      if (lane_id() == 0) work->warp_total[t][warp_id()] = sum;
    }
    __syncthreads();
    if (threadIdx.x < n_trials) {
      double sum = 0;
      for (double x : work->warp_total[threadIdx.x]) sum += x;
      run.total[(now + threadIdx.x) * z.n_tiles + tile] = sum;
    }
    __syncthreads();
  });
}

// The last centroid.
__device__ inline void finish_plus_plus(const Team& team, const Sizes& z, const Run& run) {
  if (run.control->n_finite == 0 || team.rank > 0) return;
  const int32_t i = choose(z, run, z.K, static_shared<Drawn>());
  if (threadIdx.x == 0) run.chosen[z.K - 1] = i;
}

// ---- random

// A deck of the finite points is shuffled as far as K.
__device__ inline void start_random(const Kmeans& op, const Team& team, const Sizes& z, const Run& run) {
  const int32_t n = run.control->n_finite;
  if (n == 0 || team.rank > 0) return;
  for (int32_t i = threadIdx.x; i < n; i += THREADS) run.deck[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int32_t k = 0; k < z.K && k < n; ++k) {
      const int32_t other = k + static_cast<int32_t>(uniform(op, team.run, k) * (n - k)), card = run.deck[k];
      run.deck[k] = run.deck[other];
      run.deck[other] = card;
    }
  }
  __syncthreads();
  for (int64_t k = warp_id(); k < z.K; k += N_WARPS) {
    const int64_t i = finite_point(z, run, run.deck[k % n]);
    if (lane_id() == 0) run.chosen[k] = static_cast<int32_t>(i);
  }
}

// ---- from points to centroids

template <class T>
__device__ void write_start(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, const T* points) {
  const int64_t s = team.run / op.n_init;
  for (int64_t k = team.rank * N_WARPS + warp_id(); k < z.K; k += team.n_blocks * N_WARPS) {
    float* centroid = run.centroid + k * z.D;
    const float* given = op.init ? op.init + (s * z.K + k) * z.D : nullptr;
    bool is_spoilt = false;
    for (int64_t d = lane_id(); given && d < z.D; d += LANES) is_spoilt |= !isfinite(given[d]);
    is_spoilt = warp_any(is_spoilt);
    for (int64_t d = lane_id(); d < z.D; d += LANES) {
      if (given) centroid[d] = is_spoilt ? static_cast<float>(run.mean[d]) : given[d];
      else centroid[d] = run.control->n_finite == 0 ? 0 : widen(points[run.chosen[k] * z.D + d]);
    }
  }
}

}  // namespace clmfast::kmeans_gpu
