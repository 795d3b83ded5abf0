// knn on a GPU: the contract is ../knn.h. Seven kernels, of which the last two find nothing to do on most data.
//
//   centre    a set's centre and unit, from a sample of its rows
//   prepare   every row in units from the centre, rounded to float16, and what that rounding can have cost
//   repeats   finds equal points: a set of few different ones is not screened
//   screen    tensor cores multiply queries by points; every query keeps the points of the smallest lower bounds, at
//             least k of them
//   rescore   measures those that can be neighbours as the contract says, in float64; if a point that the screen left
//             out might be nearer than the k-th, the query is put on a list
//   few       answers the queries of sets of few different points by measuring each of these
//   exact     answers the queries on the list by measuring all points
//
// Why the screen is safe. Let y = (x - centre) unit be a row, h its float16, n = |h|^2, r = |y - h|, and P the product
// h_q h_p as the tensor cores sum it, off by at most gamma |h_q| |h_p| <= gamma (n_q + n_p) / 2. With any 0 < e < 1
//
//   |h_q - y_p|^2 >= (1 - e) (|h_q - h_p|^2 - r_p^2 / e)             as |u + v|^2 <= |u|^2 / (1 - e) + |v|^2 / e
//                 >= (1 - e) (base_q + key)                          base = n_q (1 - gamma)
//   key           =  floor_p - 2 P                                   floor = n_p (1 - gamma) - r_p^2 / e
//   |y_q - y_p|   >= |h_q - y_p| - r_q
//
// so a point's lower bound ascends with its key. Float16 has a range as well: a row that leaves it is cut off at its
// ends. For a point this is the nearest point of a box that holds all queries but the cut ones, which the exact kernel
// answers, so its lower bound holds.
//
// Two things cost more than the arithmetic, measured on an H100 at 7 sets of 2048 x 256: instructions that are not in
// the cache, as of a loop unrolled to 100 KB, and warps that hold each other up at barriers, each with work of its own
// at another time.
//
// The answer does not depend on which points the screen keeps, only its cost does: so limits, grid and atomics may come
// as they like. Symmetry of the self form is not used: 7 sets of 2048 points are one wave of query tiles, whose lists
// stay in their block; half the products would need lists of rows and columns that move between blocks.
#include "../knn.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "element.cuh"
#include "launch.cuh"
#include "nearest.cuh"
#include "pair.cuh"
#include "ptx.cuh"
#include "tile.cuh"

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

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
  Column* column;   // [S, n]
  uint64_t* hash;   // [S, n]  of the row's bits
  float* base;      // [S, n]
  float* rest;      // [S, n]  r_q; infinity: the exact kernel's
  float* limit;     // [S, n]  points of this key or more are farther than `within`; -infinity: has no neighbours here
  int64_t n;        // a multiple of ROUND_UP
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
  int64_t* listed;    // [S Q]  s << 32 | i
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

__device__ bool is_barred(const Knn& op, int64_t i, int64_t j) {
  return (op.is_self && i == j) || (op.query_group && op.query_group[i] == op.point_group[j]);
}

__device__ float within_of(const Knn& op, int64_t s, int64_t i) { return op.within ? op.within[s * op.Q + i] : INF; }

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
  const bool is_there = i < (is_point ? op.N : op.Q);
  const T* row = !is_there ? nullptr : is_point ? asked.point(s, i) : asked.query(s, i);
  const float* centre = prepared.centre + s * D;
  const double unit = prepared.unit[s];

  double norm2 = 0, rest2 = 0;
  uint64_t hash = 0;
  bool is_finite = true, is_inside = true;
  const bool is_aligned = asked.is_in_fours() && D % 4 == 0;  // said twice, it takes 48 registers and not 52 (nvcc 13.0)
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
    const int32_t group = is_neighbour && op.point_group ? short_group(op.point_group[i]) : 0;
    rows.column[at] = {is_neighbour ? float_below(base - rest2 / SHARE) : INF, group};
    rows.hash[at] = hash;
  }
  if (!is_query) return;
  rows.base[at] = float_below(base);
  const float rest = float_above(sqrt(rest2) + sqrt(norm2) * 0x1p-40);  // y itself is rounded, to float64
  const bool has_group = is_there && op.query_group && short_group(op.query_group[i]) == OTHER_GROUP;
  const bool is_exact = is_there && is_finite && (!is_inside || has_group);
  rows.rest[at] = is_exact ? INF : rest;
  const float within = is_there ? within_of(op, s, i) : -1;
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

// ---- screen

constexpr int N_STAGES = 4, N_AHEAD = N_STAGES - 2;  // pieces of columns on their way while one is multiplied
constexpr int N_HALVINGS = 12;                       // of the range in which a row's k-th smallest key is looked for

__device__ int quad_sum(int x) { return x += warp_shuffle_xor(x, 1), x + warp_shuffle_xor(x, 2); }
__device__ float quad_min(float x) { return x = fminf(x, warp_shuffle_xor(x, 1)), fminf(x, warp_shuffle_xor(x, 2)); }
__device__ float quad_max(float x) { return x = fmaxf(x, warp_shuffle_xor(x, 1)), fmaxf(x, warp_shuffle_xor(x, 2)); }

