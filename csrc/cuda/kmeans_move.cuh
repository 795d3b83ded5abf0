// From labels to new centroids, and whether to go on: the rules of kmeans.h.
#pragma once

#include "kmeans_label.cuh"

namespace clmfast::kmeans_gpu {

// What the block knows after a move.
struct Verdict {
  bool is_active, is_consistent;  // go on? are the labels those of the centroids?
};

__device__ inline bool has_empty(const Sizes& z, const Run& run) {
  bool is_any = false;
#pragma unroll 1
  for (int64_t k = thread(); k < z.K; k += THREADS) is_any |= run.count[k] == 0;
  return __syncthreads_or(is_any);
}

// The points farthest from their centroids, one for each empty cluster in turn; of equals the smaller index. One block;
// run.dist2 is used up.
__device__ inline void take_over(const Sizes& z, const Run& run) {
  struct Farthest {
    double dist2[N_WARPS];
    int64_t i[N_WARPS];
    int64_t first;
  };
  Farthest& farthest = static_shared<Farthest>();
  int32_t n_taken = 0;
  for (int64_t k = 0; k < z.K; ++k) {
    if (run.count[k] > 0) continue;
    double dist2 = 0;
    int64_t first = z.N;
    auto consider = [&](double x, int64_t i) {
      if (x > dist2 || (x == dist2 && i < first)) dist2 = x, first = i;
    };
#pragma unroll 4
    for (int64_t i = thread(); i < z.N; i += THREADS) consider(run.dist2[i], i);
#pragma unroll
    for (int h = LANES / 2; h > 0; h /= 2) {
      const double x = warp_shuffle_xor(dist2, h);
      const int64_t i = warp_shuffle_xor(first, h);
      consider(x, i);
    }
    if (lane_id() == 0) farthest.dist2[warp_id()] = dist2, farthest.i[warp_id()] = first;
    __syncthreads();
    if (thread() == 0) {
#pragma unroll 1
      for (int w = 1; w < N_WARPS; ++w) consider(farthest.dist2[w], farthest.i[w]);
      farthest.first = dist2 > 0 ? first : -1;
      if (dist2 > 0) {
        run.dist2[first] = 0;
        run.taken[n_taken] = {static_cast<int32_t>(first), run.label[first], static_cast<int32_t>(k)};
      }
    }
    __syncthreads();
    if (farthest.first < 0) break;
    ++n_taken;
  }
  if (thread() == 0) run.control->n_taken = n_taken;
  __syncthreads();
}

// A row of centroids goes through a warp in pieces of LANES x AHEAD, all reads of a piece on their way together.
constexpr int AHEAD = 8;

// A piece of centroid k, from `base` on.
struct Piece {
  double sum[AHEAD];
  float before[AHEAD], centre[AHEAD];
  int32_t n_points;

  static __device__ Piece of(const Sizes& z, const Run& run, int64_t k, int base) {
    Piece piece;
    const int D = k < z.K ? static_cast<int>(z.D) : 0, first_d = base + lane_id();
    const double* sum = run.sum + k * z.D + first_d;
    const float *before = run.centroid + k * z.D + first_d, *centre = run.centre + first_d;
#pragma unroll
    for (int e = 0; e < AHEAD; ++e) {
      const bool is_there = first_d + e * LANES < D;
      piece.sum[e] = is_there ? sum[e * LANES] : 0;
      piece.before[e] = is_there ? before[e * LANES] : 0;
      piece.centre[e] = is_there ? centre[e * LANES] : 0;
    }
    piece.n_points = k < z.K ? run.count[k] : 0;
    return piece;
  }
  // The first that for_clusters comes to.
  static __device__ Piece first(const Team& team, const Sizes& z, const Run& run) {
    return of(z, run, warp_id() * team.n_blocks + team.rank, 0);
  }
};

template <class Visit>
__device__ void for_clusters(const Team& team, const Sizes& z, const Visit& visit) {
#pragma unroll 1
  for (int64_t k = warp_id() * team.n_blocks + team.rank; k < z.K; k += N_WARPS * team.n_blocks) visit(k);
}

// The placed form of a centroid, as its coordinates become known; by a warp.
struct Placing {
  float scale, squares = 0, errors = 0;

