// What one run of kmeans.cu (one restart of one set) keeps in global memory, and the steps that prepare its points.
//
// A team of blocks works on a run: the blocks of a cluster, or all blocks of a launch that have the same run. Its points
// are cut into tiles, and the tiles dealt out to the blocks. A step ends where blocks must wait for each other; within a
// step none reads what another writes. So the steps are the same for a cluster, which waits at its barrier, and for
// launches, each of which is a step.
//
// The frame. Points are screened as float16 in a frame of their own: x~ = float32(scale x - centre), x^ = float16(x~).
// `scale` is a power of two that brings all coordinates below 1, `centre` about the mean. No result depends on it.
// float16 leaves an eighth of bfloat16's error, and a coordinate of x~ (mostly < 2, always < 8) is in its range.
#pragma once

#include <cstdint>

#include "../kmeans.h"
#include "element.cuh"
#include "pair.cuh"
#include "ptx.cuh"

namespace clmfast::kmeans_gpu {

using half = __half;

constexpr int LANES = 32;
constexpr int N_WARPS = 8;
constexpr int THREADS = N_WARPS * LANES;
constexpr int TILE = THREADS;  // points; a thread each. The CPU sums inertia by as many, so that the bits are the same
constexpr int COLUMNS = 32;    // centroids, or points drawn, that are screened side by side

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Control {
  double low, high;  // bounds of what the squared moves of the centroids together must exceed for another iteration
  int64_t n_iter;
  int32_t reach;  // bits of the largest |coordinate|
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

struct alignas(16) Column {
  float norm2;  // |x~|^2 of a centroid; infinity: there is none
  Norm bound;
  float own;  // what it adds to the bound of every point; kmeans_label.cuh
};

struct Sizes {
  int64_t N, D, K, n_tiles, depth, n_columns, n_trials;

  Sizes() = default;
  __host__ __device__ Sizes(const Kmeans& op)
      : N(op.N),
        D(op.D),
        K(op.K),
        n_tiles(ceil_div(N, TILE)),
        depth(D < 16 ? 16 : ceil_div(D, 16) * 16),
        n_columns(ceil_div(K, COLUMNS) * COLUMNS),
        n_trials(2) {
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
  double *magic, *mean;               // [D]: what rounds coordinates (cpu/sums.h); their mean
  float* centre;                      // [D]
  Norm* norm;                         // [N]
  int32_t* tile_finite;               // [n_tiles]: finite points
  int32_t* tile_reach;                // [n_tiles, D]: bits of their largest |coordinate|
  double* tile_sum;                   // [n_tiles, D]: of their coordinates
  double *tile_norm2, *tile_inertia;  // [n_tiles]: sum of |x~|^2; of dist2
  int32_t* chosen;                    // [K]: the points that are the first centroids
  int32_t* trial;                     // [2, n_trials]: points drawn in this round and in the one before
  float* least;            // [2, n_trials, N]: dist2 to the nearest of the chosen and the trial; in the frame's units
  double* total;           // [2, n_trials, n_tiles]: its sum
  float* centroid;         // [K, D]
  half* placed;        // [n_columns, depth]: x^ of the centroids
  Column* column;          // [n_columns]
  int32_t *label, *count;  // [N]: -1 before the first; [K]
  double* sum;             // [K, D]: of the rounded points of each cluster
  double *move2, *dist2;   // [K]: how far centroids moved; [N]: dist2 of the points to their centroids
  Taken* taken;            // [K]
  int32_t* deck;           // [N]

  static __host__ __device__ size_t bytes(const Kmeans& op) {
    Parts parts{nullptr};
    Run().place(Sizes(op), parts);
    return reinterpret_cast<size_t>(parts.at);
  }

  static __device__ Run at(const Kmeans& op, char* scratch, int64_t run) {
    return at(Sizes(op), scratch + run * bytes(op));
  }

  static __device__ Run at(const Sizes& z, char* own_scratch) {
    Parts parts{own_scratch};
    Run result;
    result.place(z, parts);
    return result;
  }

  __host__ __device__ void place(const Sizes& z, Parts& parts) {
    control = parts.take<Control>(1);
    magic = parts.take<double>(z.D);
    mean = parts.take<double>(z.D);
    centre = parts.take<float>(z.depth);
    norm = parts.take<Norm>(z.N);
    tile_finite = parts.take<int32_t>(z.n_tiles);
    tile_reach = parts.take<int32_t>(z.n_tiles * z.D);
    tile_sum = parts.take<double>(z.n_tiles * z.D);
    tile_norm2 = parts.take<double>(z.n_tiles);
    tile_inertia = parts.take<double>(z.n_tiles);
    chosen = parts.take<int32_t>(z.K);
    trial = parts.take<int32_t>(2 * z.n_trials);
    least = parts.take<float>(2 * z.n_trials * z.N);
    total = parts.take<double>(2 * z.n_trials * z.n_tiles);
    centroid = parts.take<float>(z.K * z.D);
    placed = parts.take<half>(z.n_columns * z.depth);
    column = parts.take<Column>(z.n_columns);
    label = parts.take<int32_t>(z.N);
    count = parts.take<int32_t>(z.K);
    sum = parts.take<double>(z.K * z.D);
    move2 = parts.take<double>(z.K);
    dist2 = parts.take<double>(z.N);
    taken = parts.take<Taken>(z.K);
    deck = parts.take<int32_t>(z.N);
  }
};

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }

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

// Sums of N numbers of each lane over the lanes, with as many shuffles as numbers and not five times as many: every step
// halves the lanes that a number is spread over, and the numbers of a lane. Lane l gets number l * N / LANES.
template <int N, int H = LANES / 2>
__device__ float warp_sums(float (&x)[N]) {
  if constexpr (H == 0) {
    return x[0];
  } else {
    constexpr int LEFT = N * H / LANES;
    const bool is_upper = lane_id() & H;
    if constexpr (LEFT == 0) x[0] += warp_shuffle_xor(x[0], H);
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const float kept = is_upper ? x[LEFT + i] : x[i], sent = is_upper ? x[i] : x[LEFT + i];
      x[i] = kept + warp_shuffle_xor(sent, H);
    }
    return warp_sums<N, H / 2>(x);
  }
}

// The blocks that work on one run.
struct Team {
  int64_t run;
  int rank, n_blocks;

