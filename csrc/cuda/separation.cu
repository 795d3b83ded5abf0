// separation on the GPU; the contract is ../separation.h. Three steps: the groups' means, every point's own and nearest
// other centroid, and the sums. All but the scatter between groups is added up in the CPU's order.
//
// Screening and deciding, as on the CPU: float32 sums of squared differences tell which centroids can be the nearest
// other one, and only these and the own one are measured in float64. With u = 2^-24, a float32 sum of D terms is within a
// factor of (1 +- u)^(D + 2) of the exact one, but for underflow of at most 2^-149 per term.
#include "../separation.h"

#include <cfloat>
#include <cmath>

#include "element.cuh"
#include "launch.cuh"
#include "members.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int LANES = 16;   // that measure one distance: cpu/pair.h has 16 sums
constexpr int CHUNK = 256;  // points that are added up together first, as on the CPU

struct Scratch {
  double* mean;        // [S, K, D]
  double* own2;        // [S, N]: dist2 to the own centroid; 0 of points that do not count
  double* silhouette;  // [S, N]
  float* centroid;     // [S, K, D]: NaN of a group without points
  int* count;          // [S, K]

  static size_t bytes(const Separation& op) {
    return static_cast<size_t>(op.S) * (sizeof(double) * (op.n_labels * op.D + 2 * op.N) +
                                        sizeof(float) * (op.n_labels * op.D + op.n_labels));
  }
  Scratch(const Separation& op, void* memory) {
    mean = static_cast<double*>(memory);
    own2 = mean + op.S * op.n_labels * op.D;
    silhouette = own2 + op.S * op.N;
    centroid = reinterpret_cast<float*>(silhouette + op.S * op.N);
    count = reinterpret_cast<int*>(centroid + op.S * op.n_labels * op.D);
  }
};

template <class T>
__device__ const T* row_of(const Separation& op, int64_t i_row) {
  return reinterpret_cast<const T*>(op.points) + i_row * op.D;
}

// ---- the means

constexpr int UNDER_WAY = 16;  // loads of a thread. Not tuned yet

// The sums of one group, THREADS columns at a time and one thread per column: its points in their order, which are found
// anew for each. With is_checked, points that are not finite are left out; else returns whether all sums are finite.
template <class T>
__device__ bool find_mean(const Separation& op, const Scratch& scratch, bool is_checked) {
  using GroupMembers = Members<THREADS>;
  GroupMembers& members = static_shared<GroupMembers>();
  const int64_t i_group = blockIdx.x, s = i_group / op.n_labels, k = i_group % op.n_labels;
  const auto is_member = [&op, k](int64_t i) { return op.label[i] == k; };
  bool is_finite = true;
  for (int64_t first_column = 0; first_column == 0 || first_column < op.D; first_column += THREADS) {
    const int64_t d = first_column + threadIdx.x;
    double sum = 0;
    int count = 0;
    for (int64_t first = 0; first < op.N; first += GroupMembers::AT_ONCE) {
      const int n = members.find(first, op.N, is_member);
      for (int e = warp_id(); is_checked && e < n; e += WARPS) {
        const T* row = row_of<T>(op, s * op.N + first + members.item[e]);
        bool is_row_finite = true;
        for (int64_t at = lane_id(); at < op.D; at += 32) is_row_finite &= isfinite(widen(row[at])) != 0;
        if (!warp_all(is_row_finite) && lane_id() == 0) members.item[e] = -1;
      }
      if (is_checked) __syncthreads();
      const T* column = row_of<T>(op, s * op.N + first) + (d < op.D ? d : 0);
      for (int begin = 0; begin < n; begin += UNDER_WAY) {
        float x[UNDER_WAY];
#pragma unroll
        for (int e = 0; e < UNDER_WAY; ++e) {
          const int row = begin + e < n ? members.item[begin + e] : -1;
          count += row >= 0;
          x[e] = row >= 0 && d < op.D ? widen(column[row * op.D]) : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < UNDER_WAY; ++e) sum += static_cast<double>(x[e]);  // adding 0 changes no sum
      }
    }
    if (d == 0) scratch.count[i_group] = count;
    is_finite &= isfinite(sum) != 0;
    if (d >= op.D) continue;
    const double mean = sum / static_cast<double>(count);  // NaN of a group without points
    scratch.mean[i_group * op.D + d] = mean;
    scratch.centroid[i_group * op.D + d] = static_cast<float>(mean);
  }
  return is_finite;
}

