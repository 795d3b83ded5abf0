// The nearest centroid of every point: screened by float16 products of the tensor cores, decided in float64.
//
// The screen of point p and centroid c, in the frame of kmeans_run.cuh (u = 2^-24, P = |p~|, C = |c~|):
//   v = |c~|^2 - 2 p^.c^
// and |p - c|^2 = P^2 + v but for
//   p^ for p and c^ for c           2 (E C + P F),  E >= |p - p^|, F >= |c - c^|: both are known
//   the sum of products             2 P C gamma: each mma cuts 16 products and the sum so far to the 24 bits of the
//                                   largest: at most 18 x 2^-23 of P C a step
//   |c~|^2 and v in float32         (D / 32 + 8) u (C^2 + 2 P C), and twice that with some to spare
// Labels are those of float64 distances as cpu/pair.h computes them, and these are off by less than (D / 16 + 8) 2^-52
// (P^2 + C^2): that is in the bound too. Centroids that it cannot tell from the nearest are measured.
#pragma once

#include "kmeans_run.cuh"

namespace clmfast::kmeans_gpu {

constexpr int CLOSE = 6;  // centroids of a point that are measured; with more, all are
constexpr int SLAB = 64;  // coordinates that are screened at a time where points do not stay in shared memory
constexpr int PAD = 8;    // elements behind each row, so that ldmatrix reads eight rows from eight different banks
constexpr int MAX_TRIALS = 23;  // of a draw: 2 + ln K
constexpr int TRIALS = 8;       // that are measured side by side
constexpr int BUCKETS = 2 * LANES;  // of clusters, by which points that changed theirs are sorted

// What a block keeps beside the points and the centroids.
struct Work {
  union {
    float screened[N_WARPS][LANES][COLUMNS + 1];
    struct {
      double dist2[CLOSE][TILE];
      uint16_t pair[CLOSE * TILE];  // row * CLOSE + which
      uint16_t lost[TILE];          // rows with more than CLOSE close ones
    };
    struct {  // points that enter a sum, or leave it, by bucket
      int32_t cluster[2 * TILE];
      uint16_t row[2 * TILE];  // 2 * row + (leaves?)
    };
    struct {
      float least[MAX_TRIALS][TILE];
      uint16_t trial_pair[TRIALS * TILE];  // row * TRIALS + which
    };
  };
  int32_t close[CLOSE][TILE];
  float low[CLOSE][TILE];
  int32_t n_close[TILE];  // -1: more than CLOSE
  int32_t label[TILE];
  Column column[COLUMNS];
  int32_t n_of[BUCKETS];  // entries
  int32_t n_pairs, n_lost;
};

// How shared memory is used.
struct Tiles {
  Work* work;
  half *points, *columns;  // x^: [rows, stride], [COLUMNS, stride]
  int stride;

  __device__ Tiles(int64_t rows, int64_t depth) : stride(static_cast<int>(depth) + PAD) {
    work = dynamic_shared<Work>();
    points = reinterpret_cast<half*>(work + 1);
    columns = points + rows * stride;
  }

  static constexpr int64_t bytes(int64_t rows, int64_t depth) {
    return static_cast<int64_t>(sizeof(Work)) +
           (rows + COLUMNS) * (depth + PAD) * static_cast<int64_t>(sizeof(half));
  }
};
static_assert(sizeof(Work) % 16 == 0 && sizeof(Column) == 16, "both are copied by 16 bytes");

// What v is off by, in parts that depend on the point and parts that depend on the centroid.
struct Bound {
  float of_norm, of_error, own;  // times C; times F; the rest

  struct Rates {
    float of_product, of_norm2, of_float64;

    __device__ explicit Rates(const Sizes& z) {
      const float gamma = static_cast<float>(z.depth / 16) * 18 * 0x1p-23f;
      of_product = 3 * gamma;  // 2, and half as much again: below the largest D gamma stays below 1/6
      of_norm2 = (static_cast<float>(z.D) + 512) * 0x1p-28f;
      of_float64 = (static_cast<float>(z.D) + 128) * 0x1p-56f;
    }
  };
  static constexpr float DOUBT = 1.02f;  // covers the float32 arithmetic done here, and E F