  template <class Visit>
  __device__ void for_tiles(const Sizes& z, const Visit& visit) const {
#pragma unroll 1
    for (int64_t tile = rank; tile < z.n_tiles; tile += n_blocks) {
      const int64_t first = tile * TILE;
      visit(tile, first, static_cast<int>(z.N - first < TILE ? z.N - first : TILE));
    }
  }

  // Calls visit(i) for i in [0, n), the threads of all blocks side by side.
  template <class Visit>
  __device__ void for_each(int64_t n, const Visit& visit) const {
#pragma unroll 1
    for (int64_t i = static_cast<int64_t>(rank) * THREADS + thread(); i < n;
         i += static_cast<int64_t>(n_blocks) * THREADS)
      visit(i);
  }
};

// The set that a run is of. Runs are fewer than 2^31, and a division of 64 bits takes a hundred instructions.
__device__ inline int64_t set_of(const Kmeans& op, int64_t run) {
  return static_cast<uint32_t>(run) / static_cast<uint32_t>(op.n_init);
}

template <class T>
__device__ const T* points_of(const Kmeans& op, int64_t run) {
  return reinterpret_cast<const T*>(op.points) + set_of(op, run) * op.N * op.D;
}

__device__ inline const float* init_of(const Kmeans& op, int64_t run) {
  return op.init ? op.init + set_of(op, run) * op.K * op.D : nullptr;
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

__device__ inline void clear(const Team& team, const Sizes& z, const Run& run) {
  if (team.rank == 0 && thread() == 0) *run.control = {0, 0, 0, 0, 0, 0, {0, 0}, 1, 0};
  team.for_each(z.N, [&](int64_t i) { run.label[i] = -1; });
  team.for_each(z.K, [&](int64_t k) { run.count[k] = 0; });
  team.for_each(z.K * z.D, [&](int64_t e) { run.sum[e] = 0; });
  team.for_each(z.n_columns - z.K, [&](int64_t k) { run.column[z.K + k] = {INFINITY, {0, 0}, 0}; });
  team.for_each((z.n_columns - z.K) * z.depth, [&](int64_t e) { run.placed[z.K * z.depth + e] = 0.0f; });
}

// Which points are finite, how far their coordinates reach, and their sums.
template <class T>
__device__ void find_reach(const Team& team, const Sizes& z, const Run& run, const T* points) {
  struct Found {
    int32_t is_finite[TILE], n_finite;
  };
  constexpr int AHEAD = 32;
  static_assert(TILE % AHEAD == 0, "rows behind the last are not finite");
  const int D = static_cast<int>(z.D);
  Found& found = static_shared<Found>();
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
    found.is_finite[thread()] = thread() < n;
    if (thread() == 0) found.n_finite = n;
    __syncthreads();
    // Once, and if there are points that are not finite, once more without them.
#pragma unroll 1
    for (bool is_again = false;; is_again = true) {
      bool is_spoilt = false;
#pragma unroll 1
      for (int d = thread(); d < D; d += THREADS) {
        int32_t reach = 0;  // of floats without their signs, the larger has the larger bits
        double sum = 0;
        const T* column = points + first * D + d;
#pragma unroll 1
        for (int base = 0; base < n; base += AHEAD) {
          float x[AHEAD];
#pragma unroll
          for (int r = 0; r < AHEAD; ++r) x[r] = found.is_finite[base + r] ? widen(column[r * D]) : 0;
          column += AHEAD * D;
#pragma unroll
          for (int r = 0; r < AHEAD; ++r) {
            reach = max(reach, __float_as_int(fabsf(x[r])));
            sum += x[r];
          }
        }
        is_spoilt |= reach >= 0x7f800000;
        run.tile_reach[tile * D + d] = reach;
        run.tile_sum[tile * D + d] = sum;
      }
      if (!__syncthreads_or(is_spoilt && !is_again)) break;
#pragma unroll 1
      for (int r = warp_id(); r < n; r += N_WARPS) {
        bool is_row_spoilt = false;
#pragma unroll 4
        for (int d = lane_id(); d < D; d += LANES) is_row_spoilt |= !isfinite(widen(points[(first + r) * D + d]));
        if (!warp_any(is_row_spoilt) || lane_id() > 0) continue;
        found.is_finite[r] = false;
        atomicAdd(&found.n_finite, -1);
      }
      __syncthreads();
    }
    if (thread() < n) run.norm[first + thread()] = {found.is_finite[thread()] ? 0 : NAN, 0};
    if (thread() == 0) {
      run.tile_finite[tile] = found.n_finite;
      add_global(&run.control->n_finite, found.n_finite);
    }
    __syncthreads();
  });
}

