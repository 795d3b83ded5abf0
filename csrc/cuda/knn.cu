// knn on a GPU: the contract is ../knn.h. Five kernels, of which the last finds nothing to do on most data.
//
//   centre    a set's centre and unit, from a sample of its rows
//   prepare   every row in units from the centre, rounded to float16, and what that rounding can have cost
//   screen    tensor cores multiply queries by points; every query keeps the L > k points of the smallest lower bounds
//   rescore   measures those that can be neighbours as the contract says, in float64; if a point that the screen left
//             out might be nearer than the k-th, the query is put on a list
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
// The answer does not depend on which points the screen keeps, only its cost does: so lists, grid and atomics may come
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

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// gamma above. A tensor core aligns a few products at a time with the sum so far and cuts off what sticks out below the
// largest one's last place: of V100's kind, four products and no place to spare, at most 1.25 D such losses of 2^-23;
// then the sum with floor is rounded, and the constants are.
__device__ double product_error(int64_t D) { return 1.25 * static_cast<double>(D) * 0x1p-23 + 0x1p-20; }

// At most, and at least, x.
__device__ float float_below(double x) { return __double2float_rd(x); }
__device__ float float_above(double x) { return __double2float_ru(x); }

// ---- the prepared rows

struct Rows {
  __half* cell;     // [S, n, depth]: h, zeros behind the coordinates and behind the rows
  float* floor;     // [S, n]  infinity: nobody's neighbour
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
  Entry* kept;        // [S, n_splits, queries.n, L] ascending by key
  float* cut;         // [S, n_splits, queries.n]  no point left out has a smaller key
  int64_t n_splits;   // parts of the points, each screened by its own blocks
  int64_t* n_listed;  // queries on the list
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
  double reach = 0, centre_reach = 0;
  for (int64_t d = threadIdx.x; d < D; d += CENTRE_THREADS) {
    double sum = 0, low = INF, high = -INF;
    int n_finite = 0;
#pragma unroll 8
    for (int64_t i = 0; i < n; ++i) {
      const double x = widen(asked.point(s, i * N / n)[d]);
      if (!isfinite(x)) continue;
      sum += x, low = min(low, x), high = max(high, x), ++n_finite;
    }
    const float centre = n_finite ? static_cast<float>(sum / n_finite) : 0.f;
    prepared.centre[s * D + d] = centre;
    if (n_finite) reach = max(reach, max(high - centre, centre - low));
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
    if (s == 0) *prepared.n_listed = 0;
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
  bool is_finite = true, is_inside = true;
  for (int64_t d = 2 * lane; d < prepared.depth; d += 64) {
    __half2 pair;
    __half* of_pair = &pair.x;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool is_coordinate = is_there && d + e < D;
      const double x = is_coordinate ? widen(row[d + e]) : 0.f;
      if (!isfinite(x)) is_finite = false;
      double y = is_coordinate ? (x - centre[d + e]) * unit : 0;
      if (!(fabs(y) <= LARGEST)) is_inside = false, y = y > 0 ? LARGEST : -LARGEST;
      of_pair[e] = __float2half_rn(static_cast<float>(y));
      const double h = widen(of_pair[e]);
      norm2 += h * h, rest2 += (y - h) * (y - h);
    }
    *reinterpret_cast<__half2*>(rows.cell + at * prepared.depth + d) = pair;
  }
  norm2 = warp_sum(norm2), rest2 = warp_sum(rest2);
  is_finite = warp_all(is_finite), is_inside = warp_all(is_inside);
  if (lane > 0) return;
  const double base = norm2 * (1 - product_error(D));
  if (is_point) rows.floor[at] = is_there && is_finite ? float_below(base - rest2 / SHARE) : INF;
  if (!is_query) return;
  rows.base[at] = float_below(base);
  const float rest = float_above(sqrt(rest2) + sqrt(norm2) * 0x1p-40);  // y itself is rounded, to float64
  rows.rest[at] = is_there && is_finite && !is_inside ? INF : rest;
  const float within = is_there ? within_of(op, s, i) : -1;
  const bool may_ask = is_there && is_finite && is_inside && within >= 0;
  rows.limit[at] = may_ask ? limit_of(within, base, rest, unit) : -INF;
}

// ---- screen

constexpr int N_STAGES = 4, N_AHEAD = N_STAGES - 2;  // pieces of columns on their way while one is multiplied
constexpr int SLOTS = 8;                             // fresh points that a lane keeps of each of its rows

struct Fresh {
  float key;
  int32_t column;
};

// The lists of a warp's 16 rows. Lane 4 g + t looks at rows g and g + 8. What it finds below a row's limit goes to its
// own slots: one compare and one guarded store for each number. When a lane's slots fill up, the warp sorts the row's
// slots into the row's list, which brings the limit down.
template <int R>
struct RowLists {
  static constexpr int BYTES_PER_ROW = 32 * R * sizeof(Entry) + 32 * sizeof(Fresh);

