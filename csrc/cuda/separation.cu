// separation on the GPU; the contract is ../separation.h. Four steps: who counts, the groups' means, every point's own
// and nearest other centroid, and the sums. All but the scatter between groups is added up in the CPU's order.
//
// Distances are the float64 ones of the contract from the start: for tens of groups a screen would cost what it saves.
#include "../separation.h"

#include <cmath>

#include "element.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 128;
constexpr int LANES = 16;   // that measure one distance: cpu/pair.h has 16 sums
constexpr int CHUNK = 256;  // points that are added up together first, as on the CPU

struct Scratch {
  double* mean;       // [S, K, D]
  double* between;    // [S, D]: the scatter between groups along d
  double* own2;       // [S, N]: dist2 to the own centroid; 0 of points that do not count
  double* silhouette; // [S, N]
  float* centroid;    // [S, K, D]
  int* count;         // [S, K]
  int* group;         // [S, N]: -1 where the point does not count

  static size_t bytes(const Separation& op) {
    return static_cast<size_t>(op.S) * (sizeof(double) * (op.n_labels * op.D + op.D + 2 * op.N) +
                                        sizeof(float) * (op.n_labels * op.D + op.n_labels + op.N));
  }
  Scratch(const Separation& op, void* memory) {
    mean = static_cast<double*>(memory);
    between = mean + op.S * op.n_labels * op.D;
    own2 = between + op.S * op.D;
    silhouette = own2 + op.S * op.N;
    centroid = reinterpret_cast<float*>(silhouette + op.S * op.N);
    count = reinterpret_cast<int*>(centroid + op.S * op.n_labels * op.D);
    group = count + op.S * op.n_labels;
  }
};

template <class T>
__device__ const T* row_of(const Separation& op, int64_t i_row) {
  return reinterpret_cast<const T*>(op.points) + i_row * op.D;
}

// One warp per point.
template <class T>
__global__ void __launch_bounds__(THREADS) group_kernel(Separation op, Scratch scratch) {
  const int64_t i_row = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + warp_id();
  if (i_row >= op.S * op.N) return;
  bool is_finite = true;
  for (int64_t d = lane_id(); d < op.D; d += 32) is_finite &= isfinite(widen(row_of<T>(op, i_row)[d])) != 0;
  const int64_t label = op.label[i_row % op.N];
  const bool counts = warp_all(is_finite) && 0 <= label && label < op.n_labels;
  if (lane_id() == 0) scratch.group[i_row] = counts ? static_cast<int>(label) : -1;
}

struct Members {
  int n_of_warp[THREADS / 32];
  int row[THREADS];
};

// Of the block's next THREADS points those of one group, in their order; returns how many.
__device__ int find_members(const int* group, int64_t first, int64_t N, int k, Members& members) {
  const int64_t i = first + threadIdx.x;
  const bool is_member = i < N && group[i] == k;
  const uint32_t of_warp = warp_ballot(is_member);
  if (lane_id() == 0) members.n_of_warp[warp_id()] = __popc(of_warp);
  __syncthreads();
  int n_before = __popc(of_warp & ((uint32_t{1} << lane_id()) - 1)), n = 0;
  for (int w = 0; w < THREADS / 32; ++w) {
    if (w < warp_id()) n_before += members.n_of_warp[w];
    n += members.n_of_warp[w];
  }
  if (is_member) members.row[n_before] = static_cast<int>(i);
  __syncthreads();
  return n;
}

// One block per set, group and THREADS columns, one thread per column: the group's points in their order.
template <class T>
__global__ void __launch_bounds__(THREADS) mean_kernel(Separation op, Scratch scratch) {
  Members& members = static_shared<Members>();
  const int64_t i_group = blockIdx.x, s = i_group / op.n_labels, d = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x;
  double sum = 0;
  int count = 0;
  for (int64_t first = 0; first < op.N; first += THREADS) {
    const int n = find_members(scratch.group + s * op.N, first, op.N, static_cast<int>(i_group % op.n_labels), members);
    count += n;
    if (d >= op.D) continue;
    for (int e = 0; e < n; ++e) sum += static_cast<double>(widen(row_of<T>(op, s * op.N + members.row[e])[d]));
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) scratch.count[i_group] = count;
  if (d >= op.D) return;
  const double mean = sum / static_cast<double>(count);  // NaN of a group without points
  scratch.mean[i_group * op.D + d] = mean;
  scratch.centroid[i_group * op.D + d] = static_cast<float>(mean);
}

// cpu/pair.h: lane l of half a warp keeps the sum over d = l, l + 16, ...; the same in all lanes of the half.
template <class T>
__device__ double dist2_of_half(const T* point, const float* centroid, int64_t D) {
  double sum = 0;
  for (int64_t d = lane_id() % LANES; d < D; d += LANES) {
    const double difference = static_cast<double>(widen(point[d])) - static_cast<double>(centroid[d]);
    sum += difference * difference;
  }
#pragma unroll
  for (int h = LANES / 2; h > 0; h /= 2) sum += warp_shuffle_xor(sum, h);
  return sum;
}