// What limit_of will say, or a little more, when the farthest of k points of at most this key has been measured: that
// point's distance is not known yet, but what rounding can add to its key is.
__device__ float limit_of_key(float key, float base, float rest, float gamma) {
  const float seen2 = fmaxf(key + base, 0.f), norm = sqrtf(fmaxf(base, 0.f)) + sqrtf(seen2);
  constexpr float LOST2 = static_cast<float>(ROUNDING * ROUNDING / SHARE), PART = static_cast<float>(1 / (1 - SHARE));
  const float dist = sqrtf(seen2 + norm * norm * (4 * gamma + LOST2)) + norm * ROUNDING + 2 * rest;
  return fmaxf(dist * dist * PART - base, nextafterf(key, INF));
}

// A point that a row keeps.
struct alignas(8) Fresh {
  float key;
  int32_t column;
};

// The points that a warp's 16 rows keep, unsorted. Lane 4 g + t looks at rows g and g + 8: what it finds below a row's
// limit goes to slots of its own, by a few compares and a guarded store. When a lane's slots fill up, all rows are
// thinned out: a row's k-th smallest key becomes its new limit (with what rounding can add), entries above it are
// dropped, and the remaining ones are redistributed evenly over the row's four lanes.
template <int R>
struct RowSlots {
  static constexpr int SLOTS = R == 1 ? 16 : 12 * R, CAPACITY = 4 * SLOTS;
  static constexpr int BYTES_PER_ROW = CAPACITY * sizeof(Fresh);

  Fresh* slots;  // [2][SLOTS][32]
  float limit[2];
  int32_t itself, group[2];  // the column that the first row is, in the self form; the second is 8 behind
  int next[2];               // place of the next point
  int n_thinned = 0;

  __device__ RowSlots(unsigned char* shared, const Knn& op, int64_t row_of_warp)
      : slots(reinterpret_cast<Fresh*>(shared)),
        itself(op.is_self ? static_cast<int32_t>(row_of_warp) + lane_id() / 4 : INT32_MIN) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row_of_warp + half * 8 + lane_id() / 4;
      group[half] = !op.query_group ? 1 : row < op.Q ? short_group(op.query_group[row]) : 0;
      next[half] = place(half, 0, lane_id());
    }
  }

  __device__ static int place(int half, int slot, int lane) { return (half * SLOTS + slot) * 32 + lane; }
  __device__ int n(int half) const { return next[half] / 32 - half * SLOTS; }

  __device__ void look_at(int half, float key, int32_t column, int32_t of_column) {
    if (key < limit[half] && of_column != group[half] && column != itself + 8 * half) {
      slots[next[half]] = {key, column};
      next[half] += 32;
    }
  }

  // Can't every lane look at n_next more numbers of each row?
  __device__ bool is_full(int n_next) const {
    return warp_any(next[0] >= (SLOTS - n_next + 1) * 32 || next[1] >= (2 * SLOTS - n_next + 1) * 32);
  }

  // A row that keeps more than n_most even so is given up: its limit becomes -infinity. limit_for(half, key) is
  // limit_of_key of that row.
  template <class F>
  __device__ void thin_out(int k, int n_most, const F& limit_for) {
    const int lane = lane_id();
    const int most = warp_max(max(n(0), n(1)));
    int total[2];
    float low[2] = {INF, INF}, high[2] = {-INF, -INF};
    bool is_open[2];
#pragma unroll 2
    for (int e = 0; e < most; ++e)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (e < n(half)) {
          const float key = slots[place(half, e, lane)].key;
          low[half] = fminf(low[half], key), high[half] = fmaxf(high[half], key);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = quad_sum(n(half)), low[half] = quad_min(low[half]), high[half] = quad_max(high[half]);
      is_open[half] = total[half] > k;
    }
    if (!warp_any(max(total[0], total[1]) >= k || max(n(0), n(1)) > SLOTS / 2)) return;  // nothing to gain
    // At least k keys are at most `high`.
#pragma unroll 1
    for (int i = 0; i < N_HALVINGS && warp_any(is_open[0] || is_open[1]); ++i) {
      int n_below[2] = {0, 0};
      float middle[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) middle[half] = low[half] + (high[half] - low[half]) / 2;
#pragma unroll 4
      for (int e = 0; e < most; ++e)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          n_below[half] += e < n(half) && slots[place(half, e, lane)].key <= middle[half];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        n_below[half] = quad_sum(n_below[half]);
        if (!is_open[half]) continue;
        (n_below[half] >= k ? high[half] : low[half]) = middle[half];
        is_open[half] = n_below[half] != k;
      }
    }
    float least[2];
    int n_left[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      least[half] = limit[half];
      if (total[half] >= k)
        least[half] = fminf(least[half], limit_for(half, high[half]));
    }