// Of every column: how far it reaches, so that sums have their quantum, and the mean.
__device__ inline void find_columns(const Team& team, const Sizes& z, const Run& run, const float* init) {
  const int32_t n = run.control->n_finite;
  int32_t largest = 0;
  team.for_each(z.D, [&](int64_t d) {
    int32_t reach = 0;
    double sum = 0;
#pragma unroll 4
    for (int64_t tile = 0; tile < z.n_tiles; ++tile) {
      reach = max(reach, run.tile_reach[tile * z.D + d]);
      sum += run.tile_sum[tile * z.D + d];
    }
    run.magic[d] = magic_of(reach, n);
    run.mean[d] = sum / max(n, 1);
    largest = max(largest, reach);
  });
  if (init)
    team.for_each(z.K * z.D, [&](int64_t e) {
      if (isfinite(init[e])) largest = max(largest, __float_as_int(fabsf(init[e])));
    });
  if (largest > 0) atomicMax(&run.control->reach, largest);
}

__device__ inline float scale_of(const Run& run) {
  const int exponent = min(max(126 - run.control->reach / 0x00800000, -126), 126);
  return __int_as_float((exponent + 127) << 23);  // brings the largest |coordinate| to 1/2 ... 1
}

__device__ inline float centre_of(const Run& run, int64_t d, float scale) {
  return static_cast<float>(run.mean[d] * scale);
}