// Half a warp per point.
template <class T>
__global__ void __launch_bounds__(THREADS) silhouette_kernel(Separation op, Scratch scratch) {
  const int64_t asked = static_cast<int64_t>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const int64_t i_row = min(asked, op.S * op.N - 1), s = i_row / op.N;  // all halves stay for the shuffles
  const int own = scratch.group[i_row];
  double own2 = 0, other2 = INFINITY;
  for (int64_t k = 0; k < op.n_labels; ++k) {
    // Of groups without points as well: the halves of a warp may be in different sets, and meet in here.
    const double dist2 =
        dist2_of_half(row_of<T>(op, i_row), scratch.centroid + (s * op.n_labels + k) * op.D, op.D);
    if (scratch.count[s * op.n_labels + k] == 0) continue;
    if (k == own) own2 = dist2;
    else other2 = min(other2, dist2);
  }
  if (asked >= op.S * op.N || lane_id() % LANES != 0) return;
  const double a = sqrt(own2), b = sqrt(other2);
  const bool has_both = own >= 0 && other2 < INFINITY && (a > 0 || b > 0);
  scratch.own2[i_row] = own >= 0 ? own2 : 0;
  scratch.silhouette[i_row] = has_both ? (b - a) / max(a, b) : 0;
}

// One thread per set and column.
__global__ void __launch_bounds__(THREADS) between_kernel(Separation op, Scratch scratch) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= op.S * op.D) return;
  const int64_t s = at / op.D, d = at % op.D;
  const int* count = scratch.count + s * op.n_labels;
  const double* mean = scratch.mean + s * op.n_labels * op.D + d;
  double n = 0, of_all = 0, sum = 0;
  for (int64_t k = 0; k < op.n_labels; ++k) {
    if (count[k] == 0) continue;
    of_all += static_cast<double>(count[k]) * mean[k * op.D];
    n += static_cast<double>(count[k]);
  }
  of_all /= n;
  for (int64_t k = 0; k < op.n_labels; ++k) {
    const double x = mean[k * op.D] - of_all;
    if (count[k]) sum += static_cast<double>(count[k]) * x * x;
  }
  scratch.between[at] = sum;
}

struct Sums {
  double silhouette[THREADS], within[THREADS], between[THREADS];
  int n_finite[THREADS];
};

// One block per set.
__global__ void __launch_bounds__(THREADS) sum_kernel(Separation op, Scratch scratch) {
  Sums& sums = static_shared<Sums>();
  const int64_t s = blockIdx.x, N = op.N;
  const int thread = static_cast<int>(threadIdx.x);
  bool is_in_range = true;
  int n_finite = 0;
  for (int64_t i = thread; i < N; i += THREADS) {
    is_in_range &= 0 <= op.label[i] && op.label[i] < op.n_labels;
    n_finite += scratch.group[s * N + i] >= 0;
  }
  is_in_range = __syncthreads_and(is_in_range);
  double between = 0, silhouette = 0, within = 0;
  for (int64_t d = thread; d < op.D; d += THREADS) between += scratch.between[s * op.D + d];
  sums.between[thread] = between;
  sums.n_finite[thread] = n_finite;
  between = 0, n_finite = 0;
  // Chunks are added up by a thread each, and then by one thread in their order, THREADS chunks at a time.
  for (int64_t first = 0; first < N; first += int64_t{CHUNK} * THREADS) {
    const int64_t begin = min(first + int64_t{CHUNK} * thread, N), end = min(begin + CHUNK, N);
    double of_silhouette = 0, of_within = 0;
    for (int64_t i = begin; i < end; ++i) {
      of_silhouette += scratch.silhouette[s * N + i];
      of_within += scratch.own2[s * N + i];
    }
    sums.silhouette[thread] = of_silhouette;
    sums.within[thread] = of_within;
    __syncthreads();
    for (int t = 0; thread == 0 && t < THREADS; ++t) silhouette += sums.silhouette[t], within += sums.within[t];
    __syncthreads();
  }
  __syncthreads();
  if (thread != 0) return;
  for (int t = 0; t < THREADS; ++t) between += sums.between[t], n_finite += sums.n_finite[t];
  const double nothing = __longlong_as_double(0x7ff8000000000000);
  op.out[s] = is_in_range ? silhouette / static_cast<double>(n_finite) : nothing;
  op.out[op.S + s] = is_in_range ? between / within : nothing;
  op.out[2 * op.S + s] = is_in_range ? between + within : nothing;
}

unsigned blocks_for(int64_t n, int64_t per_block) { return static_cast<unsigned>((n + per_block - 1) / per_block); }

}  // namespace

size_t separation_cuda_scratch(const Separation& op) { return Scratch::bytes(op); }

void separation_cuda(const Separation& op, Element element, void* memory, CudaStream stream) {
  if (op.S == 0) return;
  const Scratch scratch(op, memory);
  with_element(element, [&](auto type) {
    using T = decltype(type);
    const int64_t n_groups = op.S * op.n_labels, n_rows = op.S * op.N;
    if (n_rows) launch(group_kernel<T>, blocks_for(n_rows, THREADS / 32), THREADS, 0, stream, op, scratch);
    if (n_groups) {
      const dim3 grid(static_cast<unsigned>(n_groups), op.D ? blocks_for(op.D, THREADS) : 1);
      launch(mean_kernel<T>, grid, THREADS, 0, stream, op, scratch);
    }
    if (n_rows) launch(silhouette_kernel<T>, blocks_for(n_rows, THREADS / LANES), THREADS, 0, stream, op, scratch);
  });
  if (op.D) launch(between_kernel, blocks_for(op.S * op.D, THREADS), THREADS, 0, stream, op, scratch);
  launch(sum_kernel, static_cast<unsigned>(op.S), THREADS, 0, stream, op, scratch);
}

}  // namespace clmfast
