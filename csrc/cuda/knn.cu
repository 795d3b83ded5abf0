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
// as they like. Symmetry of the self form is not used: 7 sets of 2048 points are one wave of query tiles, whose slots
// stay in their block; half the products would need lists of rows and columns that move between blocks.
#include "../knn.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "element.cuh"
#include "knn_rows.cuh"
#include "knn_screen.cuh"
#include "launch.cuh"
#include "nearest.cuh"
#include "pair.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace clmfast {
namespace {

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
  if (task >= op.S * op.A) return;
  const int64_t s = task / op.A, i = task % op.A;
  const Asker asker = asker_of_answer(op, i);
  const int64_t query = asker.query, row = asker.row, at = s * prepared.queries.n + row;
  const float base = prepared.queries.base[at], rest = prepared.queries.rest[at], limit = prepared.queries.limit[at];
  const float within = within_of(op, s, query);
  const double unit = prepared.unit[s];
  const bool is_aligned = asked.is_in_fours();
  if (prepared.is_few(op, s)) return;

  Entry list[R];
  float cut = limit;
#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = NO_ENTRY;
  for (int64_t split = 0; split < prepared.n_splits; ++split) {
    const int64_t from = (s * prepared.n_splits + split) * prepared.queries.n + row;
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
      two_pairs_dist2(asked.query(s, query), asked.point(s, j), asked.point(s, j_other), op.D, is_aligned, dist2);
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
    if (32 * r + lane < k) write_neighbour(op, (s * op.A + i) * k + 32 * r + lane, list[r]);
  }
  __syncwarp();
  const float kth = measured[k - 1] == NO_ENTRY ? within : number_of(measured[k - 1]);
  const bool is_certain = rest < INF && (cut == limit || cut >= limit_of(kth, base, rest, unit));
  if (lane == 0 && !is_certain)
    prepared.listed[atomicAdd(reinterpret_cast<unsigned long long*>(prepared.n_listed), 1ull)] = s << 32 | i;
}

// ---- few: blocks of a set take one kind of query after the other; every answer that no point asks for is a kind

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
  const Asker asker = asker_of_answer(op, i);
  const float within = within_of(op, s, asker.query);
  Entry list[R], bound = NO_ENTRY;
