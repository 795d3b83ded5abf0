// What one run of kmeans.cu (one restart of one set) keeps in global memory, and the steps that prepare its points.
//
// A team of blocks works on a run: the blocks of a cluster, or all blocks of a launch that have the same run. Its points
// are cut into tiles, and the tiles dealt out to the blocks. A step ends where blocks must wait for each other; within a
// step none reads what another writes. So the steps are the same for a cluster, which waits at its barrier, and for
// launches, each of which is a step.
//
// The frame. Points are screened as bfloat16 in a frame of their own: x~ = float32(scale x - centre), x^ = bfloat16(x~).
// `scale` is a power of two that brings all coordinates below 1, `centre` about the mean. No result depends on it.
#pragma once

#include <cstdint>

#include "../kmeans.h"
#include "element.cuh"
#include "ptx.cuh"

namespace clmfast::kmeans_gpu {

using bfloat16 = __nv_bfloat16;

constexpr int LANES = 32;
constexpr int N_WARPS = 8;
constexpr int THREADS = N_WARPS * LANES;
constexpr int TILE = THREADS;  // points; a thread each. The CPU sums inertia by as many, so that the bits are the same
constexpr int COLUMNS = 32;    // centroids, or points drawn, that are screened side by side
constexpr int HALF = 16;       // lanes that share one exact distance: those of cpu/pair.h

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Control {
  double bound;       // on the squared moves of the centroids together; negative: not known yet
  int64_t n_iter;
  float scale;
  int32_t n_finite, n_taken;
  int32_t n_changed[2];  // labels, in this iteration and the one before
  int32_t is_active, is_consistent;
};

// A point that an empty cluster takes over from another, until the centroids have moved.
struct Taken {
  int32_t i, from, to;
};

struct Norm {
  float norm;   // at least |x~|; NaN: the point is not finite
  float error;  // at least |scale x - centre - x^|
};

struct Sizes {
  int64_t N, D, K, n_tiles, depth, n_columns, n_trials;

  __host__ __device__ Sizes(const Kmeans& op)
      : N(op.N), D(op.D), K(op.K), n_tiles(ceil_div(N, TILE)), depth(D < 16 ? 16 : ceil_div(D, 16) * 16),
        n_columns(ceil_div(K, COLUMNS) * COLUMNS), n_trials(2) {
    // 2 + floor(ln K): no power of e is an integer
    for (double power = 2.718281828459045; power < static_cast<double>(K); power *= 2.718281828459045) ++n_trials;
  }
};

// Hands out parts of the scratch memory.
struct Parts {
  char* at;

  template <class X>
  __host__ __device__ X* take(int64_t n) {
    X* part = reinterpret_cast<X*>(at);
    at += ceil_div(n * static_cast<int64_t>(sizeof(X)), 256) * 256;
    return part;
  }
};

struct Run {
  Control* control;
  int32_t* reach;            // [D]: bits of the largest |coordinate|
  double *column, *magic;    // [D]: sum of the rounded coordinates; what rounds them (cpu/sums.h)
  double* mean;              // [D]
  float* centre;             // [D]
  Norm* norm;                // [N]
  int32_t* tile_finite;      // [n_tiles]: finite points
  double *tile_norm2, *tile_inertia;  // [n_tiles]: sum of |x~|^2; of dist2
  int32_t* chosen;           // [K]: the points that are the first centroids
  int32_t* trial;            // [2, n_trials]: points drawn in this round and in the one before
  float* least;              // [2, n_trials, N]: dist2 to the nearest of the chosen and the trial; in the frame's units
  double* total;             // [2, n_trials, n_tiles]: its sum
  float* centroid;           // [K, D]
  bfloat16 *high, *low;      // [n_columns, depth]: x~ of the centroids = high + low, nearly
  float2* column_norm;       // [n_columns]: |x~|^2; at least |x~|. Infinity: there is no such centroid
  int32_t *label, *count;    // [N]: -1 before the first; [K]
  double* sum;               // [K, D]: of the rounded points of each cluster
  double *move2, *dist2;     // [K]: how far centroids moved; [N]: dist2 of the points to their centroids
  Taken* taken;              // [K]
  int32_t* deck;             // [N]