// One block per set and group.
template <class T>
__global__ void __launch_bounds__(THREADS) mean_kernel(Separation op, Scratch scratch) {
  // A point that is not finite makes its group's sum so: then all are looked at.
  bool is_checked = false;
  while (!__syncthreads_and(find_mean<T>(op, scratch, is_checked))) is_checked = true;
}

// ---- the distances

// cpu/pair.h: lane l of half a warp keeps the sum over d = l, l + 16, ...; the same in all lanes of the half.
template <class T>
__device__ double dist2_of_half(const T* point, const float* centroid, int64_t D) {
  double sum = 0;
#pragma unroll 8  // loads under way
  for (int64_t d = lane_id() % LANES; d < D; d += LANES) {
    const double difference = static_cast<double>(widen(point[d])) - static_cast<double>(centroid[d]);
    sum += difference * difference;
  }
#pragma unroll
  for (int h = LANES / 2; h > 0; h /= 2) sum += warp_shuffle_xor(sum, h);
  return sum;
}

constexpr int POINTS = 8;  // of a warp, which share what it reads of the centroids
constexpr int TILE = WARPS * POINTS;
constexpr int PANEL = 64;  // columns in shared memory at once

struct Panel {
  alignas(16) float centroid[PANEL / 4][32 + 1][4];  // four columns of 32; one more, so that a row lies in all banks
  alignas(16) float point[TILE][PANEL];
};

// Columns first..first + PANEL - 1 of the block's points and of 32 centroids; zeros where there is none.
template <class T>
__device__ void load_panel(const Separation& op, const float* centroid, int64_t s, int64_t first_point,
                           int64_t first_group, int64_t first, Panel& panel) {
  const int column = static_cast<int>(threadIdx.x) % PANEL, begin = static_cast<int>(threadIdx.x) / PANEL;
  constexpr int STEP = THREADS / PANEL;
  const int64_t d = first + column;
#pragma unroll
  for (int i = begin; i < TILE; i += STEP) {
    const bool has_it = d < op.D && first_point + i < op.N;
    panel.point[i][column] = has_it ? widen(row_of<T>(op, s * op.N + first_point + i)[d]) : 0.0f;
  }
#pragma unroll
  for (int k = begin; k < 32; k += STEP) {
    const bool has_it = d < op.D && first_group + k < op.n_labels;
    panel.centroid[column / 4][k][column % 4] = has_it ? centroid[(first_group + k) * op.D + d] : 0.0f;
  }
}

// screen[p] += the panel's part of the squared distance of point p of the warp to the centroid of the lane.
__device__ void add_panel(const Panel& panel, int n_columns, float (&screen)[POINTS]) {
#pragma unroll 2
  for (int d = 0; d < n_columns; d += 4) {
    const float4 c = *reinterpret_cast<const float4*>(panel.centroid[d / 4][lane_id()]);
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
      const float4 x = *reinterpret_cast<const float4*>(&panel.point[warp_id() * POINTS + p][d]);
      screen[p] = fmaf(x.x - c.x, x.x - c.x, screen[p]);
      screen[p] = fmaf(x.y - c.y, x.y - c.y, screen[p]);
      screen[p] = fmaf(x.z - c.z, x.z - c.z, screen[p]);
      screen[p] = fmaf(x.w - c.w, x.w - c.w, screen[p]);
    }
  }
}