  Entry* list;   // [16][32 R] ascending
  Fresh* slots;  // [16][4][SLOTS]
  float limit[2];
  int n[2] = {0, 0};

  __device__ RowLists(unsigned char* shared) {
    list = reinterpret_cast<Entry*>(shared);
    slots = reinterpret_cast<Fresh*>(shared + 16 * 32 * R * sizeof(Entry));
    for (int e = lane_id(); e < 16 * 32 * R; e += 32) list[e] = NO_ENTRY;
  }

  __device__ void look_at(int half, float key, int32_t column) {
    if (key < limit[half]) slots[half * 256 + lane_id() * SLOTS + n[half]++] = {key, column};
  }

  // Can't every lane look at n_next more numbers of each row?
  __device__ bool is_full(int n_next) const { return warp_any(max(n[0], n[1]) > SLOTS - n_next); }

  // The slots of rows of which a lane holds more than `most`.
  __device__ void empty(int most, const Knn& op, int64_t first_row) {
    const int lane = lane_id();
    const uint32_t low = warp_ballot(n[0] > most), high = warp_ballot(n[1] > most);
    __syncwarp();
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      const bool is_high = row >= 8;
      const int quad = row % 8;
      if (!((is_high ? high : low) >> (4 * quad) & 15)) continue;
      take_slots(row, warp_shuffle(is_high ? n[1] : n[0], 4 * quad + lane / SLOTS), op, first_row);
      if (lane / 4 != quad) continue;
      const float reached = number_of(list[row * 32 * R + 32 * R - 1]);
      if (is_high)
        n[1] = 0, limit[1] = fminf(limit[1], reached);
      else
        n[0] = 0, limit[0] = fminf(limit[0], reached);
    }
    __syncwarp();
  }

 private:
  // n_full: how many of the eight slots that this lane is one of.
  __device__ void take_slots(int row, int n_full, const Knn& op, int64_t first_row) {
    const int lane = lane_id();
    Entry entry = NO_ENTRY;
    if (lane % SLOTS < n_full) {
      const Fresh fresh = slots[row * 32 + lane];
      if (!is_barred(op, first_row + row, fresh.column)) entry = make_entry(fresh.key, fresh.column);
    }
    Entry all[R];
#pragma unroll
    for (int r = 0; r < R; ++r) all[r] = list[row * 32 * R + 32 * r + lane];
    take_32(all, entry, lane);
#pragma unroll
    for (int r = 0; r < R; ++r) list[row * 32 * R + 32 * r + lane] = all[r];
    __syncwarp();
  }
};

// The shared memory of a screening block: all pieces of its queries, or, if they don't fit, one beside each of columns.
template <class Engine, int R>
struct ScreenMemory {
  static constexpr int QUERY_BYTES = Engine::ROWS * PIECE_BYTES, COLUMN_BYTES = Engine::COLUMNS * PIECE_BYTES;
  static constexpr int LIST_BYTES = Engine::ROWS * RowLists<R>::BYTES_PER_ROW;

  static size_t bytes(int64_t n_query_pieces) {
    return static_cast<size_t>(n_query_pieces) * QUERY_BYTES + N_STAGES * COLUMN_BYTES + LIST_BYTES;
  }
};