  static __host__ __device__ size_t bytes(const Kmeans& op) {
    Parts parts{nullptr};
    Run().place(Sizes(op), parts);
    return reinterpret_cast<size_t>(parts.at);
  }

  static __device__ Run at(const Kmeans& op, char* scratch, int64_t run) {
    Parts parts{scratch + run * bytes(op)};
    Run result;
    result.place(Sizes(op), parts);
    return result;
  }

  __host__ __device__ void place(const Sizes& z, Parts& parts) {
    control = parts.take<Control>(1);
    reach = parts.take<int32_t>(z.D);
    column = parts.take<double>(z.D);
    magic = parts.take<double>(z.D);
    mean = parts.take<double>(z.D);
    centre = parts.take<float>(z.depth);
    norm = parts.take<Norm>(z.N);
    tile_finite = parts.take<int32_t>(z.n_tiles);
    tile_norm2 = parts.take<double>(z.n_tiles);
    tile_inertia = parts.take<double>(z.n_tiles);
    chosen = parts.take<int32_t>(z.K);
    trial = parts.take<int32_t>(2 * z.n_trials);
    least = parts.take<float>(2 * z.n_trials * z.N);
    total = parts.take<double>(2 * z.n_trials * z.n_tiles);
    centroid = parts.take<float>(z.K * z.D);
    high = parts.take<bfloat16>(z.n_columns * z.depth);
    low = parts.take<bfloat16>(z.n_columns * z.depth);
    column_norm = parts.take<float2>(z.n_columns);
    label = parts.take<int32_t>(z.N);
    count = parts.take<int32_t>(z.K);
    sum = parts.take<double>(z.K * z.D);
    move2 = parts.take<double>(z.K);
    dist2 = parts.take<double>(z.N);
    taken = parts.take<Taken>(z.K);
    deck = parts.take<int32_t>(z.N);
  }
};

// The blocks that work on one run.
struct Team {
  int64_t run;
  int rank, n_blocks;

  template <class Visit>
  __device__ void for_tiles(const Sizes& z, const Visit& visit) const {
    for (int64_t tile = rank; tile < z.n_tiles; tile += n_blocks) {
      const int64_t first = tile * TILE;
      visit(tile, first, static_cast<int>(z.N - first < TILE ? z.N - first : TILE));
    }
  }

  // Calls visit(i) for i in [0, n), the threads of all blocks side by side.
  template <class Visit>
  __device__ void for_each(int64_t n, const Visit& visit) const {
    for (int64_t i = static_cast<int64_t>(rank) * THREADS + threadIdx.x; i < n; i += static_cast<int64_t>(n_blocks) * THREADS)
      visit(i);
  }
};

template <class T>
__device__ const T* points_of(const Kmeans& op, int64_t run) {
  return reinterpret_cast<const T*>(op.points) + run / op.n_init * op.N * op.D;
}

__device__ inline const float* init_of(const Kmeans& op, int64_t run) {
  return op.init ? op.init + run / op.n_init * op.K * op.D : nullptr;
}

// Sum over the lanes of a half warp, in the order of cpu/pair.h: lane[l] += lane[l + h] for h = 8, 4, 2, 1.
template <class X>
__device__ X half_sum(X x) {
#pragma unroll
  for (int h = HALF / 2; h > 0; h /= 2) x += warp_shuffle_xor(x, h);
  return x;
}

// pair_dist2 of cpu/pair.h, by the 16 lanes of a half warp, which all get it. No fused multiply-add.
template <class A, class B>
__device__ double pair_dist2(const A* a, const B* b, int64_t D) {
  double lane = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x % HALF; d < D; d += HALF) {
    const double x = static_cast<double>(widen(a[d])) - static_cast<double>(widen(b[d]));
    lane = __dadd_rn(lane, __dmul_rn(x, x));
  }
  return half_sum(lane);
}