#pragma unroll 1
    for (int e = 0; e < most; ++e) {
      Fresh fresh[2];
      int to[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        fresh[half] = e < n(half) ? slots[place(half, e, lane)] : Fresh{INF, 0};
        const bool stays = e < n(half) && fresh[half].key < least[half];
        const uint32_t of_quad = warp_ballot(stays) >> (lane & ~3) & 15;
        const int at = n_left[half] + __popc(of_quad & ((1u << (lane & 3)) - 1));  // never behind 4 e + 3
        to[half] = stays ? place(half, at / 4, (lane & ~3) + at % 4) : -1;
        n_left[half] += __popc(of_quad);
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (to[half] >= 0) slots[to[half]] = fresh[half];
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_given_up = n_left[half] > n_most;
      limit[half] = is_given_up ? -INF : least[half];
      next[half] = place(half, is_given_up ? 0 : (n_left[half] + 3 - (lane & 3)) / 4, lane);
    }
    ++n_thinned;
  }

  // Row by row to kept [16, CAPACITY] and n_kept [16].
  __device__ void write(Entry* kept, int32_t* n_kept) const {
    const int lane = lane_id();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n_own = n(half), before_2 = warp_shuffle_up(n_own, 1), in_row = half * 8 + lane / 4;
      int first = lane & 1 ? before_2 : 0;  // of the pair of lanes
      const int before_4 = warp_shuffle(first + n_own, (lane & ~3) + 1);
      if (lane & 2) first += before_4;
#pragma unroll 1
      for (int e = 0; e < n_own; ++e) {
        const Fresh fresh = slots[place(half, e, lane)];
        kept[in_row * CAPACITY + first + e] = make_entry(fresh.key, fresh.column);
      }
      if (lane % 4 == 3) n_kept[in_row] = first + n_own;
    }
  }
};

// The shared memory of a screening block: all pieces of its queries, or, if they don't fit, one beside each of columns.
template <class Engine, int R>
struct ScreenMemory {
  static constexpr int QUERY_BYTES = Engine::ROWS * PIECE_BYTES, COLUMN_BYTES = Engine::COLUMNS * PIECE_BYTES;
  static constexpr int SLOT_BYTES = Engine::ROWS * RowSlots<R>::BYTES_PER_ROW;

  static size_t bytes(int64_t n_query_pieces) {
    return static_cast<size_t>(n_query_pieces) * QUERY_BYTES + N_STAGES * COLUMN_BYTES + SLOT_BYTES;
  }
};

template <class Engine, int R>
__global__ void __launch_bounds__(Engine::THREADS, 1) knn_screen_kernel(Knn op, Prepared prepared, bool is_resident) {
  using Memory = ScreenMemory<Engine, R>;
  constexpr int COLUMNS = Engine::COLUMNS;
  const Rows &points = prepared.points, &queries = prepared.queries;
  // A grid has fewer than 2^31 blocks, so 32 bits count what blocks and tiles count.
  const auto block = static_cast<int>(blockIdx.x), n_splits = static_cast<int>(prepared.n_splits);
  const auto n_row_tiles = static_cast<int>(queries.n / Engine::ROWS), n_tiles = static_cast<int>(points.n / COLUMNS);
  const int s = block / n_row_tiles / n_splits, split = block / n_row_tiles % n_splits;
  const int row = block % n_row_tiles * Engine::ROWS;
  if (prepared.is_few(op, s)) return;
  const auto begin = static_cast<int>(int64_t{n_tiles} * split / n_splits);
  const auto end = static_cast<int>(int64_t{n_tiles} * (split + 1) / n_splits);
  const int n_pieces = static_cast<int>(prepared.depth / PIECE);

  unsigned char* const columns = dynamic_shared<unsigned char>();
  unsigned char* const rows = columns + N_STAGES * Memory::COLUMN_BYTES;
  unsigned char* const slots = rows + (is_resident ? n_pieces : N_STAGES) * Memory::QUERY_BYTES;
  const __half* const row_cells = queries.cell + (s * queries.n + row) * prepared.depth;
  const __half* const column_cells = points.cell + s * points.n * prepared.depth;

  RowSlots<R> nearest(slots + warp_id() * 16 * RowSlots<R>::BYTES_PER_ROW, op, row + warp_id() * 16);
  auto of_row = [&](const float* of_rows, int half) {
    return of_rows[s * queries.n + row + warp_id() * 16 + half * 8 + lane_id() / 4];
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) nearest.limit[half] = of_row(queries.limit, half);
  // Down to n_most points of each row.
  auto thin_out = [&](int n_most) {
    nearest.thin_out(static_cast<int>(op.k), n_most, [&](int half, float key) {
      return limit_of_key(key, of_row(queries.base, half), of_row(queries.rest, half),
                          static_cast<float>(product_error(op.D)));
    });
  };

  // Pieces come in the order in which they are multiplied.
  int next_tile = begin, next_piece = 0, next_stage = 0;
  auto load_next = [&] {
    if (next_tile < end) {
      load_piece<COLUMNS, Engine::THREADS>(
          columns + next_stage * Memory::COLUMN_BYTES,
          column_cells + int64_t{next_tile} * COLUMNS * prepared.depth + next_piece * PIECE, prepared.depth);
      if (!is_resident)
        load_piece<Engine::ROWS, Engine::THREADS>(rows + next_stage * Memory::QUERY_BYTES,
                                                  row_cells + next_piece * PIECE, prepared.depth);
      if (++next_piece == n_pieces) next_piece = 0, ++next_tile;
      next_stage = (next_stage + 1) % N_STAGES;
    }
    cp_async_commit();
  };

  // Looks at a tile's products from group `next` to group `until`, and thins out the rows where they have no room, or
  // when twice as many points have been seen as the last time: then all warps do so at once, and none waits for another.
  constexpr int GROUP = 2, N_GROUPS = COLUMNS / 8 / GROUP;
  auto look_at = [&](const float (&products)[COLUMNS / 2], int tile, int& next, int until) {
    int first = tile * COLUMNS + 2 * (lane_id() % 4);
    compute_here(first);  // and not a column for each of 32 products, in as many registers
    struct alignas(16) Two {
      Column column[2];
    };
    const Two* twos = reinterpret_cast<const Two*>(points.column + s * points.n + first);
    const int n_seen = tile - begin + 1;
    while (true) {
#pragma unroll
      for (int group = 0; group < N_GROUPS; ++group) {
        if (group != next || next >= until || nearest.is_full(2 * GROUP)) continue;
        ++next;
#pragma unroll
        for (int j = group * GROUP; j < (group + 1) * GROUP; ++j) {
          const Two two = twos[4 * j];
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float key = __fmaf_rn(-2, products[4 * j + 2 * half + e], two.column[e].floor);
              nearest.look_at(half, key, first + 8 * j + e, two.column[e].group);
            }
        }
      }
      const bool is_due = next == N_GROUPS && (n_seen & (n_seen - 1)) == 0 && tile + 1 < end;
      if (next >= until && !is_due) break;
      thin_out(4 * (RowSlots<R>::SLOTS - 2 * GROUP));
      if (next >= until) break;
    }
  };

  if (is_resident)
    for (int piece = 0; piece < n_pieces; ++piece)
      load_piece<Engine::ROWS, Engine::THREADS>(rows + piece * Memory::QUERY_BYTES, row_cells + piece * PIECE,
                                                prepared.depth);
  for (int i = 0; i < N_AHEAD; ++i) load_next();
  // While a tile is multiplied, the one before is looked at.
  const int n_at_a_time = (N_GROUPS + n_pieces - 1) / n_pieces;
  float products[COLUMNS / 2], before[COLUMNS / 2];
  int stage = 0;
