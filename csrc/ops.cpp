// The torch side of every op: schema, checks, outputs. The arithmetic lives behind the contract headers and knows no
// torch.
// Written against torch's stable ABI, so that one build serves every torch from 2.11 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "block.h"
#include "capture.h"
#include "cpu/isa.h"
#include "guard.h"
#include "kmeans.h"
#include "kmeans_search.h"
#include "knn.h"
#include "partition.h"
#include "separation.h"
#include "stream.h"
#include "votes.h"

namespace clmfast {
namespace {

// ---- what the checks are made of

bool is_point_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

void require_points(const char* op, const char* name, const Tensor& points) {
  require(points.dim() == 3, op, ": ", name, " must be [S, N, D], got ", shape(points));
  require(is_point_type(points.scalar_type()), op, ": ", name, " must be float32, bfloat16 or float16, got ",
          dtype(points));
  require(points.size(1) < int64_t{1} << 31, op, ": N must be below 2^31, got N=", points.size(1));
  require(points.size(2) < int64_t{1} << 20, op, ": D must be below 2^20, got D=", points.size(2));
}

void require_int64(const char* op, const char* name, const Tensor& x, const Tensor& beside) {
  require(x.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64, got ", dtype(x));
  require_there(op, name, x, beside);
}

void require_float(const char* op, const char* name, const Tensor& x, const Tensor& beside) {
  require(x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ", dtype(x));
  require_there(op, name, x, beside);
}

// Whether the launchers of csrc/cuda are built in. Without them no op is registered for a GPU.
#ifdef CLMFAST_CUDA
constexpr bool HAS_CUDA = true;
#else
constexpr bool HAS_CUDA = false;
#endif

bool is_on_gpu(const Tensor& x) { return HAS_CUDA && x.is_cuda(); }

void copy_strides(const Tensor& x, int64_t* strides) {
  for (int64_t i = 0; i < x.dim(); ++i) strides[i] = x.stride(i);
}

// ---- what the CUDA launchers are given

Element element_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float      ? Element::float32
         : x.scalar_type() == ScalarType::BFloat16 ? Element::bfloat16
                                                   : Element::float16;
}

// Points as the device at hand reads them: a GPU takes every element type as it is.
Tensor dense_points_of(const char* op, const Tensor& x) {
  return is_on_gpu(x) ? dense(op, x) : dense(op, x, ScalarType::Float);
}

// torch's current stream of a device. The function lies in torch's CUDA library, which a torch for the CPU lacks, and
// which is already loaded, but not where this library's symbols are looked for.
CudaStream current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (void* torch_cuda = found ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
      found = dlsym(torch_cuda, name);
    return reinterpret_cast<Get>(found);
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0) throw std::runtime_error("clmfast: torch tells no current CUDA stream");
  return static_cast<CudaStream>(stream);
}

// Calls run(stream) with x's device as the current one.
template <class Run>
void on_gpu_of(const Tensor& x, const Run& run) {
  if constexpr (HAS_CUDA) {
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    use_device(device);
    run(current_stream(device));
  }
}

Tensor scratch(const char* op, const Tensor& like, size_t n_bytes) {
  return empty(op, like, {static_cast<int64_t>(n_bytes)}, ScalarType::Byte);
}

// ---- knn

std::tuple<Tensor, Tensor> knn(const Tensor& points, int64_t k, const MaybeTensor& queries,
                               std::vector<Tensor> query_groups, std::vector<Tensor> point_groups,
                               const MaybeTensor& within) {
  const char* name = "knn";
  require_points(name, "points", points);
  require_there(name, "points", points, points);
  const int64_t S = points.size(0), N = points.size(1), D = points.size(2);
  if (queries) {
    require_points(name, "queries", *queries);
    require(queries->size(0) == S && queries->size(2) == D,
            "knn: queries must be [S, Q, D] with the S and D of points ", shape(points), ", got ", shape(*queries));
    require(queries->scalar_type() == points.scalar_type(), "knn: queries must have the dtype of points, ",
            dtype(points), ", got ", dtype(*queries));
    require_there(name, "queries", *queries, points);
    require(k >= 1, "knn: k must be at least 1, got k=", k);
  } else {
    require(1 <= k && k < N, "knn: k must be in [1, N), got k=", k, " with N=", N);
  }
  const int64_t Q = queries ? queries->size(1) : N;
  Knn op = {};
  op.n_views = std::max(static_cast<int>(query_groups.size()), 1);
  require(query_groups.size() == point_groups.size(), "knn: barred must give the groups of both queries and points");
  require(query_groups.size() <= (queries ? MOST_VIEWS : 1), "knn: barred must be at most ", queries ? MOST_VIEWS : 1,
          queries ? " pairs of groups, got " : " pair of groups where points ask, got ", query_groups.size());
  op.view[0] = {nullptr, nullptr, Q};
  op.A = query_groups.empty() ? Q : 0;
  for (size_t v = 0; v < query_groups.size(); ++v) {
    Tensor &query_group = query_groups[v], &point_group = point_groups[v];
    require_int64(name, "query_group", query_group, points);
    require_int64(name, "point_group", point_group, points);
    const bool is_part = query_groups.size() > 1 && query_group.dim() == 1 && query_group.size(0) <= Q;
    require((is_part || has_shape(query_group, {Q})) && has_shape(point_group, {N}),
            "knn: barred must be [Q] and [N] with Q=", Q, " and N=", N, ", got ", shape(query_group), " and ",
            shape(point_group));
    query_group = dense(name, query_group), point_group = dense(name, point_group);
    op.view[v] = {data<int64_t>(query_group), data<int64_t>(point_group), query_group.size(0)};
    op.A += op.view[v].Q;
  }
  if (within) {
    require_float(name, "within", *within, points);
    require(has_shape(*within, {S, Q}), "knn: within must be [S, Q] with S=", S, " and Q=", Q, ", got ",
            shape(*within));
  }
  Tensor dist2 = empty(name, points, {S, op.A, k}, ScalarType::Float);
  Tensor index = empty(name, points, {S, op.A, k}, ScalarType::Long);
  if (dist2.numel() == 0) return {dist2, index};
  const Tensor dense_points = dense_points_of(name, points);
  const MaybeTensor dense_queries = queries ? MaybeTensor(dense_points_of(name, *queries)) : std::nullopt;
  const MaybeTensor dense_within = dense(name, within);
  op.points = data<float>(dense_points);
  op.queries = queries ? data<float>(*dense_queries) : nullptr;
  op.is_self = !queries;
  op.within = within ? data<float>(*dense_within) : nullptr;
  op.S = S, op.N = N, op.Q = Q, op.D = D, op.k = k;
  op.dist2 = mutable_data<float>(dist2);
  op.index = mutable_data<int64_t>(index);
  if (is_on_gpu(points))
    on_gpu_of(points, [&](CudaStream stream) {
      Tensor memory = scratch(name, points, knn_cuda_scratch(op));
      knn_cuda(op, element_of(points), memory.mutable_data_ptr(), stream);
    });
  else
    knn_cpu(op, parallel_for);
  return {dist2, index};
}

// ---- kmeans

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans(const Tensor& points, int64_t n_clusters, const MaybeTensor& init,
                                                  bool is_random, int64_t n_init, int64_t max_iter, double tol,
                                                  int64_t seed) {
  const char* name = "kmeans";
  require_points(name, "points", points);
  require_there(name, "points", points, points);
  const int64_t S = points.size(0), N = points.size(1), D = points.size(2), K = n_clusters;
  require(1 <= K && K <= N, "kmeans: n_clusters must be in [1, N], got n_clusters=", K, " with N=", N);
  require(n_init >= 1, "kmeans: n_init must be at least 1, got n_init=", n_init);
  require(n_init < int64_t{1} << 31, "kmeans: n_init must be below 2^31, got n_init=", n_init);
  require(max_iter >= 1, "kmeans: max_iter must be at least 1, got max_iter=", max_iter);
  // A GPU is told of all iterations beforehand.
  require(max_iter <= int64_t{1} << 20, "kmeans: max_iter must be at most 2^20, got max_iter=", max_iter);
  require(tol >= 0, "kmeans: tol must not be negative, got tol=", tol);
  if (init) {
    require(has_shape(*init, {S, K, D}), "kmeans: init must be [S, K, D] = [", S, ", ", K, ", ", D, "], got ",
            shape(*init));
    require(is_point_type(init->scalar_type()), "kmeans: init must be float32, bfloat16 or float16, got ",
            dtype(*init));
    require_there(name, "init", *init, points);
    require(n_init == 1, "kmeans: n_init must be 1 when init is a tensor, got n_init=", n_init);
  }
  // Of every restart of every set: a label, bounds and a distance of each point, and the clusters' centroids and sums.
  const double of_restart = static_cast<double>(N) * (GROUPS + 8) * 4 + static_cast<double>(K) * D * 20;
  require_memory(name, [&] { return "restarts, n_init=" + std::to_string(n_init); },
                 static_cast<double>(S) * static_cast<double>(n_init) * of_restart, points.is_cpu());
  Tensor label = empty(name, points, {S, N}, ScalarType::Long);
  Tensor centroid = empty(name, points, {S, K, D}, ScalarType::Float);
  Tensor inertia = empty(name, points, {S}, ScalarType::Double), n_iter = empty(name, points, {S}, ScalarType::Long);
  const Tensor dense_points = dense_points_of(name, points);
  const MaybeTensor dense_init = init ? MaybeTensor(dense(name, *init, ScalarType::Float)) : std::nullopt;
  Kmeans op;
  op.points = data<float>(dense_points);
  op.init = init ? data<float>(*dense_init) : nullptr;
  op.S = S, op.N = N, op.D = D, op.K = K;
  op.start = is_random ? KmeansStart::random : KmeansStart::plus_plus;
  op.n_init = n_init, op.max_iter = max_iter, op.tol = tol, op.seed = seed;
  op.label = mutable_data<int64_t>(label);
  op.centroid = mutable_data<float>(centroid);
  op.inertia = mutable_data<double>(inertia);
  op.n_iter = mutable_data<int64_t>(n_iter);
  if (is_on_gpu(points)) {
    on_gpu_of(points, [&](CudaStream stream) {
      Tensor memory = scratch(name, points, kmeans_cuda_scratch(op));
      kmeans_cuda(op, element_of(points), memory.mutable_data_ptr(), stream);
    });
  } else {
    kmeans_cpu(op, parallel_for);
  }
  return {label, centroid, inertia, n_iter};
}

// ---- kmeans_search

// Sets that are worked on at the same time, at most.
double n_at_once(int64_t S) {
  return static_cast<double>(std::min<int64_t>(S, std::max(1u, std::thread::hardware_concurrency())));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kmeans_search(const Tensor& points, int64_t n_clusters,
                                                         const MaybeTensor& known, const Tensor& n_cold, int64_t keep,
                                                         int64_t moves, int64_t renewals, int64_t max_iter,
                                                         int64_t seed, const MaybeTensor& directions,
                                                         const MaybeTensor& projected) {
  const char* name = "kmeans_search";
  require_points(name, "points", points);
  require_there(name, "points", points, points);
  const int64_t S = points.size(0), N = points.size(1), D = points.size(2), K = n_clusters;
  require(1 <= K && K <= N, "kmeans_search: n_clusters must be in [1, N], got n_clusters=", K, " with N=", N);
  require(0 <= max_iter && max_iter <= int64_t{1} << 20, "kmeans_search: max_iter must be from 0 to 2^20, got max_iter=",
          max_iter);
  require(0 <= moves && moves <= int64_t{1} << 20, "kmeans_search: moves must be from 0 to 2^20, got moves=", moves);
  require(0 <= renewals && renewals <= int64_t{1} << 20, "kmeans_search: renewals must be from 0 to 2^20, got renewals=",
          renewals);
  const int64_t P = known && known->dim() == 3 ? known->size(0) : 0;
  if (known) {
    require_int64(name, "known", *known, points);
    require(has_shape(*known, {P, S, N}), "kmeans_search: known must be [P, S, N] with S=", S, " and N=", N, ", got ",
            shape(*known));
  }
  require_int64(name, "n_cold", n_cold, points);
  require(has_shape(n_cold, {S}), "kmeans_search: n_cold must be [S] with S=", S, ", got ", shape(n_cold));
  require(1 <= keep && P <= keep && keep < int64_t{1} << 20,
          "kmeans_search: keep must be from 1 to 2^20 and at least P, got keep=", keep, " with P=", P);
  const Tensor dense_cold = dense(name, n_cold);
  int64_t most_cold = 0;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t n = data<int64_t>(dense_cold)[s];
    require(0 <= n && n < int64_t{1} << 20 && P + n > 0,
            "kmeans_search: every set needs a partition to begin with, known or cold, got n_cold=", n, " with P=", P);
    most_cold = std::max(most_cold, n);
  }
  // A set's partitions are all kept until the end: a label and a distance of each point, sums of each cluster.
  const double of_partition = static_cast<double>(N) * 8 + static_cast<double>(K) * (static_cast<double>(D) * 4 + 8);
  require_memory(name, [&] { return "partitions, n_cold=" + std::to_string(most_cold); },
                 static_cast<double>(P + most_cold) * of_partition * n_at_once(S), true);
  require(directions.has_value() == projected.has_value(),
          "kmeans_search: directions and projected must be given together or not at all");
  if (directions) {
    const int64_t M = n_directions(N, D, K);
    require(M > 0, "kmeans_search: a projection cannot be kept of points that are not projected, got N=", N, ", D=", D,
            " and n_clusters=", K);
    for (auto [of, tensor] : {std::pair{"directions", &*directions}, std::pair{"projected", &*projected}}) {
      require(tensor->scalar_type() == ScalarType::Float, name, ": ", of, " must be float32, got ", dtype(*tensor));
      require_there(name, of, *tensor, points);
    }
    require(has_shape(*directions, {S, 1 + M, D}), name, ": directions must be [S, 1 + M, D] with S=", S, ", M=", M,
            " and D=", D, ", got ", shape(*directions));
    require(has_shape(*projected, {S, N, M}), name, ": projected must be [S, N, M] with S=", S, ", N=", N, " and M=", M,
            ", got ", shape(*projected));
    std::vector<Named> read{{"points", &points}, {"n_cold", &n_cold}};
    if (known) read.emplace_back("known", &*known);
    require_apart(name, {{"directions", &*directions}, {"projected", &*projected}}, read);
  }
  Tensor label = empty(name, points, {keep, S, N}, ScalarType::Long);
  Tensor inertia = empty(name, points, {keep, S}, ScalarType::Double);
  Tensor centroid = empty(name, points, {S, K, D}, ScalarType::Float), n_iter = empty(name, points, {S}, ScalarType::Long);
  Tensor origin = empty(name, points, {S}, ScalarType::Long);
  const Tensor dense_points = dense(name, points, ScalarType::Float);
  const MaybeTensor dense_known = known ? MaybeTensor(dense(name, *known)) : std::nullopt;
  KmeansSearch op;
  op.points = data<float>(dense_points);
  op.known = known ? data<int64_t>(*dense_known) : nullptr;
  op.n_cold = data<int64_t>(dense_cold);
  const MaybeTensor dense_directions = dense(name, directions), dense_projected = dense(name, projected);
  if (directions)
    op.directions = mutable_data<float>(*dense_directions), op.projected = mutable_data<float>(*dense_projected);
  op.S = S, op.N = N, op.D = D, op.K = K, op.P = P;
  op.keep = keep, op.moves = moves, op.renewals = renewals, op.max_iter = max_iter, op.seed = seed;
  op.label = mutable_data<int64_t>(label);
  op.inertia = mutable_data<double>(inertia);
  op.centroid = mutable_data<float>(centroid);
  op.n_iter = mutable_data<int64_t>(n_iter);
  op.origin = mutable_data<int64_t>(origin);
  kmeans_search_cpu(op, parallel_for);
  for (const auto& [to, from] : {std::pair{directions, dense_directions}, std::pair{projected, dense_projected}}) {
    if (!to || to->is_contiguous()) continue;
    Tensor written = *to;
    torch::stable::copy_(written, *from);
  }
  return {label, inertia, centroid, n_iter, origin};
}

// ---- separation

Tensor separation(const Tensor& points, const Tensor& label, int64_t n_labels) {
  const char* name = "separation";
  require_points(name, "points", points);
  require_there(name, "points", points, points);
  require_int64(name, "label", label, points);
  const int64_t S = points.size(0), N = points.size(1);
  require(has_shape(label, {N}), name, ": label must be [N] with N=", N, ", got ", shape(label));
  require(0 <= n_labels && n_labels < int64_t{1} << 31, name, ": n_labels must be in [0, 2^31), got n_labels=",
          n_labels);
  // Every label of every set has its centroid, and a sum to find it from.
  require_memory(name, [&] { return "centroids, n_labels=" + std::to_string(n_labels); },
                 static_cast<double>(S) * n_labels * (8 + static_cast<double>(points.size(2)) * 16), points.is_cpu());
  Tensor out = empty(name, points, {3, S}, ScalarType::Double);
  if (S == 0) return out;
  const Tensor dense_points = dense_points_of(name, points), dense_label = dense(name, label);
  Separation op;
  op.points = data<float>(dense_points);
  op.label = data<int64_t>(dense_label);
  op.S = S, op.N = N, op.D = points.size(2), op.n_labels = n_labels;
  op.out = mutable_data<double>(out);
  if (is_on_gpu(points)) {
    on_gpu_of(points, [&](CudaStream stream) {
      Tensor memory = scratch(name, points, separation_cuda_scratch(op));
      separation_cuda(op, element_of(points), memory.mutable_data_ptr(), stream);
    });
    return out;
  }
  require(separation_cpu(op, parallel_for), name, ": label must be in [0, n_labels), with n_labels=", n_labels);
  return out;
}

// ---- votes

void require_neighbours(const char* op, const Tensor& index, const Tensor& label) {
  require_int64(op, "index", index, index);
  require_int64(op, "label", label, index);
  require(index.dim() == 3 && label.dim() == 1, op, ": index must be [S, Q, k] and label [N], got ", shape(index),
          " and ", shape(label));
}

// Of dense tensors.
Neighbours neighbours(const Tensor& index, const Tensor& label) {
  return {data<int64_t>(index), data<int64_t>(label), index.size(0), index.size(1), index.size(2), label.size(0)};
}

Tensor majority_vote(const Tensor& index, const Tensor& label) {
  const char* name = "majority_vote";
  require_neighbours(name, index, label);
  Tensor voted = empty(name, index, {index.size(0), index.size(1)}, ScalarType::Long);
  if (voted.numel() == 0) return voted;
  const Tensor dense_index = dense(name, index), dense_label = dense(name, label);
  const Neighbours near = neighbours(dense_index, dense_label);
  if (is_on_gpu(index)) {
    on_gpu_of(index, [&](CudaStream stream) { majority_vote_cuda(near, mutable_data<int64_t>(voted), stream); });
    return voted;
  }
  require(majority_vote_cpu(near, mutable_data<int64_t>(voted), parallel_for), name,
          ": index must be in [-1, N), with N=", near.N);
  return voted;
}

Tensor label_shares(const Tensor& index, const Tensor& label, const Tensor& truth, int64_t n_labels) {
  const char* name = "label_shares";
  require_neighbours(name, index, label);
  require_int64(name, "truth", truth, index);
  require(has_shape(truth, {index.size(1)}), name, ": truth must be [Q] with Q=", index.size(1), ", got ",
          shape(truth));
  require(n_labels >= 0, name, ": n_labels must not be negative, got n_labels=", n_labels);
  // A GPU numbers what it computes in 31 bits.
  require(index.is_cpu() || n_labels <= INT32_MAX / std::max<int64_t>(index.size(0), 1), name,
          ": on a GPU S n_labels must be below 2^31, got n_labels=", n_labels, " and S=", index.size(0));
  Tensor out = empty(name, index, {2, index.size(0), n_labels}, ScalarType::Double);
  if (index.size(0) == 0) return out;
  const Tensor dense_index = dense(name, index), dense_label = dense(name, label), dense_truth = dense(name, truth);
  const Neighbours near = neighbours(dense_index, dense_label);
  if (is_on_gpu(index)) {
    on_gpu_of(index, [&](CudaStream stream) {
      label_shares_cuda(near, data<int64_t>(dense_truth), n_labels, mutable_data<double>(out), stream);
    });
    return out;
  }
  require(label_shares_cpu(near, data<int64_t>(dense_truth), n_labels, mutable_data<double>(out), parallel_for), name,
          ": index must be in [-1, N) and truth in [0, n_labels), with N=", near.N, " and n_labels=", n_labels);
  return out;
}

// ---- partition_scores

Tensor partition_scores(const Tensor& truth, const Tensor& label, std::optional<int64_t> n_truth,
                        std::optional<int64_t> n_label) {
  const char* name = "partition_scores";
  require_int64(name, "truth", truth, truth);
  require_int64(name, "label", label, truth);
  for (const Tensor& x : {truth, label})
    require(x.dim() == 1 || x.dim() == 2, name, ": truth and label must be [N] or [S, N], got ", shape(truth), " and ",
            shape(label));
  const int64_t S = truth.dim() == 2   ? truth.size(0)
                    : label.dim() == 2 ? label.size(0)
                                       : 1,
                N = truth.size(truth.dim() - 1);
  require(label.size(label.dim() - 1) == N && (label.dim() == 1 || label.size(0) == S), name,
          ": truth and label must agree in N, and in S where both have it, got ", shape(truth), " and ", shape(label));
  require(N < int64_t{1} << 31, name, ": N must be below 2^31, got N=", N);
  require(n_truth.has_value() == n_label.has_value(), name, ": give both n_truth and n_label, or neither");
  if (n_truth) {
    require(*n_truth >= 1 && *n_label >= 1 && *n_truth <= (int64_t{1} << 28) / *n_label, name,
            ": n_truth and n_label must be at least 1 and their product at most 2^28, got ", *n_truth, " and ",
            *n_label);
  }
  if (n_truth && truth.is_cpu())
    require_memory(name, [] { return "tables of n_truth x n_label"; }, 8.0 * *n_truth * *n_label * n_at_once(S), true);
  Tensor scores = empty(name, truth, {6, S}, ScalarType::Double);
  if (S == 0) return scores;
  const Tensor dense_truth = dense(name, truth), dense_label = dense(name, label);
  PartitionScores op;
  op.truth = data<int64_t>(dense_truth);
  op.label = data<int64_t>(dense_label);
  op.truth_stride = truth.dim() == 2 ? N : 0;
  op.label_stride = label.dim() == 2 ? N : 0;
  op.S = S, op.N = N;
  op.n_truth = n_truth.value_or(-1);
  op.n_label = n_label.value_or(-1);
  op.scores = mutable_data<double>(scores);
  if (is_on_gpu(truth)) {
    on_gpu_of(truth, [&](CudaStream stream) {
      Tensor memory = scratch(name, truth, partition_scores_cuda_scratch(op));
      partition_scores_cuda(op, memory.mutable_data_ptr(), stream);
    });
    return scores;
  }
  require(partition_scores_cpu(op, parallel_for), name,
          ": truth must be in [0, n_truth) and label in [0, n_label), with n_truth=", op.n_truth,
          " and n_label=", op.n_label);
  return scores;
}

Tensor adjusted_rand(const Tensor& truth, const Tensor& label, int64_t n_truth, int64_t n_label) {
  const char* name = "adjusted_rand";
  require_int64(name, "truth", truth, truth);
  require_int64(name, "label", label, truth);
  require(truth.dim() == 2 && label.dim() == 2 && truth.size(1) == label.size(1), name,
          ": truth must be [V, N] and label [S, N], got ", shape(truth), " and ", shape(label));
  require(0 <= n_truth && n_truth < 1 << 28 && 0 <= n_label && n_label < 1 << 28, name,
          ": n_truth and n_label must be in [0, 2^28), got ", n_truth, " and ", n_label);
  require(truth.size(1) < int64_t{1} << 31, name, ": N must be below 2^31, got N=", truth.size(1));
  if (truth.is_cpu())
    require_memory(name, [] { return "counts of n_truth and n_label"; },
                   24.0 * n_truth * n_at_once(truth.size(0)) + 16.0 * n_label * n_at_once(label.size(0)), true);
  Tensor score = empty(name, truth, {truth.size(0), label.size(0)}, ScalarType::Double);
  const Tensor dense_truth = dense(name, truth), dense_label = dense(name, label);
  const AdjustedRand op{data<int64_t>(dense_truth), data<int64_t>(dense_label), truth.size(0), label.size(0),
                        truth.size(1),              n_truth,                    n_label,       mutable_data<double>(score)};
  if (is_on_gpu(truth)) {
    on_gpu_of(truth, [&](CudaStream stream) {
      Tensor memory = scratch(name, truth, adjusted_rand_cuda_scratch(op));
      adjusted_rand_cuda(op, memory.mutable_data_ptr(), stream);
    });
    return score;
  }
  require(adjusted_rand_cpu(op, parallel_for), name, ": truth must be in [0, n_truth) and label in [-1, n_label), with n_truth=",
          n_truth, " and n_label=", n_label);
  return score;
}

// ---- capture_rows

void capture_rows(const Tensor& x, const Tensor& start, const Tensor& stop, const Tensor& slot, const Tensor& bank,
                  const Tensor& norm2) {
  const char* name = "capture_rows";
  require(x.dim() == 2 || x.dim() == 3, name, ": x must be [B, T, D] or [n, D], got ", shape(x));
  require(is_point_type(x.scalar_type()), name, ": x must be float32, bfloat16 or float16, got ", dtype(x));
  require_there(name, "x", x, x);
  require_int64(name, "start", start, x);
  require_int64(name, "stop", stop, x);
  require_int64(name, "slot", slot, x);
  const bool is_packed = x.dim() == 2;
  require(start.dim() == 2 && has_shape(stop, {start.size(0), start.size(1)}) &&
              (is_packed || start.size(1) == x.size(0)),
          name, ": start and stop must be [R, B], with the B of x if that is [B, T, D], got ", shape(start), " and ",
          shape(stop), " for x ", shape(x));
  const int64_t B = start.size(1), D = x.size(x.dim() - 1);
  require(slot.numel() == 1 && slot.dim() <= 1, name, ": slot must be one number, got ", shape(slot));
  const int64_t R = start.size(0);
  require(bank.dim() == 3 && bank.size(0) == R && bank.size(2) == D, name, ": bank must be [R, N, D] with R=", R,
          " and D=", D, ", got ", shape(bank));
  const int64_t N = bank.size(1);
  require(bank.scalar_type() == x.scalar_type(), name, ": bank must have the dtype of x, ", dtype(x), ", got ",
          dtype(bank));
  require(has_shape(norm2, {R, N}) && norm2.scalar_type() == ScalarType::Float, name, ": norm2 must be [R, N] = [", R,
          ", ", N, "] float32, got ", shape(norm2), " ", dtype(norm2));
  require_there(name, "bank", bank, x);
  require_there(name, "norm2", norm2, x);
  require(B <= N, name, ": the batch must fit the bank, got B=", B, " with N=", N);
  require_apart(name, {{"bank", &bank}, {"norm2", &norm2}},
                {{"x", &x}, {"start", &start}, {"stop", &stop}, {"slot", &slot}});
  CaptureRows op;
  op.element = element_of(x);
  op.x = x.const_data_ptr();
  op.start = data<int64_t>(start);
  op.stop = data<int64_t>(stop);
  op.slot = data<int64_t>(slot);
  op.bank = bank.mutable_data_ptr();
  op.norm2 = mutable_data<float>(norm2);
  op.B = B, op.T = x.size(x.dim() - 2), op.D = D, op.R = R, op.N = N;
  op.x_stride[0] = is_packed ? 0 : x.stride(0);  // packed: every sequence counts its rows from the first of all
  op.x_stride[1] = x.stride(x.dim() - 2);
  op.x_stride[2] = x.stride(x.dim() - 1);
  copy_strides(start, op.start_stride);
  copy_strides(stop, op.stop_stride);
  copy_strides(bank, op.bank_stride);
  copy_strides(norm2, op.norm2_stride);
  if (is_on_gpu(x)) return on_gpu_of(x, [&](CudaStream stream) { capture_rows_cuda(op, stream); });
  require(capture_rows_cpu(op, parallel_for), name,
          ": slot must be at least 0 and spans must satisfy 0 <= start < stop <= T, with T=", op.T);
}

// ---- attention

void require_qkv(const char* op, const Tensor& qkv, const MaybeTensor& lengths) {
  require(qkv.dim() == 5 && qkv.size(2) == 3, op, ": qkv must be [B, T, 3, H, W], got ", shape(qkv));
  require(is_point_type(qkv.scalar_type()) || qkv.scalar_type() == ScalarType::Double, op,
          ": qkv must be float32, float64, bfloat16 or float16, got ", dtype(qkv));
  require_there(op, "qkv", qkv, qkv);
  if (!lengths) return;
  require_int64(op, "lengths", *lengths, qkv);
  require(has_shape(*lengths, {qkv.size(0)}), op, ": lengths must be [B] with B=", qkv.size(0), ", got ",
          shape(*lengths));
}

// Every sequence of a padded batch.
std::vector<Sequence> sequences_of(const char* op, const Tensor& qkv, const MaybeTensor& lengths) {
  const int64_t B = qkv.size(0), T = qkv.size(1);
  const MaybeTensor given = dense(op, lengths);
  std::vector<Sequence> found;
  for (int64_t b = 0; b < (lengths || qkv.numel() ? B : 0); ++b) {
    const int64_t length = given ? data<int64_t>(*given)[b] : T;
    require(0 <= length && length <= T, op, ": lengths must be in [0, T], got ", length, " with T=", T);
    if (qkv.numel()) found.push_back({b * T, b * T, b * T + length});
  }
  return found;
}

// What the CPU computes in: float32, unless it is float64 anyway.
ScalarType computing_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
Attention<T> attention_of(const Tensor& qkv) {
  const int64_t H = qkv.size(3), W = qkv.size(4);
  const T* q = data<T>(qkv);
  return {q, q + H * W, q + 2 * H * W, 3 * H * W, 3 * H * W, nullptr, H, W};
}

template <class T>
void attention_into(const Tensor& qkv, const std::vector<Sequence>& sequences, const Tensor& out, const Tensor& lse) {
  const int64_t n_tokens = qkv.size(1), H = qkv.size(3), W = qkv.size(4);
  const Attention<T> op = attention_of<T>(qkv);
  const AttentionOut<T> to{mutable_data<T>(out), H * W, mutable_data<T>(lse)};
  for_each(parallel_for, sequences.size(), [&](int64_t b) {
    const Sequence& s = sequences[b];
    attention_cpu(op, s, to);
    std::fill(to.out + s.query_end * H * W, to.out + (s.begin + n_tokens) * H * W, T(0));
    std::fill(to.lse + s.query_end * H, to.lse + (s.begin + n_tokens) * H, T(0));
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const MaybeTensor& lengths) {
  const char* name = "attention";
  require_qkv(name, qkv, lengths);
  const int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), W = qkv.size(4);
  const ScalarType type = computing_type(qkv);
  const std::vector<Sequence> sequences = sequences_of(name, qkv, lengths);
  Tensor out = empty(name, qkv, {B, T, H, W}, type), lse = empty(name, qkv, {B, T, H}, type);
  if (qkv.numel())
    (type == ScalarType::Double ? attention_into<double> : attention_into<float>)(dense(name, qkv, type), sequences,
                                                                                 out, lse);
  else
    torch::stable::zero_(lse);
  return {dense(name, out, qkv.scalar_type()), lse};
}

template <class T>
void attention_backward_into(const Tensor& qkv, const std::vector<Sequence>& sequences, const Tensor& grad_out,
                             const Tensor& out, const Tensor& lse, const Tensor& grad) {
  const int64_t n_tokens = qkv.size(1), H = qkv.size(3), W = qkv.size(4);
  const Attention<T> op = attention_of<T>(qkv);
  T* to = mutable_data<T>(grad);
  for_each(parallel_for, sequences.size(), [&](int64_t b) {
    const Sequence& s = sequences[b];
    attention_backward_cpu(op, s, {data<T>(out), H * W, data<T>(lse)},
                           {data<T>(grad_out), H * W, to, to + H * W, to + 2 * H * W});
    std::fill(to + s.query_end * 3 * H * W, to + (s.begin + n_tokens) * 3 * H * W, T(0));
  });
}

Tensor attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                          const MaybeTensor& lengths) {
  const char* name = "attention_backward";
  require_qkv(name, qkv, lengths);
  const int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), W = qkv.size(4);
  const ScalarType type = computing_type(qkv);
  const std::pair<const char*, const Tensor*> like_out[] = {{"grad_out", &grad_out}, {"out", &out}};
  for (auto [what, x] : like_out) {
    require(has_shape(*x, {B, T, H, W}) && x->scalar_type() == qkv.scalar_type(), name, ": ", what,
            " must be [B, T, H, W] in the dtype of qkv ", shape(qkv), " ", dtype(qkv), ", got ", shape(*x), " ",
            dtype(*x));
    require_there(name, what, *x, qkv);
  }
  require(has_shape(lse, {B, T, H}) && lse.scalar_type() == type, name, ": lse must be [B, T, H] as attention of qkv ",
          shape(qkv), " ", dtype(qkv), " returns it, got ", shape(lse), " ", dtype(lse));
  require_there(name, "lse", lse, qkv);
  const std::vector<Sequence> sequences = sequences_of(name, qkv, lengths);
  Tensor grad = empty(name, qkv, {B, T, 3, H, W}, type);
  if (qkv.numel())
    (type == ScalarType::Double ? attention_backward_into<double> : attention_backward_into<float>)(
        dense(name, qkv, type), sequences, dense(name, grad_out, type), dense(name, out, type), dense(name, lse), grad);
  return dense(name, grad, qkv.scalar_type());
}

// ---- the halves of a block

// Tensors of a BlockWeights, dense; they keep it alive.
struct Weights {
  Tensor norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias;