// One warp per POINTS points: a lane screens one of 32 centroids, and lane p keeps what is known of point p.
template <class T>
__global__ void __launch_bounds__(THREADS) silhouette_kernel(Separation op, Scratch scratch, int64_t n_tiles) {
  Panel& panel = static_shared<Panel>();
  const int64_t s = blockIdx.x / n_tiles, first_tile = blockIdx.x % n_tiles * TILE;
  const int64_t first_point = first_tile + warp_id() * POINTS, i = first_point + lane_id();
  const bool is_mine = lane_id() < POINTS && i < op.N;
  const float* centroid = scratch.centroid + s * op.n_labels * op.D;
  const int64_t own = is_mine ? op.label[i] : -1;
  double own2 = INFINITY, other2 = INFINITY;
  float limit = INFINITY;  // the nearest other centroid is no further
  // Twice the bound of above, for what rounding adds here.
  const float factor = (static_cast<float>(op.D) + 16) * 0x1p-23f, slack = static_cast<float>(op.D) * FLT_MIN;
  for (int64_t first_group = 0; first_group < op.n_labels; first_group += 32) {
    float screen[POINTS] = {};
    for (int64_t first = 0; first < op.D; first += PANEL) {
      __syncthreads();
      load_panel<T>(op, centroid, s, first_tile, first_group, first, panel);
      __syncthreads();
      add_panel(panel, static_cast<int>(min(int64_t{PANEL}, op.D - first)), screen);
    }
    const int64_t k = first_group + lane_id();
    uint32_t asked = 0;  // the centroids that point p must be measured with
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
      const bool is_own = k == warp_shuffle(own, p);
      const bool is_other = k < op.n_labels && !is_own && !isnan(screen[p]);
      const float high = screen[p] * (1 + factor) + slack, low = min(screen[p], FLT_MAX) * (1 - factor) - slack;
      const float nearest = min(warp_shuffle(limit, p), warp_min(is_other ? high : INFINITY));
      const uint32_t of_point = warp_ballot((is_own && k < op.n_labels) || (is_other && low <= nearest));
      if (lane_id() == p) limit = nearest, asked = of_point;
    }
    for (int p = 0; p < POINTS && first_point + p < op.N; ++p) {
      const T* point = row_of<T>(op, s * op.N + first_point + p);
      for (uint32_t left = warp_shuffle(asked, p); left; left &= left - 1) {
        const int a = __ffs(static_cast<int>(left)) - 1;
        if (left & (left - 1)) left &= left - 1;
        const int b = __ffs(static_cast<int>(left)) - 1;  // half a warp each; a again where there is one alone
        const double dist2 =
            dist2_of_half(point, centroid + (first_group + (lane_id() < LANES ? a : b)) * op.D, op.D);
        for (int half = 0; half < 2; ++half) {
          const double of_half = warp_shuffle(dist2, half * LANES);
          if (lane_id() != p) continue;
          if (first_group + (half ? b : a) == own) own2 = of_half;
          else other2 = min(other2, of_half);
        }
      }
    }
  }
  if (!is_mine) return;
  const bool counts = own2 < INFINITY;  // a label in range, and finite: the distance to a centroid that is, is not else
  const double a = sqrt(own2), b = sqrt(other2);
  const bool has_both = counts && other2 < INFINITY && (a > 0 || b > 0);
  scratch.own2[s * op.N + i] = counts ? own2 : 0;
  scratch.silhouette[s * op.N + i] = has_both ? (b - a) / max(a, b) : 0;
}

// ---- the sums

constexpr int SUM_THREADS = 256;
constexpr int CHUNKS = 8;  // in shared memory at once

struct Sums {
  double silhouette[CHUNKS][CHUNK + 1], within[CHUNKS][CHUNK + 1];  // one more: chunks begin in different banks
  double of_chunk[2][CHUNKS];
  double between[SUM_THREADS / 32];
};