  __device__ Bound(const Sizes& z, Norm point) {
    const Rates rates(z);
    of_norm = DOUBT * (2 * point.error + (rates.of_product + 2 * rates.of_norm2) * point.norm);
    of_error = DOUBT * 2 * point.norm;
    own = DOUBT * rates.of_float64 * point.norm * point.norm + static_cast<float>(z.depth) * 0x1p-120f;
  }

  static __device__ float of_centroid(const Sizes& z, float norm) {
    const Rates rates(z);
    return DOUBT * (rates.of_norm2 + rates.of_float64) * norm * norm;
  }

  __device__ float to(const Column& centroid) const {
    return fmaf(of_norm, centroid.bound.norm, fmaf(of_error, centroid.bound.error, centroid.own + own));
  }
};

// ---- screen

// sum [2 x 16 rows, 4 x 8 columns] += the warp's rows of points . n_blocks x 8 columns
__device__ inline void multiply(float (&sum)[2][4][4], const half* points, const half* columns, int stride,
                                int n_steps, int n_blocks) {
  const int lane = lane_id();
  points += (lane % 16) * stride + lane / 16 * 8;
  columns += (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll 2
  for (int step = 0; step < n_steps; ++step) {
    uint32_t a[2][4], b[4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], points + m * 16 * stride + step * 16);
#pragma unroll
    for (int block = 0; block < 4; block += 2) {
      if (block >= n_blocks) break;
      const half* from = columns + block * 8 * stride + step * 16;
      const bool is_pair = block + 1 < n_blocks;
      if (is_pair)
        ldmatrix_x4(b, from);
      else
        ldmatrix_x2(b, from);
#pragma unroll
      for (int m = 0; m < 2; ++m) mma_m16n8k16_fp16(sum[m][block], a[m], b, sum[m][block]);
      if (!is_pair) break;
#pragma unroll
      for (int m = 0; m < 2; ++m) mma_m16n8k16_fp16(sum[m][block + 1], a[m], b + 2, sum[m][block + 1]);
    }
  }
}

// The products of the warp's rows to where a lane finds those of its row.
__device__ inline void turn(const float (&sum)[2][4][4], float (*screened)[COLUMNS + 1]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int block = 0; block < 4; ++block)
#pragma unroll
      for (int e = 0; e < 4; ++e) screened[m * 16 + e / 2 * 8 + g][block * 8 + 2 * t + e % 2] = sum[m][block][e];
  __syncwarp();
}

// Coordinates first_d ... of COLUMNS centroids from first_column on: they are on their way.
__device__ inline void load_columns(const Sizes& z, const Run& run, const Tiles& tiles, int64_t first_column,
                                    int64_t first_d, int width) {
#pragma unroll 1
  for (int column = warp_id(); column < COLUMNS; column += N_WARPS) {
    const half* from = run.placed + (first_column + column) * z.depth + first_d;
#pragma unroll 1
    for (int at = lane_id() * 8; at < width; at += LANES * 8)
      cp_async_16(tiles.columns + column * tiles.stride + at, from + at);
  }
  if (thread() < COLUMNS) cp_async_16(tiles.work->column + thread(), run.column + first_column + thread());
  cp_async_commit();
}

// Coordinates first_d ... of n points, placed in the frame; zeros for rows that are none.
template <class T>
__device__ void load_slab(const Sizes& z, const Run& run, const T* points, const Tiles& tiles, int64_t first, int n,
                          int64_t first_d, int width) {
  constexpr int ROWS = THREADS / SLAB;
  const int column = thread() % SLAB;
  if (column >= width) return;
  const int64_t d = first_d + column;
  const float scale = scale_of(run), centre = run.centre[d];
#pragma unroll 8
  for (int r = thread() / SLAB; r < TILE; r += ROWS) {
    const float x = r < n && d < z.D ? place(widen(points[(first + r) * z.D + d]), scale, centre) : 0;
    tiles.points[r * tiles.stride + column] =
        narrow<half>(x);  // a point that is not finite spoils its own row alone
  }
}