  Weights(const char* op, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& in_weight,
          const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias, bool is_attention) {
    require(x.dim() == 2, op, ": x must be [n, D], got ", shape(x));
    const int64_t D = x.size(1), F = in_weight.dim() == 2 ? in_weight.size(0) : -1;
    require(has_shape(norm_weight, {D}) && has_shape(norm_bias, {D}) && has_shape(in_weight, {F, D}) &&
                has_shape(in_bias, {F}) && has_shape(out_weight, {D, is_attention ? D : F}) && has_shape(out_bias, {D}),
            op, ": weights must be [D], [D], [F, D], [F], [D, .], [D] with D=", D, ", got ", shape(norm_weight), ", ",
            shape(norm_bias), ", ", shape(in_weight), ", ", shape(in_bias), ", ", shape(out_weight), ", ",
            shape(out_bias));
    require(D >= 1 && F >= 1, op, ": D and F must be at least 1, got D=", D, " and F=", F);
    const std::pair<const char*, const Tensor*> given[] = {
        {"x", &x},           {"norm_weight", &norm_weight}, {"norm_bias", &norm_bias}, {"in_weight", &in_weight},
        {"in_bias", &in_bias}, {"out_weight", &out_weight},   {"out_bias", &out_bias}};
    for (auto [name, w] : given) {
      require(w->scalar_type() == ScalarType::Float, op, ": x and weights must be float32 on the CPU, got ", dtype(*w),
              " for ", name);
      require_there(op, name, *w, x);
    }
    this->norm_weight = dense(op, norm_weight);
    this->norm_bias = dense(op, norm_bias);
    this->in_weight = dense(op, in_weight);
    this->in_bias = dense(op, in_bias);
    this->out_weight = dense(op, out_weight);
    this->out_bias = dense(op, out_bias);
  }