// What rounds the coordinates of a column: cpu/sums.h, of which this is find_magic.
__device__ inline double magic_of(int32_t reach, int32_t n) {
  constexpr int STEP = 8;
  const int log2_reach = (reach < 0x00800000 ? 0x00800000 : reach) / 0x00800000 - 127;
  const int log2_n = 32 - __clz(n < 1 ? 1 : n);
  const int exponent = (log2_reach + 1 + log2_n + 1024 + STEP - 1) / STEP * STEP - 1024;
  return __longlong_as_double(static_cast<int64_t>(exponent + 1023) << 52 | int64_t{1} << 51);  // 1.5 * 2^exponent
}

__device__ inline double rounded(double x, double magic) { return x + magic - magic; }

__device__ inline float place(float x, float scale, float centre) { return fmaf(x, scale, -centre); }

// ---- the steps that prepare a run

// within [S, room]: of `known`, which later calls must not trust; or null.
__device__ inline void clear(const Team& team, const Sizes& z, const Run& run, const Kmeans& op, float* within, int64_t room) {
  if (team.rank == 0 && threadIdx.x == 0) *run.control = {-1.0, 0, 1.0f, 0, 0, {0, 0}, 1, 0};
  team.for_each(z.D, [&](int64_t d) { run.reach[d] = 0, run.column[d] = 0; });
  team.for_each(z.N, [&](int64_t i) { run.label[i] = -1; });
  if (within) team.for_each(z.N, [&](int64_t i) { within[team.run / op.n_init * room + i] = INFINITY; });
  team.for_each(z.K, [&](int64_t k) { run.count[k] = 0; });
  team.for_each(z.K * z.D, [&](int64_t e) { run.sum[e] = 0; });
  team.for_each(z.n_columns - z.K, [&](int64_t k) { run.column_norm[z.K + k] = {INFINITY, 0}; });
  team.for_each((z.n_columns - z.K) * z.depth, [&](int64_t e) { run.high[z.K * z.depth + e] = run.low[z.K * z.depth + e] = 0; });
}

// Which points are finite, and how far their coordinates reach.
template <class T>
__device__ void find_reach(const Team& team, const Sizes& z, const Run& run, const T* points) {
  struct Found {
    int32_t is_finite[TILE], n_finite;
  };
  auto& [is_finite, n_finite] = static_shared<Found>();
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
    if (threadIdx.x == 0) n_finite = 0;
    __syncthreads();
    for (int r = warp_id(); r < n; r += N_WARPS) {
      bool is_spoilt = false;
      for (int64_t d = lane_id(); d < z.D; d += LANES) is_spoilt |= !isfinite(widen(points[(first + r) * z.D + d]));
      is_spoilt = warp_ballot(is_spoilt) != 0;
      if (lane_id() == 0) {
        is_finite[r] = !is_spoilt;
        run.norm[first + r] = {is_spoilt ? NAN : 0.0f, 0.0f};
        if (!is_spoilt) atomicAdd(&n_finite, 1);
      }
    }
    __syncthreads();
    for (int64_t d = threadIdx.x; d < z.D; d += THREADS) {
      int32_t reach = 0;  // of floats without their signs, the larger has the larger bits
#pragma unroll 8
      for (int r = 0; r < n; ++r) {
        const int32_t bits = __float_as_int(fabsf(widen(points[(first + r) * z.D + d])));
        if (is_finite[r] && bits > reach) reach = bits;
      }
      atomicMax(&run.reach[d], reach);
    }
    if (threadIdx.x == 0) {
      run.tile_finite[tile] = n_finite;
      atomicAdd(&run.control->n_finite, n_finite);
    }
    __syncthreads();
  });
}