#pragma unroll 1
  for (int tile = begin; tile <= end; ++tile) {
    int next = 0;
#pragma unroll 1
    for (int piece = 0; piece < n_pieces; ++piece) {
      if (tile < end) {
        cp_async_wait<N_AHEAD - 1>();
        Engine::copied();
        Engine::template wait<1>(products);  // the stage that load_next overwrites has been read
        __syncthreads();
        load_next();
        Engine::multiply(products, rows + (is_resident ? piece : stage) * Memory::QUERY_BYTES,
                         columns + stage * Memory::COLUMN_BYTES, piece == 0);
        stage = (stage + 1) % N_STAGES;
      }
      if (tile > begin) look_at(before, tile - 1, next, min(next + n_at_a_time, N_GROUPS));
    }
    Engine::template wait<0>(products);
#pragma unroll
    for (int e = 0; e < COLUMNS / 2; ++e) before[e] = products[e];
  }
  cp_async_wait<0>();
  if (warp_any(max(quad_sum(nearest.n(0)), quad_sum(nearest.n(1))) > 32 * R)) thin_out(RowSlots<R>::CAPACITY);

  const int64_t to = (int64_t{s} * n_splits + split) * queries.n + row + warp_id() * 16;
  nearest.write(prepared.kept + to * RowSlots<R>::CAPACITY, prepared.n_kept + to);
  if (lane_id() % 4 == 0)
#pragma unroll
    for (int half = 0; half < 2; ++half) prepared.cut[to + half * 8 + lane_id() / 4] = nearest.limit[half];
  if (lane_id() == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(prepared.n_thinned),
              static_cast<unsigned long long>(nearest.n_thinned));
}

// ---- rescore: one warp per query

constexpr int RESCORE_THREADS = 128;
constexpr int PAIRS = 2 * 32 / QUAD;  // that a warp measures at a time, two by each quad

template <int R>
struct Measured {
  Entry of_warp[RESCORE_THREADS / 32][32 * R];
};