template <class Engine, int R>
__global__ void __launch_bounds__(Engine::THREADS, 1) knn_screen_kernel(Knn op, Prepared prepared, bool is_resident) {
  using Memory = ScreenMemory<Engine, R>;
  constexpr int COLUMNS = Engine::COLUMNS;
  const Rows &points = prepared.points, &queries = prepared.queries;
  const int64_t n_row_tiles = queries.n / Engine::ROWS, n_tiles = points.n / COLUMNS;
  const int64_t s = blockIdx.x / (n_row_tiles * prepared.n_splits);
  const int64_t split = blockIdx.x / n_row_tiles % prepared.n_splits;
  const int64_t row = blockIdx.x % n_row_tiles * Engine::ROWS;
  const int64_t begin = n_tiles * split / prepared.n_splits, end = n_tiles * (split + 1) / prepared.n_splits;
  const int n_pieces = static_cast<int>(prepared.depth / PIECE);

  unsigned char* const columns = dynamic_shared<unsigned char>();
  unsigned char* const rows = columns + N_STAGES * Memory::COLUMN_BYTES;
  unsigned char* const lists = rows + (is_resident ? n_pieces : N_STAGES) * Memory::QUERY_BYTES;
  const __half* const row_cells = queries.cell + (s * queries.n + row) * prepared.depth;
  const __half* const column_cells = points.cell + s * points.n * prepared.depth;

  const int64_t warp_row = row + warp_id() * 16, at = s * queries.n + warp_row;
  RowLists<R> nearest(lists + warp_id() * 16 * RowLists<R>::BYTES_PER_ROW);
#pragma unroll
  for (int half = 0; half < 2; ++half) nearest.limit[half] = queries.limit[at + half * 8 + lane_id() / 4];

  // Pieces come in the order in which they are multiplied.
  int64_t next_tile = begin;
  int next_piece = 0, next_stage = 0;
  auto load_next = [&] {
    if (next_tile < end) {
      load_piece<COLUMNS, Engine::THREADS>(
          columns + next_stage * Memory::COLUMN_BYTES,
          column_cells + next_tile * COLUMNS * prepared.depth + next_piece * PIECE, prepared.depth);
      if (!is_resident)
        load_piece<Engine::ROWS, Engine::THREADS>(rows + next_stage * Memory::QUERY_BYTES,
                                                  row_cells + next_piece * PIECE, prepared.depth);
      if (++next_piece == n_pieces) next_piece = 0, ++next_tile;
      next_stage = (next_stage + 1) % N_STAGES;
    }
    cp_async_commit();
  };

  int stage = 0;
  auto multiply_tile = [&](float (&products)[COLUMNS / 2]) {
    for (int piece = 0; piece < n_pieces; ++piece) {
      cp_async_wait<N_AHEAD - 1>();
      Engine::copied();
      Engine::template wait<1>(products);  // nobody reads the stage that is loaded next
      __syncthreads();
      load_next();
      Engine::multiply(products, rows + (is_resident ? piece : stage) * Memory::QUERY_BYTES,
                       columns + stage * Memory::COLUMN_BYTES, piece == 0);
      stage = (stage + 1) % N_STAGES;
    }
  };

  auto look_at_tile = [&](const float (&products)[COLUMNS / 2], int64_t tile) {
    const int first = static_cast<int>(tile * COLUMNS) + 2 * (lane_id() % 4);
    const float2* floors = reinterpret_cast<const float2*>(points.floor + s * points.n + first);
    // In groups, between which slots may have to be emptied: there, and nowhere else, so that the code stays small.
    constexpr int GROUP = 2;
    int next = 0;
    while (true) {
#pragma unroll
      for (int group = 0; group < COLUMNS / 8 / GROUP; ++group) {
        if (group != next || nearest.is_full(2 * GROUP)) continue;
        ++next;
#pragma unroll
        for (int j = group * GROUP; j < (group + 1) * GROUP; ++j) {
          const float2 floor = floors[4 * j];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            nearest.look_at(half, __fmaf_rn(-2, products[4 * j + 2 * half], floor.x), first + 8 * j);
            nearest.look_at(half, __fmaf_rn(-2, products[4 * j + 2 * half + 1], floor.y), first + 8 * j + 1);
          }
        }
      }
      if (next == COLUMNS / 8 / GROUP) break;
      nearest.empty(SLOTS - 2 * GROUP, op, warp_row);
    }
  };

  if (is_resident)
    for (int piece = 0; piece < n_pieces; ++piece)
      load_piece<Engine::ROWS, Engine::THREADS>(rows + piece * Memory::QUERY_BYTES, row_cells + piece * PIECE,
                                                prepared.depth);
  for (int i = 0; i < N_AHEAD; ++i) load_next();
  // While a tile is multiplied, the one before is looked at.
  float even[COLUMNS / 2], odd[COLUMNS / 2];
  for (int64_t tile = begin; tile <= end; tile += 2) {
    if (tile < end) multiply_tile(even);
    if (tile > begin) look_at_tile(odd, tile - 1);
    Engine::template wait<0>(even);
    if (tile == end) break;
    if (tile + 1 < end) multiply_tile(odd);
    look_at_tile(even, tile);
    Engine::template wait<0>(odd);
  }
  nearest.empty(0, op, warp_row);
  cp_async_wait<0>();

  const int64_t to = (s * prepared.n_splits + split) * queries.n + warp_row;
  for (int e = lane_id(); e < 16 * 32 * R; e += 32) prepared.kept[to * 32 * R + e] = nearest.list[e];
  if (lane_id() % 4 == 0)
#pragma unroll
    for (int half = 0; half < 2; ++half) prepared.cut[to + half * 8 + lane_id() / 4] = nearest.limit[half];
}

// ---- rescore: one warp per query

constexpr int RESCORE_THREADS = 256;

template <int R>
struct Measured {
  Entry of_warp[RESCORE_THREADS / 32][32 * R];
};