#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = NO_ENTRY;
#pragma unroll 2
  for (int64_t first = 0; first < op.N; first += 32) {
    const int64_t j = first + lane;
    const int32_t of_point = j < op.N ? kind[j] : -1;
    const float dist2 = of_point < 0 ? NAN : few.dist2[of_point];
    Entry entry = dist2 <= within ? make_entry(dist2, static_cast<int32_t>(j)) : NO_ENTRY;
    if (entry >= bound || is_barred(op, asker, j)) entry = NO_ENTRY;
    if (!warp_any(entry != NO_ENTRY)) continue;
    take_32(list, entry, lane);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (last / 32 == r) bound = warp_shuffle(list[r], last % 32);
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (32 * r + lane < op.k) write_neighbour(op, (s * op.A + i) * op.k + 32 * r + lane, list[r]);
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
  const int64_t n_kinds = op.is_self ? n + 1 : op.A;  // the last kind of points are those that are not finite
#pragma unroll 1
  for (int64_t a = blockIdx.x % n_blocks; a < n_kinds; a += n_blocks) {
    const bool is_finite = !op.is_self || a < n;
    const int64_t of_kind = op.is_self ? (is_finite ? different[a] : 0) : asker_of_answer(op, a).query;
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
  const int64_t n = listed ? *n_listed : op.S * op.A;
  int64_t next_s = 0, next_i = blockIdx.x;  // without a list: a division would cost the registers of a call
  const int64_t quad = threadIdx.x / QUAD;
  const bool is_aligned = asked.is_in_fours();
  for (int64_t task = blockIdx.x; task < n; task += gridDim.x) {
    for (; next_i >= op.A && !listed; next_i -= op.A) ++next_s;
    const int64_t s = listed ? listed[task] >> 32 : next_s, i = listed ? listed[task] & 0xffffffff : next_i;
    next_i += gridDim.x;
    const Asker asker = asker_of_answer(op, i);
    const float within = within_of(op, s, asker.query);
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
              pair_dist2(asked.query(s, asker.query), point, is_one && !is_known ? op.D : 0, is_aligned);
          if (!is_known) dist2 = found;
          const Entry entry = make_entry(static_cast<float>(dist2), static_cast<int32_t>(j));
          if (threadIdx.x % QUAD == 0 && is_one && isfinite(dist2) && static_cast<float>(dist2) <= within &&
              least <= entry && entry < pool.bound && !is_barred(op, asker, j))
            pool.entry[atomicAdd(&pool.n, 1)] = entry;
          __syncthreads();
          if (pool.n > POOL - N_QUADS) sort_pool(pool, most);
          __syncthreads();
        }
      }
      sort_pool(pool, most);
      for (int e = threadIdx.x; e < most; e += EXACT_THREADS)
        write_neighbour(op, (s * op.A + i) * op.k + done + e, e < pool.n ? pool.entry[e] : NO_ENTRY);
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
  const int64_t n_blocks = std::max<int64_t>(op.S * (n_query_rows(op) / rows), 1);
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
    taken.n = n;
    taken.cell = scratch.take<__half>(op.S * taken.n * prepared.depth);
    if (is_point) taken.column = scratch.take<Column>(op.n_views * op.S * taken.n);
    if (is_point) taken.hash = scratch.take<uint64_t>(op.S * taken.n);
    if (is_query)
      for (float** x : {&taken.base, &taken.rest, &taken.limit}) *x = scratch.take<float>(op.S * taken.n);
    return taken;
  };
  prepared.centre = scratch.take<float>(op.S * op.D);
  prepared.unit = scratch.take<double>(op.S);
  prepared.points = rows(round_up(op.N, ROUND_UP), true, op.is_self);
  prepared.queries = op.is_self ? prepared.points : rows(n_query_rows(op), false, true);
  prepared.n_splits = plan.n_splits;
  const int64_t n_rows = op.S * plan.n_splits * prepared.queries.n;
  with_screen(plan, [&](auto, auto length) {
    prepared.kept = scratch.take<Entry>(n_rows * RowSlots<decltype(length)::R>::CAPACITY);
  });
  prepared.n_kept = scratch.take<int32_t>(n_rows);
  prepared.cut = scratch.take<float>(n_rows);
  prepared.n_listed = scratch.take<int64_t>(1);
  prepared.n_thinned = scratch.take<int64_t>(1);
  prepared.listed = scratch.take<int64_t>(op.S * op.A);
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
  if (op.S * op.A == 0) return;
  const Plan plan = plan_of(op);
  Scratch memory{static_cast<unsigned char*>(scratch)};
  const Prepared prepared = plan.R > 0 ? prepared_in(memory, op, plan) : Prepared{};
  const auto n_exact = static_cast<unsigned>(std::min<int64_t>(op.S * op.A, 4 * n_multiprocessors()));
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
      const int64_t most_kinds = op.is_self ? std::min<int64_t>(op.N / 2, MOST_DIFFERENT) + 1 : op.A;
      const int64_t few_blocks = std::min<int64_t>((most_kinds + 1) / 2, 64);  // of a set: two kinds each, or more
      with_screen(plan, [&](auto engine, auto length) {
        using Engine = decltype(engine);
        constexpr int R = decltype(length)::R;
        launch(knn_screen_kernel<Engine, R>,
               n_blocks_for(op.S * plan.n_splits * prepared.queries.n, Engine::ROWS), Engine::THREADS,
               plan.shared_bytes, stream, op, prepared, plan.is_resident);
        launch(knn_rescore_kernel<T, R>, n_blocks_for(op.S * op.A, RESCORE_THREADS / 32), RESCORE_THREADS, 0, stream,
               asked, prepared);
        launch(knn_few_kernel<T, R>, n_blocks_for(op.S * few_blocks, 1), FEW_THREADS, 0, stream, asked, prepared);
      });
    }
    launch(knn_exact_kernel<T>, n_exact, EXACT_THREADS, 0, stream, asked, prepared.n_listed, prepared.listed);
  });
}

}  // namespace clmfast