template <class T, int R>
__global__ void __launch_bounds__(RESCORE_THREADS, 4) knn_rescore_kernel(Asked<T> asked, Prepared prepared) {
  const Knn& op = asked.op;
  const int lane = lane_id();
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (RESCORE_THREADS / 32) + warp_id();
  if (task >= op.S * op.Q) return;
  const int64_t s = task / op.Q, i = task % op.Q, at = s * prepared.queries.n + i;
  const float base = prepared.queries.base[at], rest = prepared.queries.rest[at], limit = prepared.queries.limit[at];
  const float within = within_of(op, s, i);
  const double unit = prepared.unit[s];
  const bool is_aligned = asked.is_in_fours();
  if (prepared.is_few(op, s)) return;

  Entry list[R];
  float cut = limit;
#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = NO_ENTRY;
  for (int64_t split = 0; split < prepared.n_splits; ++split) {
    const int64_t from = (s * prepared.n_splits + split) * prepared.queries.n + i;
    cut = fminf(cut, prepared.cut[from]);
    const Entry* const kept = prepared.kept + from * RowSlots<R>::CAPACITY;
    const int n_kept = prepared.n_kept[from];
#pragma unroll 1
    for (int e = lane; e - lane < n_kept; e += 32) take_32(list, e < n_kept ? kept[e] : NO_ENTRY, lane);
  }
  cut = fminf(cut, number_of(warp_shuffle(list[R - 1], 31)));  // others may have fallen off

  Entry* const measured = static_shared<Measured<R>>().of_warp[warp_id()];
  auto n_where = [&](auto holds) {
    int n = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) n += __popc(warp_ballot(list[r] != NO_ENTRY && holds(number_of(list[r]))));
    return n;
  };
  auto measure = [&](int from, int to) {
    for (int e = from + lane / QUAD; e - lane / QUAD < to; e += PAIRS) {
      const int other = e + PAIRS / 2;
      const int32_t j = index_of(measured[min(e, to - 1)]), j_other = index_of(measured[min(other, to - 1)]);
      double dist2[2];
      two_pairs_dist2(asked.query(s, i), asked.point(s, j), asked.point(s, j_other), op.D, is_aligned, dist2);
      __syncwarp();
      auto write = [&](int place, int32_t of, float found) {
        if (place < to && lane % QUAD == 0) measured[place] = found <= within ? make_entry(found, of) : NO_ENTRY;
      };
      write(e, j, static_cast<float>(dist2[0])), write(other, j_other, static_cast<float>(dist2[1]));
    }
    __syncwarp();
  };
#pragma unroll
  for (int r = 0; r < R; ++r) measured[32 * r + lane] = list[r];
  __syncwarp();

  // The k of the smallest bounds first, and those that can be measured along with them; then those whose bound is below
  // what came out.
  const int k = static_cast<int>(op.k), n = n_where([](float) { return true; });
  const int n_first = min((k + PAIRS - 1) / PAIRS * PAIRS, n);
  measure(0, n_first);
  Entry last = n < k ? NO_ENTRY : 0;
  for (int e = lane; e < min(k, n); e += 32) last = larger(last, measured[e]);
  last = warp_max(last);
  const float reach = last == NO_ENTRY ? within : number_of(last);
  const float near = limit_of(reach, base, rest, unit);
  const int n_near = n_where([&](float key) { return key < near; });
  measure(n_first, max(n_first, n_near));

#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = NO_ENTRY;
#pragma unroll 1
  for (int r = 0; r < R; ++r)
    take_32(list, 32 * r + lane < max(n_first, n_near) ? measured[32 * r + lane] : NO_ENTRY, lane);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    measured[32 * r + lane] = list[r];
    if (32 * r + lane < k) write_neighbour(op, (s * op.Q + i) * k + 32 * r + lane, list[r]);
  }
  __syncwarp();
  const float kth = measured[k - 1] == NO_ENTRY ? within : number_of(measured[k - 1]);
  const bool is_certain = rest < INF && (cut == limit || cut >= limit_of(kth, base, rest, unit));
  if (lane == 0 && !is_certain)
    prepared.listed[atomicAdd(reinterpret_cast<unsigned long long*>(prepared.n_listed), 1ull)] = s << 32 | i;
}

// ---- few: blocks of a set take one kind of query after the other; queries that are not points are each a kind

constexpr int FEW_THREADS = 256;
constexpr int QUERIES = 2048;  // that are looked through at a time

struct Few {
  float dist2[MOST_DIFFERENT];  // from the query to every kind of point; NaN where one is not finite
  int n_asking, asking[QUERIES];
};