template <class T, int R>
__global__ void __launch_bounds__(RESCORE_THREADS, 2) knn_rescore_kernel(Asked<T> asked, Prepared prepared) {
  const Knn& op = asked.op;
  const int lane = lane_id();
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (RESCORE_THREADS / 32) + warp_id();
  if (task >= op.S * op.Q) return;
  const int64_t s = task / op.Q, i = task % op.Q, at = s * prepared.queries.n + i;
  const float base = prepared.queries.base[at], rest = prepared.queries.rest[at], limit = prepared.queries.limit[at];
  const float within = within_of(op, s, i);
  const double unit = prepared.unit[s];
  const bool is_aligned = asked.is_in_fours();

  Entry list[R];
  float cut = limit;
#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = NO_ENTRY;
  for (int64_t split = 0; split < prepared.n_splits; ++split) {
    const int64_t from = (s * prepared.n_splits + split) * prepared.queries.n + i;
    cut = fminf(cut, prepared.cut[from]);
#pragma unroll 1
    for (int r = 0; r < R; ++r) take_32(list, prepared.kept[from * 32 * R + 32 * r + lane], lane);
  }
  if (prepared.n_splits > 1) cut = fminf(cut, number_of(warp_shuffle(list[R - 1], 31)));  // others may have fallen off

  Entry* const measured = static_shared<Measured<R>>().of_warp[warp_id()];
  auto n_where = [&](auto holds) {
    int n = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) n += __popc(warp_ballot(list[r] != NO_ENTRY && holds(number_of(list[r]))));
    return n;
  };
  auto measure = [&](int from, int to) {
    for (int e = from + lane / QUAD; e - lane / QUAD < to; e += 32 / QUAD) {
      const bool is_one = e < to;
      const int32_t j = is_one ? index_of(measured[e]) : 0;
      const float dist2 = static_cast<float>(
          pair_dist2(asked.query(s, i), asked.point(s, j), is_one ? op.D : 0, is_aligned));
      if (is_one && lane % QUAD == 0) measured[e] = dist2 <= within ? make_entry(dist2, j) : NO_ENTRY;
    }
    __syncwarp();
  };
#pragma unroll
  for (int r = 0; r < R; ++r) measured[32 * r + lane] = list[r];
  __syncwarp();

  // The k of the smallest bounds first, then those whose bound is below what came out.
  const int k = static_cast<int>(op.k), n = n_where([](float) { return true; }), n_first = min(k, n);
  measure(0, n_first);
  Entry last = n < k ? NO_ENTRY : 0;
  for (int e = lane; e < n_first; e += 32) last = larger(last, measured[e]);
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
  int R = 0;  // lists of L = 32 R; 0: all queries are the exact kernel's
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
  // A list is longer than k by what float16 may confuse. Not tuned yet: a quarter.
  for (int R : {4, 2, 1})
    if (op.k + 8 <= 28 * R) plan.R = R;
  // wgmma's 128 rows of lists of 128 leave no room for anything else
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
    if (is_point) taken.floor = scratch.take<float>(op.S * taken.n);
    if (is_query)
      for (float** x : {&taken.base, &taken.rest, &taken.limit}) *x = scratch.take<float>(op.S * taken.n);
    return taken;
  };
  prepared.centre = scratch.take<float>(op.S * op.D);
  prepared.unit = scratch.take<double>(op.S);
  prepared.points = rows(op.N, true, op.is_self);
  prepared.queries = op.is_self ? prepared.points : rows(op.Q, false, true);
  prepared.n_splits = plan.n_splits;
  prepared.kept = scratch.take<Entry>(op.S * plan.n_splits * prepared.queries.n * 32 * plan.R);
  prepared.cut = scratch.take<float>(op.S * plan.n_splits * prepared.queries.n);
  prepared.n_listed = scratch.take<int64_t>(1);
  prepared.listed = scratch.take<int64_t>(op.S * op.Q);
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
      with_screen(plan, [&](auto engine, auto length) {
        using Engine = decltype(engine);
        constexpr int R = decltype(length)::R;
        launch(knn_screen_kernel<Engine, R>,
               n_blocks_for(op.S * plan.n_splits * prepared.queries.n, Engine::ROWS), Engine::THREADS,
               plan.shared_bytes, stream, op, prepared, plan.is_resident);
      });
      auto rescore = [&](auto length) {
        launch(knn_rescore_kernel<T, decltype(length)::R>, n_blocks_for(op.S * op.Q, RESCORE_THREADS / 32),
               RESCORE_THREADS, 0, stream, asked, prepared);
      };
      if (plan.R == 1) rescore(Length<1>{});
      if (plan.R == 2) rescore(Length<2>{});
      if (plan.R == 4) rescore(Length<4>{});
    }
    launch(knn_exact_kernel<T>, n_exact, EXACT_THREADS, 0, stream, asked, prepared.n_listed, prepared.listed);
  });
}

}  // namespace clmfast
