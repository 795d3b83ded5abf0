// knn.cu's screen: tensor cores multiply queries by points, and every query keeps those of the smallest lower bounds.
#pragma once

#include <cstdint>

#include "knn_rows.cuh"
#include "nearest.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace clmfast {
namespace {

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
      const Asker asker = asker_of_row(op, row);
      group[half] = !asker.point_group ? 1 : asker.is_there ? short_group(*asker.query_group) : 0;
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
  const Column* const column_of = points.column + (asker_of_row(op, row).v * op.S + s) * points.n;
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
  // when twice as many points have been seen as the last time: then all warps do so at once, and none waits for others.
  constexpr int GROUP = 2, N_GROUPS = COLUMNS / 8 / GROUP;
  auto look_at = [&](const float (&products)[COLUMNS / 2], int tile, int& next, int until) {
    int first = tile * COLUMNS + 2 * (lane_id() % 4);
    compute_here(first);  // and not a column for each of 32 products, in as many registers
    struct alignas(16) Two {
      Column column[2];
    };
    const Two* twos = reinterpret_cast<const Two*>(column_of + first);
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

}  // namespace
}  // namespace clmfast