// One warp: the query's k nearest of all points.
template <int R>
__device__ void choose_few(const Knn& op, const Few& few, const int32_t* kind, int64_t s, int64_t i) {
  const int lane = lane_id(), last = static_cast<int>(op.k) - 1;
  const float within = within_of(op, s, i);
  Entry list[R], bound = NO_ENTRY;
#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = NO_ENTRY;
#pragma unroll 2
  for (int64_t first = 0; first < op.N; first += 32) {
    const int64_t j = first + lane;
    const int32_t of_point = j < op.N ? kind[j] : -1;
    const float dist2 = of_point < 0 ? NAN : few.dist2[of_point];
    Entry entry = dist2 <= within ? make_entry(dist2, static_cast<int32_t>(j)) : NO_ENTRY;
    if (entry >= bound || is_barred(op, i, j)) entry = NO_ENTRY;
    if (!warp_any(entry != NO_ENTRY)) continue;
    take_32(list, entry, lane);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (last / 32 == r) bound = warp_shuffle(list[r], last % 32);
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (32 * r + lane < op.k) write_neighbour(op, (s * op.Q + i) * op.k + 32 * r + lane, list[r]);
}

template <class T, int R>
__global__ void __launch_bounds__(FEW_THREADS, 2) knn_few_kernel(Asked<T> asked, Prepared prepared) {
  const Knn& op = asked.op;
  const unsigned n_blocks = gridDim.x / static_cast<unsigned>(op.S), s = blockIdx.x / n_blocks;
  if (!prepared.is_few(op, s)) return;
  Few& few = static_shared<Few>();
  const int thread = threadIdx.x, n = prepared.n_different[s];
  const int32_t *different = prepared.different + s * MOST_DIFFERENT, *kind = prepared.kind + s * op.N;
  const bool is_aligned = asked.is_in_fours();
  const int64_t n_kinds = op.is_self ? n + 1 : op.Q;  // the last kind of points are those that are not finite
#pragma unroll 1
  for (int64_t a = blockIdx.x % n_blocks; a < n_kinds; a += n_blocks) {
    const bool is_finite = !op.is_self || a < n;
    const int64_t of_kind = op.is_self ? (is_finite ? different[a] : 0) : a;
    __syncthreads();
#pragma unroll 1
    for (int e = thread / QUAD; e - lane_id() / QUAD < n; e += FEW_THREADS / QUAD) {
      const T* const point = asked.point(s, different[min(e, n - 1)]);
      const double dist2 = pair_dist2(asked.query(s, of_kind), point, op.D, is_aligned);
      if (e < n && thread % QUAD == 0)
        few.dist2[e] = is_finite && isfinite(dist2) ? static_cast<float>(dist2) : NAN;
    }
#pragma unroll 1
    for (int64_t first = op.is_self ? 0 : a; first < (op.is_self ? op.Q : a + 1); first += QUERIES) {
      __syncthreads();
      if (thread == 0) few.n_asking = op.is_self ? 0 : 1, few.asking[0] = static_cast<int>(a);
      __syncthreads();
      if (op.is_self)
        for (int64_t i = first + thread; i < min(op.Q, first + QUERIES); i += FEW_THREADS)
          if (kind[i] == (is_finite ? a : -1)) few.asking[atomicAdd(&few.n_asking, 1)] = static_cast<int>(i);
      __syncthreads();
#pragma unroll 1
      for (int e = warp_id(); e < few.n_asking; e += FEW_THREADS / 32) choose_few<R>(op, few, kind, s, few.asking[e]);
    }
  }
}

// ---- exact: one block per query, in rounds of as many neighbours as its pool can sort out

constexpr int EXACT_THREADS = 512, N_QUADS = EXACT_THREADS / QUAD;
constexpr int POOL = 512, ROUND = POOL / 2;  // a round's nearest, and as many again that came since they were sorted
static_assert(POOL - ROUND >= N_QUADS, "");
constexpr int RUN = 16;  // points that a quad measures one after the other: equal rows are measured once

struct Pool {
  Entry entry[POOL];
  int n;
  Entry bound;  // entries below it are looked for
};

// The `most` smallest stay, in order.
__device__ void sort_pool(Pool& pool, int most) {
  for (int e = pool.n + static_cast<int>(threadIdx.x); e < POOL; e += EXACT_THREADS) pool.entry[e] = NO_ENTRY;
  for (int size = 2; size <= POOL; size *= 2)
    for (int h = size / 2; h >= 1; h /= 2) {
      __syncthreads();
      for (int e = threadIdx.x; e < POOL; e += EXACT_THREADS)
        if (!(e & h)) {
          const Entry a = pool.entry[e], b = pool.entry[e | h];
          if ((a > b) == !(e & size)) pool.entry[e] = b, pool.entry[e | h] = a;
        }
    }
  __syncthreads();
  if (threadIdx.x == 0) {
    pool.n = min(pool.n, most);
    if (pool.n == most) pool.bound = pool.entry[most - 1];
  }
  __syncthreads();
}

// Has lane's quad seen the same numbers just before?
template <class T>
__device__ bool is_same_row(const T* a, const T* b, int64_t D, bool is_aligned) {
  bool is_same = true;
  for (int64_t d = 4 * (threadIdx.x % QUAD); d < D && is_same; d += 16) {
    const float4 of_a = load_four(a, d, D, is_aligned), of_b = load_four(b, d, D, is_aligned);
    is_same = of_a.x == of_b.x && of_a.y == of_b.y && of_a.z == of_b.z && of_a.w == of_b.w;
  }
  return warp_ballot(is_same) >> (lane_id() & ~3) << 28 == 0xfu << 28;
}

template <class T>
__global__ void __launch_bounds__(EXACT_THREADS, 1) knn_exact_kernel(Asked<T> asked, const int64_t* n_listed,
                                                                  const int64_t* listed) {
  const Knn& op = asked.op;
  Pool& pool = static_shared<Pool>();
  const int64_t n = listed ? *n_listed : op.S * op.Q;
  int64_t next_s = 0, next_i = blockIdx.x;  // without a list: a division would cost the registers of a call
  const int64_t quad = threadIdx.x / QUAD;
  const bool is_aligned = asked.is_in_fours();
  for (int64_t task = blockIdx.x; task < n; task += gridDim.x) {
    for (; next_i >= op.Q && !listed; next_i -= op.Q) ++next_s;
    const int64_t s = listed ? listed[task] >> 32 : next_s, i = listed ? listed[task] & 0xffffffff : next_i;
    next_i += gridDim.x;
    const float within = within_of(op, s, i);
    Entry least = 0;  // of what this round looks for
    for (int64_t done = 0; done < op.k; done += ROUND) {
      const int most = static_cast<int>(min(op.k - done, static_cast<int64_t>(ROUND)));
      __syncthreads();
      if (threadIdx.x == 0) pool.n = 0, pool.bound = NO_ENTRY;
      __syncthreads();
      for (int64_t first = 0; least != NO_ENTRY && first < op.N; first += N_QUADS * RUN) {
        double dist2 = 0;
        for (int64_t j = first + quad * RUN; j < first + (quad + 1) * RUN; ++j) {
          const bool is_one = j < op.N, has_before = is_one && j > first + quad * RUN;
          const T* const point = asked.point(s, is_one ? j : 0);
          const bool is_known =
              is_same_row(point, has_before ? point - op.D : point, is_one ? op.D : 0, is_aligned) && has_before;
          const double found =
              pair_dist2(asked.query(s, i), point, is_one && !is_known ? op.D : 0, is_aligned);
          if (!is_known) dist2 = found;
          const Entry entry = make_entry(static_cast<float>(dist2), static_cast<int32_t>(j));
          if (threadIdx.x % QUAD == 0 && is_one && isfinite(dist2) && static_cast<float>(dist2) <= within &&
              least <= entry && entry < pool.bound && !is_barred(op, i, j))
            pool.entry[atomicAdd(&pool.n, 1)] = entry;
          __syncthreads();
          if (pool.n > POOL - N_QUADS) sort_pool(pool, most);
          __syncthreads();
        }
      }
      sort_pool(pool, most);
      for (int e = threadIdx.x; e < most; e += EXACT_THREADS)
        write_neighbour(op, (s * op.Q + i) * op.k + done + e, e < pool.n ? pool.entry[e] : NO_ENTRY);
      least = pool.n == most ? pool.entry[most - 1] + 1 : NO_ENTRY;
    }
    __syncthreads();
  }
}

// ---- what is launched

// The screen of an op on this device.
struct Plan {
  int R = 0;  // rows of RowSlots<R>; 0: all queries are the exact kernel's
  bool is_wgmma = false, is_resident = false;
  size_t shared_bytes = 0;
  int64_t n_splits = 1;
};

// Calls f(engine, R as a type) of the plan.
template <int R_>
struct Length {
  static constexpr int R = R_;
};

template <class F>
void with_screen(const Plan& plan, const F& f) {
  if (plan.is_wgmma) {
    if (plan.R == 1) f(WgmmaEngine{}, Length<1>{});
    if (plan.R == 2) f(WgmmaEngine{}, Length<2>{});
  } else {
    if (plan.R == 1) f(MmaEngine{}, Length<1>{});
    if (plan.R == 2) f(MmaEngine{}, Length<2>{});
    if (plan.R == 4) f(MmaEngine{}, Length<4>{});
  }
}

Plan plan_of(const Knn& op) {
  Plan plan;
  // More than k points are measured, by what float16 may confuse: of 32 R a quarter.
  for (int R : {4, 2, 1})
    if (op.k + 8 <= 28 * R) plan.R = R;
  // the slots of wgmma's 128 rows leave no room for anything else
  plan.is_wgmma = has_wgmma() && plan.R <= 2;
  if (plan.R == 0) return plan;
  const size_t most = max_shared_bytes();
  const int64_t n_pieces = std::max<int64_t>(round_up(op.D, PIECE) / PIECE, 1);
  auto fit = [&] {
    with_screen(plan, [&](auto engine, auto length) {
      using Memory = ScreenMemory<decltype(engine), decltype(length)::R>;
      plan.is_resident = Memory::bytes(n_pieces) <= most;
      plan.shared_bytes = Memory::bytes(plan.is_resident ? n_pieces : N_STAGES);
    });
    return plan.shared_bytes <= most;
  };
  if (!fit()) plan.is_wgmma = false;
  if (!fit()) return Plan{};
  // Blocks for every multiprocessor, as long as each has a few tiles to go through.
  const int64_t rows = plan.is_wgmma ? WgmmaEngine::ROWS : MmaEngine::ROWS, n_points = round_up(op.N, ROUND_UP);
  const int64_t n_blocks = std::max<int64_t>(op.S * (round_up(op.Q, ROUND_UP) / rows), 1);
  plan.n_splits = std::clamp<int64_t>(n_multiprocessors() / n_blocks, 1, std::max<int64_t>(n_points / 512, 1));
  return plan;
}

// Hands out aligned pieces of the scratch memory; of a null pointer, only their total is meant.
struct Scratch {
  unsigned char* memory;
  size_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* const taken = reinterpret_cast<T*>(memory + used);
    used += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 256));
    return taken;
  }
};