// The sum of each column; exact, so that the order of the blocks does not show.
template <class T>
__device__ void sum_columns(const Team& team, const Sizes& z, const Run& run, const T* points) {
  struct IsFinite {
    int32_t row[TILE];
  };
  auto& is_finite = static_shared<IsFinite>().row;
  team.for_tiles(z, [&](int64_t, int64_t first, int n) {
    if (threadIdx.x < n) is_finite[threadIdx.x] = !isnan(run.norm[first + threadIdx.x].norm);
    __syncthreads();
    for (int64_t d = threadIdx.x; d < z.D; d += THREADS) {
      const double magic = magic_of(run.reach[d], run.control->n_finite);
      double sum = 0;
#pragma unroll 8
      for (int r = 0; r < n; ++r) {
        const float x = widen(points[(first + r) * z.D + d]);
        if (is_finite[r]) sum += rounded(x, magic);
      }
      atomicAdd(&run.column[d], sum);
    }
    __syncthreads();
  });
}

// Every block finds the scale; the columns are shared out.
__device__ inline void find_frame(const Team& team, const Sizes& z, const Run& run, const float* init) {
  struct Largest {
    int32_t reach;
  };
  int32_t& largest = static_shared<Largest>().reach;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  int32_t reach = 0;
  for (int64_t d = threadIdx.x; d < z.D; d += THREADS) reach = max(reach, run.reach[d]);
  for (int64_t e = threadIdx.x; init && e < z.K * z.D; e += THREADS)
    if (isfinite(init[e])) reach = max(reach, __float_as_int(fabsf(init[e])));
  atomicMax(&largest, reach);
  __syncthreads();
  const int exponent = min(max(126 - largest / 0x00800000, -126), 126);  // half the largest |coordinate| to 1, or less
  const float scale = __int_as_float((exponent + 127) << 23);
  if (team.rank == 0 && threadIdx.x == 0) run.control->scale = scale;
  team.for_each(z.D, [&](int64_t d) {
    run.magic[d] = magic_of(run.reach[d], run.control->n_finite);
    run.mean[d] = run.column[d] / max(run.control->n_finite, 1);
    run.centre[d] = static_cast<float>(run.mean[d] * scale);
  });
  __syncthreads();
}

// Norms in the frame; and, where the points stay in shared memory, their x^ [rows of this block, stride].
template <class T, bool IS_RESIDENT>
__device__ void place_points(const Team& team, const Sizes& z, const Run& run, const T* points, bfloat16* resident, int stride) {
  struct Norm2 {
    float row[TILE];
  };
  auto& norm2 = static_shared<Norm2>().row;
  const float scale = run.control->scale, doubt = (static_cast<float>(z.D) + 8) * 0x1p-24f;
  int64_t row = 0;
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
    for (int r = warp_id(); r < TILE; r += N_WARPS) {
      const int64_t i = first + r;
      const bool is_point = r < n && !isnan(run.norm[r < n ? i : first].norm);
      float squares = 0, errors = 0;
      for (int64_t d = lane_id(); d < z.depth; d += LANES) {
        const float x = is_point && d < z.D ? place(widen(points[i * z.D + d]), scale, run.centre[d]) : 0;
        const bfloat16 rounded_x = narrow<bfloat16>(x);
        const float error = x - widen(rounded_x);
        squares += x * x;
        errors += error * error;
        if (IS_RESIDENT) resident[(row + r) * stride + d] = rounded_x;
      }
      squares = warp_sum(squares);
      errors = warp_sum(errors);
      if (lane_id() > 0) continue;
      norm2[r] = squares;
      if (!is_point) continue;
      const float norm = sqrtf(squares) * (1 + doubt) + 0x1p-60f;
      run.norm[i] = {norm, sqrtf(errors) * (1 + doubt) + norm * 0x1p-23f + 0x1p-60f};
    }
    __syncthreads();
    if (warp_id() == 0) {
      double sum = 0;
      for (int r = lane_id(); r < TILE; r += LANES) sum += norm2[r];
      sum = warp_sum(sum);
      if (lane_id() == 0) run.tile_norm2[tile] = sum;
    }
    __syncthreads();
    row += TILE;
  });
}

}  // namespace clmfast::kmeans_gpu