  // x: coordinate d of a centroid; beyond the last one, nothing. centre: of that coordinate. to [depth]: placed form.
  __device__ void add(int D, int depth, half* to, int d, float x, float centre) {
    if (d >= depth) return;
    const float placed = d < D ? place(x, scale, centre) : 0;
    const half rounded_x = narrow<half>(placed);
    const float error = placed - widen(rounded_x);
    squares = fmaf(placed, placed, squares);
    errors = fmaf(error, error, errors);
    to[d] = rounded_x;
  }

  __device__ void finish(const Sizes& z, const Run& run, int64_t k) {
    squares = warp_sum(squares);
    errors = warp_sum(errors);
    if (lane_id() > 0) return;
    const Norm norm = norm_of(z, squares, errors);
    run.column[k] = {squares, norm, Bound::of_centroid(z, norm.norm)};
  }
};

__device__ inline void place_centroids(const Team& team, const Sizes& z, const Run& run) {
  for_clusters(team, z, [&](int64_t k) {
    Placing placing{scale_of(run)};
    const int D = static_cast<int>(z.D), depth = static_cast<int>(z.depth);
#pragma unroll 1
    for (int d = lane_id(); d < depth; d += LANES)
      placing.add(D, depth, run.placed + k * depth, d, d < D ? run.centroid[k * D + d] : 0, run.centre[d]);
    placing.finish(z, run, k);
  });
}

// Division sum / n by a reciprocal (Markstein 1990), the same bits; `inverse` is 1.0 / n. It has no branches, so that
// several are under way. sum * inverse is off by at most 2 ulp, so the remainder is exact, and what it corrects is off by
// 2^-50 ulp. That rounds wrongly only within 2^-50 ulp of the middle between two numbers: n < 2^31 keeps quotients 2^-32
// ulp away from it, but for those that lie on it; and none does, for such a sum would have 54 bits.
__device__ inline double quotient(double sum, double n, double inverse) {
  const double about = __dmul_rn(sum, inverse);
  return fma(fma(-about, n, sum), inverse, about);
}

// Moves every centroid to the mean of its points and those that it takes over. `piece` is the first.
template <class T>
__device__ void move_centroids(const Team& team, const Sizes& z, const Run& run, const T* points, int n_taken,
                               Piece piece) {
  for_clusters(team, z, [&](int64_t k) {
    int32_t n = piece.n_points;
#pragma unroll 1
    for (int e = 0; e < n_taken; ++e) n += (run.taken[e].to == k) - (run.taken[e].from == k);
    const double n_points = max(n, 1), inverse = 1 / n_points;
    Placing placing{scale_of(run)};
    const int D = static_cast<int>(z.D), depth = static_cast<int>(z.depth);
    float* centroid = run.centroid + k * D;
    half* placed = run.placed + k * depth;
    double move2 = 0;  // of lanes below 16, which are those of cpu/pair.h
#pragma unroll 1
    for (int base = 0; base < depth;) {
#pragma unroll 1
      for (int t = 0; t < n_taken; ++t) {
        const int sign = (run.taken[t].to == k) - (run.taken[t].from == k);
        if (sign == 0) continue;
#pragma unroll
        for (int e = 0; e < AHEAD; ++e) {
          const int d = base + e * LANES + lane_id();
          if (d < D) piece.sum[e] += sign * rounded(widen(points[run.taken[t].i * z.D + d]), run.magic[d]);
        }
      }
#pragma unroll
      for (int e = 0; e < AHEAD; ++e) {
        const int d = base + e * LANES + lane_id();
        const float mean = static_cast<float>(quotient(piece.sum[e], n_points, inverse)),
                    next = n > 0 && d < D ? mean : piece.before[e];
        const double difference = static_cast<double>(piece.before[e]) - static_cast<double>(next);
        const double square = __dmul_rn(difference, difference);
        move2 = __dadd_rn(__dadd_rn(move2, square), warp_shuffle_down(square, LANES / 2));
        if (d < D) centroid[d] = next;
        placing.add(D, depth, placed, d, next, piece.centre[e]);
      }
      base += LANES * AHEAD;
      const bool has_more = base < depth;
      piece = Piece::of(z, run, has_more ? k : k + N_WARPS * team.n_blocks, has_more ? base : 0);
    }
#pragma unroll
    for (int h = LANES / 4; h > 0; h /= 2) move2 += warp_shuffle_xor(move2, h);
    if (lane_id() == 0) run.move2[k] = move2;
    placing.finish(z, run, k);
  });
}

// The mean over the coordinates of the variance of the points; all of it by this block.
template <class T>
__device__ double variance(const Sizes& z, const Run& run, const T* points) {
  struct Shared {
    double dist2[TILE];
    double result;
  };
  Shared& shared = static_shared<Shared>();
  double squares = 0;
#pragma unroll 1
  for (int64_t first = 0; first < z.N; first += TILE) {
#pragma unroll 1
    for (int r = warp_id(); r < TILE; r += N_WARPS) {
      double x = 0;
      if (first + r < z.N && run.label[first + r] >= 0)
#pragma unroll 4
        for (int64_t d = lane_id(); d < z.D; d += LANES) {
          const double difference = static_cast<double>(widen(points[(first + r) * z.D + d])) - run.mean[d];
          x += difference * difference;
        }
      x = warp_sum(x);
      if (lane_id() == 0) shared.dist2[r] = x;
    }
    __syncthreads();
    if (thread() == 0)
#pragma unroll 4
      for (double x : shared.dist2) squares += x;
    __syncthreads();
  }
  if (thread() == 0) shared.result = squares / max(run.control->n_finite, 1) / static_cast<double>(z.D < 1 ? 1 : z.D);
  __syncthreads();
  return shared.result;
}

// What the squared moves are compared with, to run.control: the norms of the points in their frame mostly tell enough.
__device__ inline void bound_moves(const Kmeans& op, const Team& team, const Sizes& z, const Run& run) {
  if (team.rank > 0 || warp_id() > 0) return;
  double squares = 0;
#pragma unroll 1
  for (int64_t tile = lane_id(); tile < z.n_tiles; tile += LANES) squares += run.tile_norm2[tile];
  squares = warp_sum(squares);
  if (lane_id() > 0) return;
  const double scale = scale_of(run), n = max(run.control->n_finite, 1);
  const double unit = static_cast<double>(z.D < 1 ? 1 : z.D) * scale * scale,
               doubt = (static_cast<double>(z.D) + 64) * 0x1p-22;
  const double of_centre =
      static_cast<double>(z.D) * 0x1p-46;  // its rounding: |scale mean - centre| < 2^-23 a coordinate
  run.control->low = op.tol * ((squares / n * (1 - doubt) - of_centre) / unit);
  run.control->high = op.tol * ((squares / n * (1 + doubt) + of_centre) / unit);
}

// All threads of all blocks come to the same verdict on iteration n_iter, counted from 1.
template <class T>
__device__ Verdict judge(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, const T* points,
                         int64_t n_iter, int n_taken, int parity) {
  struct Moved {
    double move2[TILE], low, high;
  };
  Moved& moved = static_shared<Moved>();
  const bool has_changed = n_iter == 1 ? run.control->n_finite > 0 : run.control->n_changed[parity] > 0;
  if (thread() == 0) moved.low = run.control->low, moved.high = run.control->high;
  double moved2 = 0;
#pragma unroll 1
  for (int64_t first = 0; first < z.K; first += TILE) {
    const int n = static_cast<int>(z.K - first < TILE ? z.K - first : TILE);
    if (first > 0) __syncthreads();
    if (thread() < n) moved.move2[thread()] = run.move2[first + thread()];
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < n; ++k) moved2 += moved.move2[k];
  }
  // Unchanged labels have the same means as before, so the centroids fit, unless an empty cluster took a point.
  Verdict verdict{has_changed && n_iter < op.max_iter && moved2 > moved.low, !has_changed && n_taken == 0};
  if (!verdict.is_active || moved2 > moved.high) return verdict;
  const double bound = op.tol * variance(z, run, points);
  // Another block that reads either of them before it has left this function comes to the same verdict.
  if (team.rank == 0 && thread() == 0) run.control->low = run.control->high = bound;
  verdict.is_active = moved2 > bound;
  return verdict;
}

}  // namespace clmfast::kmeans_gpu