  BlockWeights raw() const {
    return {in_weight.size(1),       in_weight.size(0),     data<float>(norm_weight), data<float>(norm_bias),
            data<float>(in_weight),  data<float>(in_bias),  data<float>(out_weight),  data<float>(out_bias)};
  }
};

// Gradients of x and of the six weights, in that order.
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads empty_grads(const char* op, const Tensor& x, const Weights& w) {
  auto like = [&](const Tensor& t) {
    return t.dim() == 1 ? empty(op, t, {t.size(0)}, ScalarType::Float)
                        : empty(op, t, {t.size(0), t.size(1)}, ScalarType::Float);
  };
  return {like(x),         like(w.norm_weight), like(w.norm_bias), like(w.in_weight),
          like(w.in_bias), like(w.out_weight),  like(w.out_bias)};
}

// What a backward pass is given beside the arguments of the forward one: float32 of this shape, made dense.
Tensor from_forward(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> sizes,
                    const Tensor& beside) {
  require(has_shape(x, sizes), op, ": ", name, " must be ", listed(sizes), " as the forward pass has it, got ",
          shape(x));
  require_float(op, name, x, beside);
  return dense(op, x);
}

BlockGrads raw(const Grads& grads) {
  return {mutable_data<float>(std::get<1>(grads)), mutable_data<float>(std::get<2>(grads)),
          mutable_data<float>(std::get<3>(grads)), mutable_data<float>(std::get<4>(grads)),
          mutable_data<float>(std::get<5>(grads)), mutable_data<float>(std::get<6>(grads))};
}

// Columns of what an MLP saves.
int64_t padded(int64_t F) { return (F + HIDDEN_PANEL - 1) / HIDDEN_PANEL * HIDDEN_PANEL; }

// Null for what was not saved.
float* saved_data(const Tensor& x) { return x.numel() ? mutable_data<float>(x) : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_block(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& in_weight,
    const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias, bool save) {
  const char* name = "mlp_block";
  const Weights weights(name, x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, false);
  const Tensor dense_x = dense(name, x);
  const MlpBlock op{weights.raw(), x.size(0), data<float>(dense_x)};
  const int64_t n = save ? op.n : 0;
  Tensor y = empty(name, x, {op.n, op.weights.D}, ScalarType::Float);
  Tensor mean = empty(name, x, {n}, ScalarType::Float), rstd = empty(name, x, {n}, ScalarType::Float);
  Tensor hidden = empty(name, x, {n, padded(op.weights.F)}, ScalarType::Float);  // the op's own layout inside
  Tensor slope = empty(name, x, {n, op.weights.F}, ScalarType::Float);
  mlp_block_cpu(op, mutable_data<float>(y),
                {saved_data(mean), saved_data(rstd), saved_data(hidden), saved_data(slope), n}, parallel_for);
  return {y, mean, rstd, hidden, slope};
}

Grads mlp_block_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                         const Tensor& in_weight, const Tensor& in_bias, const Tensor& out_weight,
                         const Tensor& out_bias, const Tensor& mean, const Tensor& rstd, const Tensor& hidden,
                         const Tensor& slope) {
  const char* name = "mlp_block_backward";
  const Weights weights(name, x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, false);
  const int64_t n = x.size(0), D = x.size(1), F = in_weight.size(0);
  const int64_t n_hidden = hidden.dim() ? std::max(n, hidden.size(0)) : n;
  const Tensor dense_x = dense(name, x), dense_grad = from_forward(name, "grad_y", grad_y, {n, D}, x);
  const Tensor saved[] = {from_forward(name, "mean", mean, {n}, x), from_forward(name, "rstd", rstd, {n}, x),
                          from_forward(name, "hidden", hidden, {n_hidden, padded(F)}, x),
                          from_forward(name, "slope", slope, {n, F}, x)};
  const MlpBlock op{weights.raw(), n, data<float>(dense_x)};
  Grads grads = empty_grads(name, x, weights);
  mlp_block_backward_cpu(
      op, {saved_data(saved[0]), saved_data(saved[1]), saved_data(saved[2]), saved_data(saved[3]), n_hidden},
      data<float>(dense_grad), mutable_data<float>(std::get<0>(grads)), raw(grads), parallel_for);
  return grads;
}

// Throws unless `rows` ascends strictly within [0, n).
void require_ascending(const char* op, const char* name, const Tensor& rows, int64_t n) {
  const int64_t* row = data<int64_t>(rows);
  for (int64_t i = 0; i < rows.numel(); ++i)
    require((i ? row[i - 1] : -1) < row[i] && row[i] < n, op, ": ", name, " must ascend from 0 or more to less than ",
            n, ", got ", row[i], " at ", i);
}

// The indices of an AttentionBlock, dense and checked; they keep it alive.
struct Packed {
  const char* op;
  Tensor x, offset;
  MaybeTensor kept, prefix, source;

