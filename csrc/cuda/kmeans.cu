// kmeans on the GPU; the contract is ../kmeans.h. Labels, centroids and inertia are the CPU's bit for bit where the
// first centroids are: exact sums have no order, and distances and inertia are added up in the CPU's.
//
// resident   One launch does all: a cluster of blocks per run keeps its points as float16 in shared memory, and meets at
//            the cluster's barrier. What changes lies in global memory, that is, in the L2 cache: a read of it takes
//            hardly longer than one of another block's shared memory, and the steps are those of `streaming`.
// streaming  One launch per step, for points that fit no cluster, and devices without clusters. The host does not wait:
//            launches after the last iteration of a run return at once.
#include <algorithm>

#include "../kmeans.h"
#include "kmeans_move.cuh"
#include "kmeans_start.cuh"
#include "launch.cuh"

namespace clmfast {
namespace {

using namespace kmeans_gpu;

constexpr int MAX_CLUSTER = 16;
constexpr int64_t MAX_BLOCKS = 2048;         // of a step of `streaming`, for one run. Not tuned yet
constexpr size_t STATIC_SHARED = 12 * 1024;  // at least what the kernels have beside dynamic shared memory

constexpr size_t STREAMING_BYTES = static_cast<size_t>(Tiles::bytes(TILE, SLAB));

// The steps of `streaming` before the first iteration.
enum class Prepare { clear, reach, columns, place, start, write_start, place_centroids };

template <class T, bool IS_RESIDENT>
__device__ void start_step(const Kmeans& op, const Team& team, const Sizes& z, const Run& run, const T* points,
                           const Tiles& tiles, int64_t step) {
  if (op.start == KmeansStart::random)
    start_random(op, team, z, run);
  else
    start_plus_plus<T, IS_RESIDENT>(op, team, z, run, points, tiles, step);
}

// How many steps the start takes.
__host__ __device__ int64_t n_start_steps(const Kmeans& op) {
  if (op.init) return 0;
  return op.start == KmeansStart::random ? 1 : op.K + 1;
}

// ---- resident

template <class T>
__global__ void __launch_bounds__(THREADS, 1) resident_kernel(Kmeans op, Sizes sizes, char* scratch, int64_t run_bytes) {
  const Team team{static_cast<int64_t>(blockIdx.x / cluster_size()), static_cast<int>(cluster_rank()),
                  static_cast<int>(cluster_size())};
  struct Shared {  // what would take the registers of the reads that are on their way
    Run run;
    Sizes sizes;
  };
  Shared& shared = static_shared<Shared>();
  if (thread() == 0) shared = {Run::at(sizes, scratch + team.run * run_bytes), sizes};
  __syncthreads();
  const Run& run = shared.run;
  const Sizes& z = shared.sizes;
  const T* points = points_of<T>(op, team.run);
  const int n_tiles = (static_cast<int>(z.n_tiles) + team.n_blocks - 1) / team.n_blocks;  // of a block
  const Tiles tiles(n_tiles * TILE, z.depth);

  clear(team, z, run);
  cluster_sync();
  find_reach(team, z, run, points);
  cluster_sync();
  find_columns(team, z, run, init_of(op, team.run));
  cluster_sync();
  place_points<T, true>(team, z, run, points, tiles.points, tiles.stride);
  cluster_sync();
#pragma unroll 1
  for (int64_t step = 0; step < n_start_steps(op); ++step) {
    start_step<T, true>(op, team, z, run, points, tiles, step);
    cluster_sync();
  }
  write_start(op, team, z, run, points);
  bound_moves(op, team, z, run);
  cluster_sync();
  place_centroids(team, z, run);
  cluster_sync();

  Verdict verdict{true, false};
  int64_t n_iter = 0;
  const int depth = static_cast<int>(z.depth);
  load_columns(z, run, tiles, 0, 0, depth);
  // Each step is called in one place, in the last round as before it, and loops are unrolled for nothing but reads on
  // their way: what an iteration runs through should stay in the caches of instructions, the larger of some 128 KB.
#pragma unroll 1
  for (bool is_last = false;; is_last = !verdict.is_active) {
    const int parity = ++n_iter % 2;
    if (!verdict.is_consistent) label_points<T, true>(team, z, run, points, tiles, parity, true);
    Piece piece;
    if (!is_last) {
      cluster_sync();
      piece = Piece::first(team, z, run);  // on its way while it is found out whether a cluster is empty
    }
    const bool is_any_empty = !is_last && has_empty(z, run);
    if (is_last || is_any_empty) measure_own(team, z, run, points, is_last);
    if (is_last) break;
    int n_taken = 0;
    if (is_any_empty) {
      cluster_sync();
      if (team.rank == 0) take_over(z, run);
      cluster_sync();
      n_taken = run.control->n_taken;
    }
    move_centroids(team, z, run, points, n_taken, piece);
    if (team.rank == 0 && thread() == 0)
      run.control->n_changed[1 - parity] = 0;  // read before the last barrier but one
    cluster_sync();
    load_columns(z, run, tiles, 0, 0, depth);  // for the next labels, while it is found out whether there are any
    verdict = judge(op, team, z, run, points, n_iter, n_taken, parity);
  }
  cp_async_wait<0>();
  --n_iter;  // the last round moved no centroid
  if (team.rank == 0 && thread() == 0) run.control->n_iter = n_iter;
}

// ---- streaming

__device__ Team team_of_launch(int64_t n_blocks) {
  const uint32_t n = static_cast<uint32_t>(n_blocks);
  return {static_cast<int64_t>(blockIdx.x / n), static_cast<int>(blockIdx.x % n), static_cast<int>(n)};
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) prepare_kernel(Kmeans op, char* scratch, int64_t n_blocks, Prepare what,
                                                             int64_t step) {
  const Sizes z(op);
  const Team team = team_of_launch(n_blocks);
  const Run run = Run::at(op, scratch, team.run);
  const T* points = points_of<T>(op, team.run);
  switch (what) {
    case Prepare::clear:
      return clear(team, z, run);
    case Prepare::reach:
      return find_reach(team, z, run, points);
    case Prepare::columns:
      return find_columns(team, z, run, init_of(op, team.run));
    case Prepare::place:
      return place_points<T, false>(team, z, run, points, nullptr, 0);
    case Prepare::start:
      return start_step<T, false>(op, team, z, run, points, Tiles(TILE, SLAB), step);
    case Prepare::write_start:
      bound_moves(op, team, z, run);
      return write_start(op, team, z, run, points);
    case Prepare::place_centroids:
      return place_centroids(team, z, run);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) label_kernel(Kmeans op, char* scratch, int64_t n_blocks, bool is_last) {
  const Sizes z(op);
  const Team team = team_of_launch(n_blocks);
  const Run run = Run::at(op, scratch, team.run);
  if (is_last ? run.control->is_consistent : !run.control->is_active) return;
  label_points<T, false>(team, z, run, points_of<T>(op, team.run), Tiles(TILE, SLAB), 0);
}

// After a labelling: where a cluster is empty, how far the points are. At the end: inertia.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) own_kernel(Kmeans op, char* scratch, int64_t n_blocks, bool is_last) {
  const Sizes z(op);
  const Team team = team_of_launch(n_blocks);
  const Run run = Run::at(op, scratch, team.run);
  if (!is_last && (!run.control->is_active || !has_empty(z, run))) return;
  measure_own(team, z, run, points_of<T>(op, team.run), is_last);
}

// One block per run.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) move_kernel(Kmeans op, char* scratch) {
  const Sizes z(op);
  const Team team{static_cast<int64_t>(blockIdx.x), 0, 1};
  const Run run = Run::at(op, scratch, team.run);
  if (!run.control->is_active) return;
  const T* points = points_of<T>(op, team.run);
  int n_taken = 0;
  if (has_empty(z, run)) {
    take_over(z, run);
    n_taken = run.control->n_taken;
  }
  const int64_t n_iter = run.control->n_iter + 1;
  move_centroids(team, z, run, points, n_taken, Piece::first(team, z, run));
  __syncthreads();
  const Verdict verdict = judge(op, team, z, run, points, n_iter, n_taken, 0);
  __syncthreads();
  if (thread() > 0) return;
  run.control->n_iter = n_iter;
  run.control->n_changed[0] = 0;
  run.control->is_active = verdict.is_active;
  run.control->is_consistent = verdict.is_consistent;
}

// ---- both

// The restart of lowest inertia, of equals the earliest, to the outputs. Blocks share out a set.
__global__ void __launch_bounds__(THREADS) write_best_kernel(Kmeans op, Sizes z, char* scratch, int64_t run_bytes,
                                                             int64_t n_blocks) {
  const Team team = team_of_launch(n_blocks);
  const int64_t s = team.run;
  struct Best {
    int64_t restart;
    double inertia;
  };
  Best& best = static_shared<Best>();
  if (thread() == 0) {
    best.restart = -1;
#pragma unroll 1
    for (int64_t restart = 0; restart < op.n_init; ++restart) {
      const Run run = Run::at(z, scratch + (s * op.n_init + restart) * run_bytes);
      double inertia = 0;
#pragma unroll 4
      for (int64_t tile = 0; tile < z.n_tiles; ++tile) inertia += run.tile_inertia[tile];
      if (best.restart < 0 || inertia < best.inertia) best.restart = restart, best.inertia = inertia;
    }
  }
  __syncthreads();
  const Run run = Run::at(z, scratch + (s * op.n_init + best.restart) * run_bytes);
  team.for_each(z.N, [&](int64_t i) { op.label[s * z.N + i] = run.label[i]; });
  team.for_each(z.K * z.D, [&](int64_t e) { op.centroid[s * z.K * z.D + e] = run.centroid[e]; });
  if (team.rank > 0 || thread() > 0) return;
  op.inertia[s] = best.inertia;
  op.n_iter[s] = run.control->n_iter;
}

// ---- launchers

// Blocks of a cluster whose shared memory holds a set, or 0 where none does.
template <class T>
int cluster_for(const Sizes& z) {
  if (!has_clusters()) return 0;
  const size_t most = max_shared_bytes() - STATIC_SHARED;
  int n_blocks = 1;  // not tuned yet: a tile for each block
  while (n_blocks < MAX_CLUSTER && n_blocks < z.n_tiles) n_blocks *= 2;
  const size_t bytes = static_cast<size_t>(Tiles::bytes(ceil_div(z.n_tiles, n_blocks) * TILE, z.depth));
  if (bytes > most || n_resident_clusters(resident_kernel<T>, n_blocks, THREADS, bytes) == 0) return 0;
  return n_blocks;
}

struct Launcher {
  const Kmeans& op;
  cudaStream_t stream;
  char* scratch;
  Sizes z;
  int64_t n_runs;

