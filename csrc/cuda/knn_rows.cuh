// What knn.cu's kernels read: every row rounded to float16 about the set's centre, with the error of that, and which
// points are equal. Why a screen on these is safe is told there.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "../knn.h"
#include "element.cuh"
#include "nearest.cuh"
#include "pair.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr float INF = INFINITY;
constexpr int ROUND_UP = 128;      // rows of a prepared set: a multiple of every engine's tiles
constexpr int N_SAMPLES = 32;      // rows that centre and unit are taken from
constexpr int SAMPLE_REACH = 11;   // the sample's largest coordinate is below 2^11 units: others may be 16 times larger
constexpr double LARGEST = 65504;  // of float16
constexpr double SHARE = 1.0 / 2048;  // e above: as small as r_p^2 / e allows, which it makes 1e-5 n or so
constexpr int MOST_DIFFERENT = 1024;  // points of a set that each query may measure
constexpr float ROUNDING = 0x1p-12f;  // |y - h| over |y|, or a little more than it usually is: the root mean square is
                                      // three quarters of it

__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// gamma above. A tensor core aligns a few products at a time with the sum so far and cuts off what sticks out below the
// largest one's last place: of V100's kind, four products and no place to spare, at most 1.25 D such losses of 2^-23;
// then the sum with floor is rounded, and the constants are.
__device__ double product_error(int64_t D) { return 1.25 * static_cast<double>(D) * 0x1p-23 + 0x1p-20; }

// At most, and at least, x.
__device__ float float_below(double x) { return __double2float_rd(x); }
__device__ float float_above(double x) { return __double2float_ru(x); }

// ---- the prepared rows

// What the screen needs of a point beside its cells.
struct alignas(8) Column {
  float floor;    // infinity: nobody's neighbour
  int32_t group;  // 0 without groups
};

// Groups are compared as 32 bits. Other ones are OTHER_GROUP, which no query has: those that do are the exact kernel's.
constexpr int32_t OTHER_GROUP = INT32_MIN;
__device__ int32_t short_group(int64_t group) {
  return group == static_cast<int32_t>(group) ? static_cast<int32_t>(group) : OTHER_GROUP;
}

struct Rows {
  __half* cell;     // [S, n, depth]: h, zeros behind the coordinates and behind the rows
  Column* column;   // [n_views, S, n]
  uint64_t* hash;   // [S, n]  of the row's bits
  float* base;      // [S, n]
  float* rest;      // [S, n]  r_q; infinity: the exact kernel's
  float* limit;     // [S, n]  points of this key or more are farther than `within`; -infinity: has no neighbours here
  int64_t n;        // a multiple of ROUND_UP; of queries, each view begins at one
};

struct Prepared {
  float* centre;      // [S, D]
  double* unit;       // [S]  a power of two
  Rows points, queries;
  int64_t depth;      // a multiple of PIECE
  Entry* kept;        // [S, n_splits, queries.n, capacity] by key, in any order
  int32_t* n_kept;    // [S, n_splits, queries.n]
  float* cut;         // [S, n_splits, queries.n]  no point left out has a smaller key
  int64_t n_splits;   // parts of the points, each screened by its own blocks
  int64_t* n_listed;  // queries on the list
  int64_t* n_thinned; // how often warps of the screen thinned out what they had kept
  int32_t* n_different;  // [S]  points that are not finite left out
  int32_t* different;    // [S, MOST_DIFFERENT]  one row of every kind, if they are so few
  int32_t* kind;         // [S, N]  its place there; -1: not finite

  __device__ bool is_few(const Knn& op, int64_t s) const {
    return n_different[s] <= MOST_DIFFERENT && 2 * int64_t{n_different[s]} <= op.N;
  }
  int64_t* listed;    // [S A]  s << 32 | i
};

// Who is answered, and where.
template <class T>
struct Asked {
  const T *points, *queries;
  Knn op;

  __device__ const T* point(int64_t s, int64_t j) const { return points + (s * op.N + j) * op.D; }
  __device__ const T* query(int64_t s, int64_t i) const {
    return (op.is_self ? points : queries) + (s * op.Q + i) * op.D;
  }
  __device__ bool is_in_fours() const {
    return clmfast::is_in_fours(points, op.D) && (op.is_self || clmfast::is_in_fours(queries, op.D));
  }
};

int64_t n_query_rows(const Knn& op) {
  int64_t n = 0;
  for (int v = 0; v < op.n_views; ++v) n += round_up(op.view[v].Q, ROUND_UP);
  return n;
}

// Who asks for an answer of a set.
struct Asker {
  int64_t query, row;  // row: among the prepared ones
  int v;
  const int64_t *query_group, *point_group;  // its own, and all; or null
  bool is_there;                             // false: a row behind those of its view
};