// From sums of |x~|^2 and |x~ - x^|^2 in float32.
__device__ inline Norm norm_of(const Sizes& z, float squares, float errors) {
  const float doubt = 1 + (static_cast<float>(z.D) + 8) * 0x1p-24f, norm = sqrtf(squares) * doubt + 0x1p-60f;
  return {norm, sqrtf(errors) * doubt + norm * 0x1p-23f + 0x1p-60f};
}

// Norms in the frame; and, where the points stay in shared memory, their x^ [rows of this block, stride].
template <class T, bool IS_RESIDENT>
__device__ void place_points(const Team& team, const Sizes& z, const Run& run, const T* points, half* resident,
                             int stride) {
  constexpr int ROWS = 8;  // of a warp at a time, so that enough reads are on their way
  struct Norm2 {
    float row[TILE];
  };
  auto& norm2 = static_shared<Norm2>().row;
  const float scale = scale_of(run);
  team.for_each(z.depth, [&](int64_t d) { run.centre[d] = d < z.D ? centre_of(run, d, scale) : 0; });
  int64_t row = 0;
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
#pragma unroll 1
    for (int base = warp_id() * ROWS; base < TILE; base += N_WARPS * ROWS) {
      bool is_point[ROWS];
      float sums[2 * ROWS] = {};  // of squares, and behind them of squared errors
#pragma unroll
      for (int r = 0; r < ROWS; ++r) is_point[r] = base + r < n && !isnan(run.norm[first + base + r].norm);
#pragma unroll 1
      for (int64_t d = lane_id(); d < z.depth; d += LANES) {
        const float centre = d < z.D ? centre_of(run, d, scale) : 0;
        float x[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          x[r] = base + r < n && d < z.D ? widen(points[(first + base + r) * z.D + d]) : 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float placed = is_point[r] && d < z.D ? place(x[r], scale, centre) : 0;
          const half rounded_x = narrow<half>(placed);
          const float error = placed - widen(rounded_x);
          sums[r] = fmaf(placed, placed, sums[r]);
          sums[ROWS + r] = fmaf(error, error, sums[ROWS + r]);
          if (IS_RESIDENT) resident[(row + base + r) * stride + d] = rounded_x;
        }
      }
      const float squares = warp_sums(sums), errors = warp_shuffle_down(squares, LANES / 2);
      constexpr int EACH = LANES / 2 / ROWS;  // lanes that have the squares of the same row
      if (lane_id() < LANES / 2 && lane_id() % EACH == 0) {
        const int r = base + lane_id() / EACH;
        norm2[r] = squares;
        if (r < n && !isnan(run.norm[first + r].norm)) run.norm[first + r] = norm_of(z, squares, errors);
      }
    }
    __syncthreads();
    if (warp_id() == 0) {
      double sum = 0;
#pragma unroll 1
      for (int r = lane_id(); r < TILE; r += LANES) sum += norm2[r];
      sum = warp_sum(sum);
      if (lane_id() == 0) run.tile_norm2[tile] = sum;
    }
    __syncthreads();
    row += TILE;
  });
}

}  // namespace clmfast::kmeans_gpu