Prepared prepared_in(Scratch& scratch, const Knn& op, const Plan& plan) {
  Prepared prepared = {};
  prepared.depth = std::max<int64_t>(round_up(op.D, PIECE), PIECE);
  auto rows = [&](int64_t n, bool is_point, bool is_query) {
    Rows taken = {};
    taken.n = round_up(n, ROUND_UP);
    taken.cell = scratch.take<__half>(op.S * taken.n * prepared.depth);
    if (is_point) taken.column = scratch.take<Column>(op.S * taken.n);
    if (is_point) taken.hash = scratch.take<uint64_t>(op.S * taken.n);
    if (is_query)
      for (float** x : {&taken.base, &taken.rest, &taken.limit}) *x = scratch.take<float>(op.S * taken.n);
    return taken;
  };
  prepared.centre = scratch.take<float>(op.S * op.D);
  prepared.unit = scratch.take<double>(op.S);
  prepared.points = rows(op.N, true, op.is_self);
  prepared.queries = op.is_self ? prepared.points : rows(op.Q, false, true);
  prepared.n_splits = plan.n_splits;
  const int64_t n_rows = op.S * plan.n_splits * prepared.queries.n;
  with_screen(plan, [&](auto, auto length) {
    prepared.kept = scratch.take<Entry>(n_rows * RowSlots<decltype(length)::R>::CAPACITY);
  });
  prepared.n_kept = scratch.take<int32_t>(n_rows);
  prepared.cut = scratch.take<float>(n_rows);
  prepared.n_listed = scratch.take<int64_t>(1);
  prepared.n_thinned = scratch.take<int64_t>(1);
  prepared.listed = scratch.take<int64_t>(op.S * op.Q);
  prepared.n_different = scratch.take<int32_t>(op.S);
  prepared.different = scratch.take<int32_t>(op.S * MOST_DIFFERENT);
  prepared.kind = scratch.take<int32_t>(op.S * op.N);
  return prepared;
}