// By place, among the answers or, padded to multiples of ROUND_UP by view, among the rows.
__device__ Asker asker_of(const Knn& op, int64_t place, int64_t padded_to) {
  int64_t first = 0, first_row = 0;
  Asker asker = {};
#pragma unroll
  for (int v = 0; v < MOST_VIEWS; ++v) {
    const KnnView& view = op.view[v];
    if (v < op.n_views && place >= first) {
      const int64_t r = place - first;
      const bool is_there = r < view.Q;
      asker = {op.Q - view.Q + r, first_row + r, v,
               view.query_group && is_there ? view.query_group + r : nullptr, view.point_group, is_there};
    }
    first += round_up(view.Q, padded_to), first_row += round_up(view.Q, ROUND_UP);
  }
  return asker;
}
__device__ Asker asker_of_answer(const Knn& op, int64_t i) { return asker_of(op, i, 1); }
__device__ Asker asker_of_row(const Knn& op, int64_t row) { return asker_of(op, row, ROUND_UP); }

__device__ bool is_barred(const Knn& op, const Asker& asker, int64_t j) {
  return (op.is_self && asker.query == j) || (asker.query_group && *asker.query_group == asker.point_group[j]);
}

__device__ float within_of(const Knn& op, int64_t s, int64_t query) {
  return op.within ? op.within[s * op.Q + query] : INF;
}

__device__ void write_neighbour(const Knn& op, int64_t place, Entry found) {
  op.dist2[place] = found == NO_ENTRY ? INF : number_of(found);
  op.index[place] = found == NO_ENTRY ? -1 : index_of(found);
}

// ---- centre: one block per set

constexpr int CENTRE_THREADS = 256;

struct Reaches {
  double of_warp[CENTRE_THREADS / 32];
};

template <class T>
__global__ void __launch_bounds__(CENTRE_THREADS) knn_centre_kernel(Asked<T> asked, Prepared prepared) {
  const int64_t s = blockIdx.x, N = asked.op.N, D = asked.op.D;
  const int64_t n = min(N, static_cast<int64_t>(N_SAMPLES));
  auto row_of_sample = [&](int64_t i) { return N < N_SAMPLES ? i : i * N / N_SAMPLES; };  // a shift, not a division
  constexpr int AT_ONCE = 8;
  double reach = 0, centre_reach = 0;
  for (int64_t d = threadIdx.x; d < D; d += CENTRE_THREADS) {
    double sum = 0;
    float low = INF, high = -INF;
    int n_finite = 0;
#pragma unroll 1
    for (int64_t first = 0; first < n; first += AT_ONCE) {
      float x[AT_ONCE];
#pragma unroll
      for (int e = 0; e < AT_ONCE; ++e) x[e] = first + e < n ? widen(asked.point(s, row_of_sample(first + e))[d]) : INF;
#pragma unroll
      for (int e = 0; e < AT_ONCE; ++e) {
        const bool is_finite = fabsf(x[e]) < INF;
        sum += is_finite ? x[e] : 0.f, n_finite += is_finite;
        low = is_finite ? fminf(low, x[e]) : low, high = is_finite ? fmaxf(high, x[e]) : high;
      }
    }
    const float centre = n_finite ? static_cast<float>(sum / n_finite) : 0.f;
    prepared.centre[s * D + d] = centre;
    if (n_finite) reach = max(reach, max(static_cast<double>(high) - centre, static_cast<double>(centre) - low));
    centre_reach = max(centre_reach, fabs(static_cast<double>(centre)));
  }
  Reaches& reaches = static_shared<Reaches>();
  auto of_block = [&](double x) {
    x = warp_max(x);
    __syncthreads();
    if (lane_id() == 0) reaches.of_warp[warp_id()] = x;
    __syncthreads();
    for (double other : reaches.of_warp) x = max(x, other);
    return x;
  };
  reach = of_block(reach), centre_reach = of_block(centre_reach);
  if (threadIdx.x == 0) {
    if (!(reach > 0)) reach = centre_reach;  // equal rows: the others are not, perhaps
    prepared.unit[s] = reach > 0 ? ldexp(1.0, SAMPLE_REACH - ilogb(reach) - 1) : 1;
    if (s == 0) *prepared.n_listed = *prepared.n_thinned = 0;
    prepared.n_different[s] = 0;
  }
}

// ---- prepare: one warp per row

// Points of this key, or a larger one, are farther than dist2 from a query of this base and rest.
__device__ float limit_of(float dist2, double base, double rest, double unit) {
  // More than whatever rounds to dist2, in float32.
  const double dist = __fsqrt_ru(float_above(dist2 * (1 + 0x1p-20) + 0x1p-140)) * unit + rest;
  return float_above(dist * dist * (1 / (1 - SHARE) + 0x1p-40) - base);
}