  template <class T>
  void resident(int cluster) {
    launch_cluster(resident_kernel<T>, cluster, dim3(static_cast<unsigned>(n_runs * cluster)), THREADS,
                   static_cast<size_t>(Tiles::bytes(ceil_div(z.n_tiles, cluster) * TILE, z.depth)), stream, op, z,
                   scratch, static_cast<int64_t>(Run::bytes(op)));
  }

  template <class T>
  void streaming() {
    const int64_t n_blocks = std::min(z.n_tiles, MAX_BLOCKS);
    const dim3 grid(static_cast<unsigned>(n_runs * n_blocks)), one_each(static_cast<unsigned>(n_runs));
    auto prepare = [&](Prepare what, int64_t step = 0) {
      launch(prepare_kernel<T>, grid, THREADS, what == Prepare::start ? STREAMING_BYTES : 0, stream, op, scratch,
             n_blocks, what, step);
    };
    auto label = [&](bool is_last) {
      launch(label_kernel<T>, grid, THREADS, STREAMING_BYTES, stream, op, scratch, n_blocks, is_last);
    };
    for (Prepare what : {Prepare::clear, Prepare::reach, Prepare::columns, Prepare::place}) prepare(what);
    for (int64_t step = 0; step < n_start_steps(op); ++step) prepare(Prepare::start, step);
    prepare(Prepare::write_start);
    prepare(Prepare::place_centroids);
    for (int64_t i = 0; i < op.max_iter; ++i) {
      label(false);
      launch(own_kernel<T>, grid, THREADS, 0, stream, op, scratch, n_blocks, false);
      launch(move_kernel<T>, one_each, THREADS, 0, stream, op, scratch);
    }
    label(true);
    launch(own_kernel<T>, grid, THREADS, 0, stream, op, scratch, n_blocks, true);
  }
};

}  // namespace

size_t kmeans_cuda_scratch(const Kmeans& op) { return Run::bytes(op) * static_cast<size_t>(op.S * op.n_init); }

void kmeans_cuda(const Kmeans& op, Element element, void* scratch, CudaStream stream, KmeansPath path) {
  if (op.S == 0) return;
  Launcher launcher{op, stream, static_cast<char*>(scratch), Sizes(op), op.S * op.n_init};
  with_element(element, [&](auto x) {
    using T = decltype(x);
    const int cluster = path == KmeansPath::streaming ? 0 : cluster_for<T>(launcher.z);
    if (cluster == 0 && path == KmeansPath::resident)
      throw std::invalid_argument("kmeans: these points fit no cluster of this device");
    if (cluster > 0)
      launcher.resident<T>(cluster);
    else
      launcher.streaming<T>();
  });
  const int64_t n_blocks = std::min<int64_t>(ceil_div(op.N, THREADS), 16);  // not tuned yet
  launch(write_best_kernel, dim3(static_cast<unsigned>(op.S * n_blocks)), THREADS, 0, stream, op, launcher.z,
         launcher.scratch, static_cast<int64_t>(Run::bytes(op)), n_blocks);
}

}  // namespace clmfast