// Multiplies a tile by COLUMNS columns, and leaves the products in work.screened, each warp those of its rows.
// load(first_d, width) brings the columns. Points that are resident stand `row` rows behind tiles.points.
template <class T, bool IS_RESIDENT, class Load>
__device__ void screen(const Sizes& z, const Run& run, const T* points, const Tiles& tiles, int64_t first, int n,
                       int64_t row, int n_columns, const Load& load) {
  float sum[2][4][4] = {};
  const int slab = IS_RESIDENT ? static_cast<int>(z.depth) : SLAB;
  for (int64_t d = 0; d < z.depth; d += slab) {
    const int width = static_cast<int>(z.depth - d < slab ? z.depth - d : slab);
    __syncthreads();
    load(d, width);
    if (!IS_RESIDENT) load_slab(z, run, points, tiles, first, n, d, width);
    cp_async_wait<0>();
    __syncthreads();
    multiply(sum, tiles.points + (row + warp_id() * LANES) * tiles.stride, tiles.columns, tiles.stride, width / 16,
             (n_columns + 7) / 8);
  }
  turn(sum, tiles.work->screened[warp_id()]);
}

// The centroids that may be the nearest, by rising index, of a row each thread.
class Candidates {
 public:
  __device__ explicit Candidates(Work* work) : work_(work) {}

  // n columns that have been screened, of which the first is centroid `first`. Two rounds, neither of which waits for
  // what the column before it came to: the limit, then those that it leaves.
  __device__ void consider(int32_t first, int n, const Bound& bound) {
    const float* screened = work_->screened[warp_id()][lane_id()];
    auto v_of = [&](int k, float norm2) { return fmaf(-2, screened[k], norm2); };
#pragma unroll 4
    for (int k = 0; k < n; ++k) {
      const Column column = work_->column[k];
      limit_ = fminf(limit_, v_of(k, column.norm2) + bound.to(column));
    }
    uint32_t close = 0;
#pragma unroll 4
    for (int k = 0; k < n; ++k) {
      const Column column = work_->column[k];
      if (v_of(k, column.norm2) - bound.to(column) <= limit_) close |= 1u << k;
    }
#pragma unroll 1
    for (; close && !is_lost_; close &= close - 1) {
      if (n_ == CLOSE) shrink();
      is_lost_ = n_ == CLOSE;
      if (is_lost_) break;
      const int k = __ffs(static_cast<int>(close)) - 1;
      const Column column = work_->column[k];
      work_->close[n_][thread()] = first + k;
      work_->low[n_][thread()] = v_of(k, column.norm2) - bound.to(column);
      ++n_;
    }
  }

  __device__ void finish() {
    shrink();
    work_->n_close[thread()] = is_lost_ ? -1 : n_;
  }

 private:
  // Forgets those that a later one has beaten.
  __device__ void shrink() {
    int n = 0;
#pragma unroll 1
    for (int e = 0; e < n_; ++e) {
      if (work_->low[e][thread()] > limit_) continue;
      work_->close[n][thread()] = work_->close[e][thread()];
      work_->low[n][thread()] = work_->low[e][thread()];
      ++n;
    }
    n_ = n;
  }

  Work* work_;
  float limit_ = INFINITY;  // at least the least v
  int n_ = 0;
  bool is_lost_ = false;
};

// ---- decide