constexpr int PREPARE_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(PREPARE_THREADS) knn_prepare_kernel(Asked<T> asked, Prepared prepared) {
  const Knn& op = asked.op;
  const int lane = lane_id();
  const int64_t n_rows = prepared.points.n + (op.is_self ? 0 : prepared.queries.n);
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (PREPARE_THREADS / 32) + warp_id();
  if (task >= op.S * n_rows) return;
  const int64_t s = task / n_rows, in_set = task % n_rows, D = op.D;
  const bool is_point = in_set < prepared.points.n, is_query = op.is_self || !is_point;
  const int64_t i = is_point ? in_set : in_set - prepared.points.n;
  const Rows& rows = is_point ? prepared.points : prepared.queries;
  const int64_t at = s * rows.n + i;
  const Asker asker = is_query ? asker_of_row(op, i) : Asker{};
  const bool is_there = is_query ? asker.is_there : i < op.N;
  const T* row = !is_there ? nullptr : is_point ? asked.point(s, i) : asked.query(s, asker.query);
  const float* centre = prepared.centre + s * D;
  const double unit = prepared.unit[s];

  double norm2 = 0, rest2 = 0;
  uint64_t hash = 0;
  bool is_finite = true, is_inside = true;
  // D % 4 is looked at twice: without, this takes 52 registers instead of 48 (nvcc 13.0).
  const bool is_aligned = asked.is_in_fours() && D % 4 == 0;
#pragma unroll 2
  for (int64_t d = 4 * lane; d < prepared.depth; d += 128) {
    const bool is_any = is_there && d < D;
    const float4 four = is_any ? load_four(row, d, D, is_aligned) : float4{0, 0, 0, 0};
    const float4 middle = is_any ? load_four(centre, d, D, D % 4 == 0) : float4{0, 0, 0, 0};
    const float of_row[4] = {four.x, four.y, four.z, four.w};
    const float of_centre[4] = {middle.x, middle.y, middle.z, middle.w};
    struct alignas(8) Cells {
      __half h[4];
    } cells;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const double x = of_row[e];
      if (!isfinite(x)) is_finite = false;
      double y = (x - of_centre[e]) * unit;
      if (!(fabs(y) <= LARGEST)) is_inside = false, y = y > 0 ? LARGEST : -LARGEST;
      cells.h[e] = __float2half_rn(static_cast<float>(y));
      const double h = widen(cells.h[e]);
      norm2 += h * h, rest2 += (y - h) * (y - h);
      // multilinear: of different rows the sums are equal by chance alone
      hash += (static_cast<uint64_t>(d + e) * 0x9e3779b97f4a7c15 ^ 0xd1b54a32d192ed03) * __float_as_uint(of_row[e]);
    }
    *reinterpret_cast<Cells*>(rows.cell + at * prepared.depth + d) = cells;
  }
  norm2 = warp_sum(norm2), rest2 = warp_sum(rest2), hash = warp_sum(hash);
  is_finite = warp_all(is_finite), is_inside = warp_all(is_inside);
  if (lane > 0) return;
  const double base = norm2 * (1 - product_error(D));
  if (is_point) {
    const bool is_neighbour = is_there && is_finite;
    const float floor = is_neighbour ? float_below(base - rest2 / SHARE) : INF;
#pragma unroll
    for (int v = 0; v < MOST_VIEWS; ++v) {
      const int64_t* const of_view = op.view[v].point_group;
      const int32_t group = is_neighbour && of_view && v < op.n_views ? short_group(of_view[i]) : 0;
      if (v < op.n_views) rows.column[v * op.S * rows.n + at] = {floor, group};
    }
    rows.hash[at] = hash;
  }
  if (!is_query) return;
  rows.base[at] = float_below(base);
  const float rest = float_above(sqrt(rest2) + sqrt(norm2) * 0x1p-40);  // y itself is rounded, to float64
  const bool has_group = asker.query_group && short_group(*asker.query_group) == OTHER_GROUP;
  const bool is_exact = is_there && is_finite && (!is_inside || has_group);
  rows.rest[at] = is_exact ? INF : rest;
  const float within = is_there ? within_of(op, s, asker.query) : -1;
  const bool may_ask = is_there && is_finite && !is_exact && within >= 0;
  rows.limit[at] = may_ask ? limit_of(within, base, rest, unit) : -INF;
}

// ---- repeats: one block for every REPEAT_ROWS rows of a set

// The states of a model's first layer are those of a few tokens at a few positions, and near each other where they are
// of successive steps: float16 cannot tell them apart, but they are few. Equal rows are found by a hash table of the
// block; that their numbers are equal, and not the hash alone, is seen from the rows.
constexpr int REPEAT_ROWS = 2048, REPEAT_THREADS = 1024;  // of smaller sets fewer: half as many as rows
constexpr int TABLE = 2 * REPEAT_ROWS;