unsigned n_blocks_for(int64_t n, int64_t per_block) { return static_cast<unsigned>((n + per_block - 1) / per_block); }

}  // namespace

size_t knn_cuda_scratch(const Knn& op) {
  const Plan plan = plan_of(op);
  Scratch scratch{nullptr};
  if (plan.R > 0) prepared_in(scratch, op, plan);
  return scratch.used;
}

void knn_cuda(const Knn& op, Element element, void* scratch, CudaStream stream) {
  if (op.S * op.Q == 0) return;
  const Plan plan = plan_of(op);
  Scratch memory{static_cast<unsigned char*>(scratch)};
  const Prepared prepared = plan.R > 0 ? prepared_in(memory, op, plan) : Prepared{};
  const auto n_exact = static_cast<unsigned>(std::min<int64_t>(op.S * op.Q, 4 * n_multiprocessors()));
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const Asked<T> asked{reinterpret_cast<const T*>(op.points), reinterpret_cast<const T*>(op.queries), op};
    if (plan.R > 0) {
      launch(knn_centre_kernel<T>, n_blocks_for(op.S, 1), CENTRE_THREADS, 0, stream, asked, prepared);
      const int64_t n_rows = op.S * (prepared.points.n + (op.is_self ? 0 : prepared.queries.n));
      launch(knn_prepare_kernel<T>, n_blocks_for(n_rows, PREPARE_THREADS / 32), PREPARE_THREADS, 0, stream, asked,
             prepared);
      if (const auto half = static_cast<unsigned>(round_up(std::min<int64_t>(op.N, REPEAT_ROWS), 64) / 2))
        launch(knn_repeats_kernel<T>, n_blocks_for(op.S * n_blocks_for(op.N, REPEAT_ROWS), 1), half, 0, stream, asked,
               prepared);
      const int64_t most_kinds = op.is_self ? std::min<int64_t>(op.N / 2, MOST_DIFFERENT) + 1 : op.Q;
      const int64_t few_blocks = std::min<int64_t>((most_kinds + 1) / 2, 64);  // of a set: two kinds each, or more
      with_screen(plan, [&](auto engine, auto length) {
        using Engine = decltype(engine);
        constexpr int R = decltype(length)::R;
        launch(knn_screen_kernel<Engine, R>,
               n_blocks_for(op.S * plan.n_splits * prepared.queries.n, Engine::ROWS), Engine::THREADS,
               plan.shared_bytes, stream, op, prepared, plan.is_resident);
        launch(knn_rescore_kernel<T, R>, n_blocks_for(op.S * op.Q, RESCORE_THREADS / 32), RESCORE_THREADS, 0, stream,
               asked, prepared);
        launch(knn_few_kernel<T, R>, n_blocks_for(op.S * few_blocks, 1), FEW_THREADS, 0, stream, asked, prepared);
      });
    }
    launch(knn_exact_kernel<T>, n_exact, EXACT_THREADS, 0, stream, asked, prepared.n_listed, prepared.listed);
  });
}

}  // namespace clmfast