// Measures the close centroids of all rows that have more than one. Half a warp takes a pair, and in a row that has lost
// its list every other centroid, so that one copy of the distance does both.
template <class T>
__device__ void measure_close(const Sizes& z, const Run& run, const T* points, Work* work, int64_t first) {
  if (thread() == 0) work->n_pairs = work->n_lost = 0;
  __syncthreads();
  const int row = thread(), n = work->n_close[row];
  if (n > 1) {
    int at = atomicAdd(&work->n_pairs, n);
#pragma unroll 1
    for (int e = 0; e < n; ++e) work->pair[at++] = static_cast<uint16_t>(row * CLOSE + e);
  }
  if (n < 0) work->lost[atomicAdd(&work->n_lost, 1)] = static_cast<uint16_t>(row);
  __syncthreads();
  constexpr int SIDE_BY_SIDE = LANES / HALF_WARP;
  const int which = lane_id() / HALF_WARP, D = static_cast<int>(z.D), n_pairs = work->n_pairs;
  // First the pairs, SIDE_BY_SIDE of them a task, then the rows.
  const int n_of_pairs = (n_pairs + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE, n_tasks = n_of_pairs + work->n_lost;
#pragma unroll 1
  for (int task = warp_id(); task < n_tasks; task += N_WARPS) {
    const bool is_pair = task < n_of_pairs;
    const int at = min(task * SIDE_BY_SIDE + which, n_pairs - 1), pair = is_pair ? work->pair[at] : 0,
              of_row = is_pair ? pair / CLOSE : work->lost[task - n_of_pairs];
    const int begin = is_pair ? work->close[pair % CLOSE][of_row] : which, last = static_cast<int>(z.K) - 1;
    double best = INFINITY;
    int label = last + 1;
    auto consider = [&](double dist2, int k) {
      if (dist2 < best || (dist2 == best && k < label)) best = dist2, label = k;
    };
    const int n_rounds = is_pair ? 1 : last / SIDE_BY_SIDE + 1;
#pragma unroll 1
    for (int round = 0; round < n_rounds; ++round) {
      const int k = min(begin + round * SIDE_BY_SIDE, last);
      consider(half_warp_dist2(points + (first + of_row) * z.D, run.centroid + k * z.D, D), k);
    }
    if (is_pair) {
      if (lane_id() % HALF_WARP == 0) work->dist2[pair % CLOSE][of_row] = best;  // a last one alone is written twice
    } else {
      const double dist2 = warp_shuffle_xor(best, HALF_WARP);
      const int k = warp_shuffle_xor(label, HALF_WARP);
      consider(dist2, k);
      if (lane_id() == 0) work->label[of_row] = label;
    }
  }
  __syncthreads();
}

// The label of this thread's row.
__device__ inline int32_t decide(const Work* work) {
  const int row = thread(), n = work->n_close[row];
  if (n < 0) return work->label[row];
  int best = 0;
#pragma unroll 1
  for (int e = 1; e < n; ++e)
    if (work->dist2[e][row] < work->dist2[best][row]) best = e;
  return n > 0 ? work->close[best][row] : -1;
}

// ---- sums

// Adds the n points of `cluster` and `row` that changed their cluster to the sums, and takes them from those that they
// leave. Warps share out columns, and then points; a lane has WIDE columns, and AHEAD points on their way.
template <class T>
__device__ void sum_changed(const Sizes& z, const Run& run, const T* points, const Work* work, int64_t first, int n) {
  constexpr int AHEAD = 8, WIDE = 4;
  const int D = static_cast<int>(z.D), n_slices = (max(D, 1) + WIDE * LANES - 1) / (WIDE * LANES),
            n_parts = n_slices < N_WARPS ? N_WARPS / n_slices : 1;
#pragma unroll 1
  for (int task = warp_id(); task < n_slices * n_parts; task += N_WARPS) {
    const int part = task / n_slices, first_d = (task - part * n_slices) * WIDE * LANES + lane_id();
    const int begin = n * part / n_parts, end = n * (part + 1) / n_parts;
    const T* column = points + first * z.D + first_d;
    double magic[WIDE], sum[WIDE] = {};
#pragma unroll
    for (int c = 0; c < WIDE; ++c) magic[c] = first_d + c * LANES < D ? run.magic[first_d + c * LANES] : 0;
#pragma unroll 1
    for (int base = begin; base < end; base += AHEAD) {
      float x[AHEAD][WIDE];
#pragma unroll
      for (int e = 0; e < AHEAD; ++e) {
        const T* point = column + work->row[min(base + e, end - 1)] / 2 * D;
#pragma unroll
        for (int c = 0; c < WIDE; ++c) x[e][c] = first_d + c * LANES < D ? widen(point[c * LANES]) : 0;
      }
#pragma unroll
      for (int e = 0; e < AHEAD; ++e) {
        if (base + e >= end) break;
        const bool leaves = work->row[base + e] % 2;
#pragma unroll
        for (int c = 0; c < WIDE; ++c)
          sum[c] += rounded(leaves ? -x[e][c] : x[e][c], magic[c]);  // -rounded(x), as ties go to the even one
        const int32_t cluster = work->cluster[base + e];
        if (base + e + 1 < end && work->cluster[base + e + 1] == cluster) continue;
        double* to = run.sum + static_cast<int64_t>(cluster) * D + first_d;
#pragma unroll
        for (int c = 0; c < WIDE; ++c) {
          if (first_d + c * LANES < D) add_global(to + c * LANES, sum[c]);
          sum[c] = 0;
        }
      }
    }
  }
}

// ---- the steps

// Labels the points, and brings the sums up to date with the labels. has_columns: load_columns was called for the first
// columns, which are all that a block with one tile needs.
template <class T, bool IS_RESIDENT>
__device__ void label_points(const Team& team, const Sizes& z, const Run& run, const T* points, const Tiles& tiles,
                             int parity, bool has_columns = false) {
  Work* work = tiles.work;
  int64_t row = 0;
  team.for_tiles(z, [&](int64_t, int64_t first, int n) {
    const int64_t i = first + thread();
    const Norm norm = thread() < n ? run.norm[i] : Norm{NAN, 0};
    const int32_t before = thread() < n ? run.label[i] : -1;
    const Bound bound(z, norm);
    if (thread() < BUCKETS) work->n_of[thread()] = 0;
    Candidates candidates(work);
#pragma unroll 1
    for (int64_t column = 0; column < z.K; column += COLUMNS) {
      const int n_columns = static_cast<int>(z.K - column < COLUMNS ? z.K - column : COLUMNS);
      screen<T, IS_RESIDENT>(z, run, points, tiles, first, n, row, n_columns,
                             [&](int64_t d, int width) {
                               if (!has_columns) load_columns(z, run, tiles, column, d, width);
                               has_columns = false;
                             });
      if (!isnan(norm.norm)) candidates.consider(static_cast<int32_t>(column), n_columns, bound);
    }
    candidates.finish();
    __syncthreads();
    measure_close(z, run, points, work, first);
    const int32_t label = decide(work);
    const bool has_changed = thread() < n && label != before, enters = has_changed && label >= 0,
               leaves = has_changed && before >= 0;
    const int rank_in = enters ? atomicAdd(&work->n_of[label % BUCKETS], 1) : 0,
              rank_out = leaves ? atomicAdd(&work->n_of[before % BUCKETS], 1) : 0;
    const int n_changed = __syncthreads_count(has_changed);
    if (n_changed > 0) {
      if (has_changed) run.label[i] = label;
      if (thread() == 0) add_global(&run.control->n_changed[parity], n_changed);
      // Where each bucket begins: two buckets a lane.
      const int of_two = work->n_of[2 * lane_id()] + work->n_of[2 * lane_id() + 1], up_to = warp_prefix(of_two);
      auto begin_of = [&](int32_t cluster) {
        const int bucket = max(cluster, 0) % BUCKETS, begin = warp_shuffle(up_to - of_two, bucket / 2);
        return begin + (bucket % 2 ? work->n_of[bucket - 1] : 0);
      };
      const int at_in = begin_of(label) + rank_in, at_out = begin_of(before) + rank_out,
                n_entries = warp_shuffle(up_to, LANES - 1);
      auto enter = [&](int at, int32_t cluster, int leaves) {
        work->cluster[at] = cluster;
        work->row[at] = static_cast<uint16_t>(2 * thread() + leaves);
        add_global(&run.count[cluster], 1 - 2 * leaves);
      };
      if (enters) enter(at_in, label, 0);
      if (leaves) enter(at_out, before, 1);
      __syncthreads();
      sum_changed(z, run, points, work, first, n_entries);
    }
    row += TILE;
  });
}

// dist2 of every point to its centroid, 0 for those that have none; and its sum over each tile, in the CPU's order.
template <class T>
__device__ void measure_own(const Team& team, const Sizes& z, const Run& run, const T* points, bool is_summed) {
  struct Own {
    double dist2[TILE];
  };
  Own& own = static_shared<Own>();
  team.for_tiles(z, [&](int64_t tile, int64_t first, int n) {
#pragma unroll 1
    for (int base = warp_id() * LANES / QUAD; base < n; base += THREADS / QUAD) {
      const int r = base + lane_id() / QUAD;
      const int64_t i = first + (r < n ? r : base);
      const int32_t label = run.label[i];
      const double dist2 = far_pair_dist2(points + i * z.D, run.centroid + (label < 0 ? 0 : label) * z.D, z.D);
      if (r < n && lane_id() % QUAD == 0) own.dist2[r] = run.dist2[i] = label < 0 ? 0 : dist2;
    }
    if (!is_summed) return;
    __syncthreads();
    if (thread() == 0) {
      double sum = 0;
#pragma unroll 8
      for (int r = 0; r < n; ++r) sum += own.dist2[r];
      run.tile_inertia[tile] = sum;
    }
    __syncthreads();
  });
}

}  // namespace clmfast::kmeans_gpu