  Packed(const char* op, const Tensor& x, const Tensor& offset, const MaybeTensor& kept, const MaybeTensor& prefix,
         const MaybeTensor& source)
      : op(op), x(dense(op, x)) {
    const int64_t n = source ? source->numel() : x.size(0);
    require_int64(op, "offset", offset, x);
    require(offset.dim() == 1 && offset.numel() >= 1, op, ": offset must be [B + 1], got ", shape(offset));
    this->offset = dense(op, offset);
    const int64_t* at = data<int64_t>(this->offset);
    const int64_t B = offset.numel() - 1;
    require(at[0] == 0 && at[B] == n, op, ": offset must run from 0 to n=", n, ", got ", at[0], " to ", at[B]);
    for (int64_t b = 0; b < B; ++b)
      require(at[b] <= at[b + 1], op, ": offset must not descend, got ", at[b], " before ", at[b + 1]);
    if (kept) {
      require_int64(op, "kept", *kept, x);
      require(kept->dim() == 1, op, ": kept must be [R], got ", shape(*kept));
      this->kept = dense(op, *kept);
      require_ascending(op, "kept", *this->kept, n);
    }
    if (source) {
      require_int64(op, "source", *source, x);
      require(source->dim() == 1, op, ": source must be [n_tokens], got ", shape(*source));
      require(kept && !prefix, op, ": source must come with kept and without prefix");
      this->source = dense(op, *source);
      const int64_t *row = data<int64_t>(*this->source), *token = data<int64_t>(*this->kept);
      for (int64_t i = 0; i < n; ++i)
        require(0 <= row[i] && row[i] < x.size(0), op, ": source must be in [0, ", x.size(0), "), got ", row[i]);
      for (int64_t i = 1; i < kept->numel(); ++i)
        require(row[token[i - 1]] < row[token[i]], op, ": source of kept must ascend, got ", row[token[i]], " at ", i);
    }
    if (!prefix) return;
    require_int64(op, "prefix", *prefix, x);
    require(has_shape(*prefix, {B}), op, ": prefix must be [B] with B=", B, ", got ", shape(*prefix));
    this->prefix = dense(op, *prefix);
    const int64_t* before = data<int64_t>(*this->prefix);
    for (int64_t b = 0; b < B; ++b) {
      require(-1 <= before[b] && before[b] < B, op, ": prefix must be -1 or a sequence below ", B, ", got ", before[b]);
      require(before[b] < 0 || before[before[b]] < 0, op, ": a prefix must have no prefix itself, got ", before[b],
              " for sequence ", b);
    }
  }