// The part of this thread, in columns thread, thread + SUM_THREADS, ..., of the scatter between groups.
__device__ double between_of_thread(const Separation& op, const int* count, const double* mean, double n_finite) {
  double sum = 0;
  for (int64_t d = threadIdx.x; d < op.D; d += SUM_THREADS) {
    double of_all = 0;
#pragma unroll 8
    for (int64_t k = 0; k < op.n_labels; ++k)
      if (count[k]) of_all += static_cast<double>(count[k]) * mean[k * op.D + d];
    of_all /= n_finite;
#pragma unroll 8
    for (int64_t k = 0; k < op.n_labels; ++k) {
      const double x = mean[k * op.D + d] - of_all;
      if (count[k]) sum += static_cast<double>(count[k]) * x * x;
    }
  }
  return sum;
}

// One block per set.
__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(Separation op, Scratch scratch) {
  Sums& sums = static_shared<Sums>();
  const int64_t s = blockIdx.x, N = op.N;
  const int thread = static_cast<int>(threadIdx.x);
  const int* count = scratch.count + s * op.n_labels;
  bool is_in_range = true;
  for (int64_t i = thread; i < N; i += SUM_THREADS) is_in_range &= 0 <= op.label[i] && op.label[i] < op.n_labels;
  is_in_range = __syncthreads_and(is_in_range);
  int64_t n_finite = 0;
  for (int64_t k = 0; k < op.n_labels; ++k) n_finite += count[k];
  const double of_warp = warp_sum(
      between_of_thread(op, count, scratch.mean + s * op.n_labels * op.D, static_cast<double>(n_finite)));
  if (lane_id() == 0) sums.between[warp_id()] = of_warp;
  // Chunks are added up by a thread for each of the two sums, and then by one thread in their order.
  double silhouette = 0, within = 0;
  for (int64_t first = 0; first < N; first += CHUNKS * CHUNK) {
#pragma unroll
    for (int e = thread; e < CHUNKS * CHUNK; e += SUM_THREADS) {
      const bool has_it = first + e < N;
      sums.silhouette[e / CHUNK][e % CHUNK] = has_it ? scratch.silhouette[s * N + first + e] : 0;
      sums.within[e / CHUNK][e % CHUNK] = has_it ? scratch.own2[s * N + first + e] : 0;
    }
    __syncthreads();
    if (thread < 2 * CHUNKS) {
      const double* part = thread < CHUNKS ? sums.silhouette[thread] : sums.within[thread - CHUNKS];
      double sum = 0;
#pragma unroll 16
      for (int e = 0; e < CHUNK; ++e) sum += part[e];
      sums.of_chunk[thread / CHUNKS][thread % CHUNKS] = sum;
    }
    __syncthreads();
    for (int c = 0; thread == 0 && c < CHUNKS; ++c) silhouette += sums.of_chunk[0][c], within += sums.of_chunk[1][c];
  }
  __syncthreads();
  if (thread != 0) return;
  double between = 0;
  for (double part : sums.between) between += part;
  const double nothing = __longlong_as_double(0x7ff8000000000000);
  op.out[s] = is_in_range ? silhouette / static_cast<double>(n_finite) : nothing;
  op.out[op.S + s] = is_in_range ? between / within : nothing;
  op.out[2 * op.S + s] = is_in_range ? between + within : nothing;
}

}  // namespace

size_t separation_cuda_scratch(const Separation& op) { return Scratch::bytes(op); }

void separation_cuda(const Separation& op, Element element, void* memory, CudaStream stream) {
  if (op.S == 0) return;
  const Scratch scratch(op, memory);
  with_element(element, [&](auto type) {
    using T = decltype(type);
    const int64_t n_groups = op.S * op.n_labels, n_tiles = (op.N + TILE - 1) / TILE;
    if (n_groups) launch(mean_kernel<T>, static_cast<unsigned>(n_groups), THREADS, 0, stream, op, scratch);
    if (op.N) launch(silhouette_kernel<T>, static_cast<unsigned>(op.S * n_tiles), THREADS, 0, stream, op, scratch, n_tiles);
  });
  launch(sum_kernel, static_cast<unsigned>(op.S), SUM_THREADS, 0, stream, op, scratch);
}

}  // namespace clmfast