struct Repeats {
  uint64_t hash[REPEAT_ROWS];
  int table[TABLE];        // the first row of a hash, or EMPTY
  int n_first;             // rows that are the first of their kind
  int kind[REPEAT_ROWS];   // first the row that is the first of its kind, then its place in Prepared::different
};

template <class T>
__global__ void __launch_bounds__(REPEAT_THREADS) knn_repeats_kernel(Asked<T> asked, Prepared prepared) {
  constexpr int EMPTY = INT32_MAX, NONE = -1;
  const Knn& op = asked.op;
  const Rows& points = prepared.points;
  Repeats& repeats = static_shared<Repeats>();
  const int64_t n_parts = (op.N + REPEAT_ROWS - 1) / REPEAT_ROWS, s = blockIdx.x / n_parts;
  const int64_t first = blockIdx.x % n_parts * REPEAT_ROWS;
  const int n = static_cast<int>(min(op.N - first, static_cast<int64_t>(REPEAT_ROWS)));
  const int thread = threadIdx.x, n_threads = blockDim.x;
  for (int i = thread; i < TABLE; i += n_threads) repeats.table[i] = EMPTY;
  for (int p = thread; p < n; p += n_threads) repeats.hash[p] = points.hash[s * points.n + first + p];
  if (thread == 0) repeats.n_first = 0;
  __syncthreads();
  auto is_point = [&](int p) { return points.column[s * points.n + first + p].floor < INF; };
#pragma unroll 1
  for (int p = thread; p < n; p += n_threads) {
    int slot = NONE;
    if (is_point(p)) {
      slot = static_cast<int>(repeats.hash[p] >> 40) & (TABLE - 1);
      while (true) {
        const int other = atomicCAS(&repeats.table[slot], EMPTY, p);
        if (other == EMPTY) break;
        if (repeats.hash[other] == repeats.hash[p]) {
          atomicMin(&repeats.table[slot], p);
          break;
        }
        slot = (slot + 1) & (TABLE - 1);
      }
    }
    repeats.kind[p] = slot;
  }
  __syncthreads();
  int n_first = 0;
#pragma unroll 1
  for (int p = thread; p < n; p += n_threads) {
    if (repeats.kind[p] != NONE) repeats.kind[p] = repeats.table[repeats.kind[p]];
    n_first += repeats.kind[p] == p;
  }
  atomicAdd(&repeats.n_first, n_first);
  __syncthreads();
  if (repeats.n_first > MOST_DIFFERENT || 2 * repeats.n_first > n) {  // too many are different, so far
    if (thread == 0) atomicAdd(&prepared.n_different[s], MOST_DIFFERENT + 1);
    return;
  }

  const bool is_aligned = asked.is_in_fours();
#pragma unroll 1
  for (int p = thread / QUAD; p - lane_id() / QUAD < n; p += n_threads / QUAD) {  // eight rows of a warp at a time
    const int of_kind = p < n ? repeats.kind[p] : NONE;
    const bool is_repeat = of_kind != NONE && of_kind != p;
    const T *a = asked.point(s, first + (is_repeat ? p : 0)), *b = asked.point(s, first + (is_repeat ? of_kind : 0));
    bool is_equal = true;
#pragma unroll 4
    for (int64_t d = 4 * (lane_id() % QUAD); d < (is_repeat ? op.D : 0); d += 16) {
      const float4 x = load_four(a, d, op.D, is_aligned), y = load_four(b, d, op.D, is_aligned);
      is_equal &= x.x == y.x && x.y == y.y && x.z == y.z && x.w == y.w;
    }
    const bool all_equal = (warp_ballot(is_equal) >> (lane_id() & ~3) & 15) == 15;
    if (is_repeat && !all_equal && lane_id() % QUAD == 0) repeats.kind[p] = p;
  }
  __syncthreads();
  // The first of each kind get places, the others then take theirs.
#pragma unroll 1
  for (int p = thread; p - lane_id() < n; p += n_threads) {
    const bool is_first = p < n && repeats.kind[p] == p;
    const uint32_t firsts = warp_ballot(is_first);
    int place = 0;
    if (lane_id() == 0 && firsts) place = atomicAdd(&prepared.n_different[s], __popc(firsts));
    place = warp_shuffle(place, 0) + __popc(firsts & ((1u << lane_id()) - 1));
    if (is_first) repeats.table[p] = place;
    if (is_first && place < MOST_DIFFERENT)
      prepared.different[s * MOST_DIFFERENT + place] = static_cast<int32_t>(first) + p;
  }
  __syncthreads();
#pragma unroll 1
  for (int p = thread; p < n; p += n_threads) {
    const int of_kind = repeats.kind[p];
    prepared.kind[s * op.N + first + p] = of_kind == NONE ? -1 : repeats.table[of_kind];
  }
}

}  // namespace
}  // namespace clmfast