  AttentionBlock raw(const Weights& weights, int64_t n_heads) const {
    const BlockWeights w = weights.raw();
    require(n_heads >= 1 && w.D % n_heads == 0 && w.F == 3 * w.D,
            op, ": in_weight must be [3 D, D] and n_heads must divide D, got n_heads=", n_heads, " with D=", w.D);
    return {w,
            x.size(0),
            source ? source->numel() : x.size(0),
            kept ? kept->numel() : x.size(0),
            n_heads,
            offset.numel() - 1,
            data<float>(x),
            kept ? data<int64_t>(*kept) : nullptr,
            data<int64_t>(offset),
            prefix ? data<int64_t>(*prefix) : nullptr,
            source ? data<int64_t>(*source) : nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& in_weight,
    const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias, int64_t n_heads, const Tensor& offset,
    const MaybeTensor& kept, const MaybeTensor& prefix, const MaybeTensor& source, bool save) {
  const char* name = "attention_block";
  const Weights weights(name, x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, true);
  const Packed packed(name, x, offset, kept, prefix, source);
  const AttentionBlock op = packed.raw(weights, n_heads);
  const int64_t n = save ? op.n : 0, D = op.weights.D;
  Tensor y = empty(name, x, {op.R, D}, ScalarType::Float);
  Tensor mean = empty(name, x, {n}, ScalarType::Float), rstd = empty(name, x, {n}, ScalarType::Float);
  Tensor q = empty(name, x, {op.R, D}, ScalarType::Float), kv = empty(name, x, {op.n, 2, D}, ScalarType::Float);
  Tensor mixed = empty(name, x, {op.R, D}, ScalarType::Float), lse = empty(name, x, {op.R, n_heads}, ScalarType::Float);
  attention_block_cpu(op, mutable_data<float>(y),
                      {saved_data(mean), saved_data(rstd), mutable_data<float>(q), mutable_data<float>(kv),
                       mutable_data<float>(mixed), mutable_data<float>(lse)},
                      parallel_for);
  return {y, mean, rstd, q, kv, mixed, lse};
}

Grads attention_block_backward(const Tensor& grad_y, const Tensor& x, const Tensor& norm_weight,
                               const Tensor& norm_bias, const Tensor& in_weight, const Tensor& in_bias,
                               const Tensor& out_weight, const Tensor& out_bias, int64_t n_heads, const Tensor& offset,
                               const MaybeTensor& kept, const MaybeTensor& source, const Tensor& mean,
                               const Tensor& rstd, const Tensor& q, const Tensor& kv, const Tensor& mixed,
                               const Tensor& lse) {
  const char* name = "attention_block_backward";
  const Weights weights(name, x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, true);
  const Packed packed(name, x, offset, kept, std::nullopt, source);
  const AttentionBlock op = packed.raw(weights, n_heads);
  const int64_t n = op.n, R = op.R, D = op.weights.D;
  const Tensor dense_grad = from_forward(name, "grad_y", grad_y, {R, D}, x);
  const Tensor saved[] = {from_forward(name, "mean", mean, {n}, x),
                          from_forward(name, "rstd", rstd, {n}, x),
                          from_forward(name, "q", q, {R, D}, x),
                          from_forward(name, "kv", kv, {n, 2, D}, x),
                          from_forward(name, "mixed", mixed, {R, D}, x),
                          from_forward(name, "lse", lse, {R, n_heads}, x)};
  Grads grads = empty_grads(name, x, weights);
  attention_block_backward_cpu(op,
                               {saved_data(saved[0]), saved_data(saved[1]), saved_data(saved[2]), saved_data(saved[3]),
                                saved_data(saved[4]), saved_data(saved[5])},
                               data<float>(dense_grad), mutable_data<float>(std::get<0>(grads)), raw(grads),
                               parallel_for);
  return grads;
}

// ---- blocks, one after the other: each half hands its result to the next

constexpr size_t N_WEIGHTS = 6, N_SAVED = 11;  // of a half; of a block: attention's six, what lies between, mlp's four
constexpr size_t HIDDEN = 9;                   // of the latter

void require_blocks(const char* op, const std::vector<Tensor>& weights) {
  require(!weights.empty() && weights.size() % (2 * N_WEIGHTS) == 0, op, ": weights must be ", 2 * N_WEIGHTS,
          " for each of one or more blocks, got ", weights.size());
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> transformer_blocks(
    const Tensor& x, std::vector<Tensor> weights, int64_t n_heads, const Tensor& offset, const MaybeTensor& asking,
    const MaybeTensor& kept, const MaybeTensor& prefix, const MaybeTensor& source, bool save) {
  require_blocks("transformer_blocks", weights);
  Tensor y = x;
  std::vector<Tensor> states, saved;
  for (auto w = weights.begin(); w != weights.end(); w += 2 * N_WEIGHTS) {
    const bool is_last = w + 2 * N_WEIGHTS == weights.end();
    auto [between, mean, rstd, q, kv, mixed, lse] = attention_block(
        y, w[0], w[1], w[2], w[3], w[4], w[5], n_heads, offset, is_last ? kept : asking, prefix, source, save);
    auto [z, mlp_mean, mlp_rstd, hidden, slope] =
        mlp_block(between, w[6], w[7], w[8], w[9], w[10], w[11], save);
    if (save) saved.insert(saved.end(), {mean, rstd, q, kv, mixed, lse, between, mlp_mean, mlp_rstd, hidden, slope});
    if (!is_last) states.push_back(z);
    y = z;
  }
  return {y, states, saved};
}

// How much of a pass belongs to its first n_trained sequences, which alone have a gradient.
struct Trained {
  int64_t n_tokens, n_rows;  // rows of x
  int64_t n_asking, n_last;  // rows of what the other blocks put out, and of the last one's

  Trained(const char* op, const Tensor& x, const Tensor& offset, const MaybeTensor& asking, const MaybeTensor& kept,
          const MaybeTensor& source, bool is_one_block, int64_t n_trained) {
    require(x.dim() == 2, op, ": x must be [n, D], got ", shape(x));
    const Packed last(op, x, offset, kept, std::nullopt, source);
    const Packed others(op, x, offset, is_one_block ? kept : asking, std::nullopt, source);
    const int64_t B = offset.numel() - 1;
    require(0 <= n_trained && n_trained <= B, op, ": n_trained must be in [0, ", B, "], got ", n_trained);
    n_tokens = data<int64_t>(last.offset)[n_trained];
    n_rows = source ? 0 : n_tokens;
    for (int64_t i = 0; source && i < n_tokens; ++i) n_rows = std::max(n_rows, data<int64_t>(*last.source)[i] + 1);
    n_asking = n_wanted(others.kept);
    n_last = n_wanted(last.kept);
    require(is_one_block || n_asking == n_rows, op, ": the first n_trained=", n_trained,
            " sequences must own the first rows of x, got ", n_asking, " that they ask for and ", n_rows,
            " up to their last");
  }

 private:
  int64_t n_wanted(const MaybeTensor& of) const {
    if (!of) return n_tokens;
    const int64_t* token = data<int64_t>(*of);
    return std::lower_bound(token, token + of->numel(), n_tokens) - token;
  }
};

// Gradients of x and of the weights, in that order. n_trained: those of the first so many sequences (none: of all), as
// if the others had not been there.
std::vector<Tensor> transformer_blocks_backward(const Tensor& grad_y, const Tensor& x, std::vector<Tensor> weights,
                                                std::vector<Tensor> states, std::vector<Tensor> saved,
                                                int64_t n_heads, const Tensor& offset, const MaybeTensor& asking,
                                                const MaybeTensor& kept, const MaybeTensor& source,
                                                std::optional<int64_t> n_trained) {
  const char* name = "transformer_blocks_backward";
  require_blocks(name, weights);
  const size_t n_blocks = weights.size() / (2 * N_WEIGHTS);
  require(states.size() == n_blocks - 1 && saved.size() == n_blocks * N_SAVED,
          name, ": states and saved must be those of the forward pass, ", n_blocks - 1, " and ", n_blocks * N_SAVED,
          " tensors, got ", states.size(), " and ", saved.size());
  if (n_trained) {
    const Trained of(name, x, offset, asking, kept, source, n_blocks == 1, *n_trained);
    auto first_rows = [&](const char* what, Tensor all, int64_t n) {  // if there are more
      require_there(name, what, all, x);
      return all.dim() && all.size(0) > n ? torch::stable::narrow(all, 0, 0, n) : all;
    };
    auto first_of = [&](const MaybeTensor& index, int64_t n) {
      return index ? MaybeTensor(first_rows("an index", *index, n)) : std::nullopt;
    };
    for (Tensor& state : states) state = first_rows("states", state, of.n_rows);
    for (size_t i = 0; i < saved.size(); ++i) {
      const size_t which = i % N_SAVED;
      if (which == HIDDEN) continue;  // its rows lie in panels
      const bool is_of_x = which < 2 || which == 3;  // attention's mean, rstd and kv
      const int64_t n_of_result = i / N_SAVED + 1 == n_blocks ? of.n_last : of.n_asking;
      saved[i] = first_rows("saved", saved[i], is_of_x ? of.n_rows : n_of_result);
    }
    std::vector<Tensor> grads = transformer_blocks_backward(
        first_rows("grad_y", grad_y, of.n_last), first_rows("x", x, of.n_rows), weights, states, saved, n_heads,
        first_rows("offset", offset, *n_trained + 1), first_of(asking, of.n_asking), first_of(kept, of.n_last),
        first_of(source, of.n_tokens), std::nullopt);
    const Tensor of_first = grads[0];
    grads[0] = empty(name, x, {x.size(0), x.size(1)}, ScalarType::Float);
    float* to = mutable_data<float>(grads[0]);
    std::memset(std::copy_n(data<float>(of_first), of_first.numel(), to), 0,
                (grads[0].numel() - of_first.numel()) * sizeof(float));
    return grads;
  }
  std::vector<Tensor> grads(1 + weights.size());
  grads[0] = grad_y;
  auto take = [&](size_t first, Grads half) {
    std::tie(grads[0], grads[first], grads[first + 1], grads[first + 2], grads[first + 3], grads[first + 4],
             grads[first + 5]) = std::move(half);
  };
  for (size_t block = n_blocks; block-- > 0;) {
    const Tensor* w = &weights[block * 2 * N_WEIGHTS];
    const Tensor* of = &saved[block * N_SAVED];
    const size_t first = 1 + block * 2 * N_WEIGHTS;
    take(first + N_WEIGHTS,
         mlp_block_backward(grads[0], of[6], w[6], w[7], w[8], w[9], w[10], w[11], of[7], of[8], of[9], of[10]));
    take(first, attention_block_backward(grads[0], block ? states[block - 1] : x, w[0], w[1], w[2], w[3], w[4], w[5],
                                         n_heads, offset, block + 1 == n_blocks ? kept : asking, source, of[0], of[1],
                                         of[2], of[3], of[4], of[5]));
  }
  return grads;
}

// What CPU and GPU both have.
template <class Library>
void implement_measures(Library& m) {
  CLMFAST_IMPLEMENT(m, knn);
  CLMFAST_IMPLEMENT(m, kmeans);
  CLMFAST_IMPLEMENT(m, separation);
  CLMFAST_IMPLEMENT(m, majority_vote);
  CLMFAST_IMPLEMENT(m, label_shares);
  CLMFAST_IMPLEMENT(m, partition_scores);
  CLMFAST_IMPLEMENT(m, adjusted_rand);
  CLMFAST_IMPLEMENT(m, capture_rows);
}

// What a CPU alone has.
template <class Library>
void implement_on_cpu(Library& m) {
  CLMFAST_IMPLEMENT(m, kmeans_search);
  CLMFAST_IMPLEMENT(m, attention);
  CLMFAST_IMPLEMENT(m, attention_backward);
  CLMFAST_IMPLEMENT(m, mlp_block);
  CLMFAST_IMPLEMENT(m, mlp_block_backward);
  CLMFAST_IMPLEMENT(m, attention_block);
  CLMFAST_IMPLEMENT(m, attention_block_backward);
  CLMFAST_IMPLEMENT(m, transformer_blocks);
  CLMFAST_IMPLEMENT(m, transformer_blocks_backward);
}

}  // namespace
}  // namespace clmfast

STABLE_TORCH_LIBRARY(clmfast, m) {
  m.def("attention(Tensor qkv, Tensor? lengths) -> (Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor? lengths) -> Tensor");
  m.def(
      "mlp_block(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor in_weight, Tensor in_bias, Tensor out_weight, "
      "Tensor out_bias, bool save) -> (Tensor y, Tensor mean, Tensor rstd, Tensor hidden, Tensor slope)");
  m.def(
      "mlp_block_backward(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor in_weight, Tensor "
      "in_bias, Tensor out_weight, Tensor out_bias, Tensor mean, Tensor rstd, Tensor hidden, Tensor slope) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_block(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor in_weight, Tensor in_bias, Tensor "
      "out_weight, Tensor out_bias, int n_heads, Tensor offset, Tensor? kept, Tensor? prefix, Tensor? source, bool save) "
      "-> (Tensor y, Tensor mean, Tensor rstd, Tensor q, Tensor kv, Tensor mixed, Tensor lse)");
  m.def(
      "attention_block_backward(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor in_weight, "
      "Tensor in_bias, Tensor out_weight, Tensor out_bias, int n_heads, Tensor offset, Tensor? kept, Tensor? source, "
      "Tensor mean, Tensor rstd, Tensor q, Tensor kv, Tensor mixed, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "transformer_blocks(Tensor x, Tensor[] weights, int n_heads, Tensor offset, Tensor? asking, Tensor? kept, Tensor? "
      "prefix, Tensor? source, bool save) -> (Tensor y, Tensor[] states, Tensor[] saved)");
  m.def(
      "transformer_blocks_backward(Tensor grad_y, Tensor x, Tensor[] weights, Tensor[] states, Tensor[] saved, int "
      "n_heads, Tensor offset, Tensor? asking, Tensor? kept, Tensor? source, int? n_trained) -> Tensor[]");
  m.def(
      "knn(Tensor points, int k, Tensor? queries, Tensor[] query_group, Tensor[] point_group, Tensor? within) -> (Tensor "
      "dist2, Tensor index)");
  m.def(
      "kmeans_search(Tensor points, int n_clusters, Tensor? known, Tensor n_cold, int keep, int moves, int renewals, "
      "int max_iter, int seed, Tensor(a!)? directions, Tensor(b!)? projected) -> (Tensor label, Tensor inertia, Tensor centroid, Tensor "
      "n_iter, Tensor origin)");
  m.def(
      "kmeans(Tensor points, int n_clusters, Tensor? init, bool is_random, int n_init, int max_iter, float tol, int "
      "seed) -> (Tensor label, Tensor centroid, Tensor inertia, Tensor n_iter)");
  m.def("separation(Tensor points, Tensor label, int n_labels) -> Tensor");
  m.def("majority_vote(Tensor index, Tensor label) -> Tensor");
  m.def("label_shares(Tensor index, Tensor label, Tensor truth, int n_labels) -> Tensor");
  m.def("partition_scores(Tensor truth, Tensor label, int? n_truth, int? n_label) -> Tensor");
  m.def("adjusted_rand(Tensor truth, Tensor label, int n_truth, int n_label) -> Tensor");
  m.def("capture_rows(Tensor x, Tensor start, Tensor stop, Tensor slot, Tensor(a!) bank, Tensor(b!) norm2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clmfast, CPU, m) {
  clmfast::implement_measures(m);
  clmfast::implement_on_cpu(m);
}

#ifdef CLMFAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(clmfast, CUDA, m) { clmfast::implement_measures(m); }
#endif
