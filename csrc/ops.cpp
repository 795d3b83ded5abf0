// The torch side of every op: schema, checks, outputs. The arithmetic lives behind the contract headers and knows no
// torch.
// Written against torch's stable ABI, so that one build serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "capture.h"
#include "kmeans.h"
#include "knn.h"
#include "partition.h"

namespace clmfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- what the checks are made of

// Throws what Python sees as a ValueError with this text.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string shape(const Tensor& x) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.size(i);
  text << ']';
  return text.str();
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes)
    if (x.size(i++) != size) return false;
  return true;
}

bool is_point_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

bool is_same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

void require_points(const char* op, const char* name, const Tensor& points) {
  require(points.dim() == 3, op, ": ", name, " must be [S, N, D], got ", shape(points));
  require(is_point_type(points.scalar_type()), op, ": ", name, " must be float32, bfloat16 or float16");
  require(points.size(1) < int64_t{1} << 31, op, ": N must be below 2^31, got N=", points.size(1));
  require(points.size(2) < int64_t{1} << 20, op, ": D must be below 2^20, got D=", points.size(2));
}

void require_int64(const char* op, const char* name, const Tensor& x, const Tensor& beside) {
  require(x.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
  require(is_same_device(x, beside), op, ": all tensors must be on one device, but ", name, " is on another");
}

// ---- what the CPU implementations are given

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor dense_float(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)); }

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

void copy_strides(const Tensor& x, int64_t* strides) {
  for (int64_t i = 0; i < x.dim(); ++i) strides[i] = x.stride(i);
}

// ---- knn

std::tuple<Tensor, Tensor> knn(const Tensor& points, int64_t k, const MaybeTensor& queries,
                               const MaybeTensor& query_group, const MaybeTensor& point_group,
                               const MaybeTensor& within) {
  require_points("knn", "points", points);
  const int64_t S = points.size(0), N = points.size(1), D = points.size(2);
  if (queries) {
    require_points("knn", "queries", *queries);
    require(queries->size(0) == S && queries->size(2) == D,
            "knn: queries must be [S, Q, D] with the S and D of points ", shape(points), ", got ", shape(*queries));
    require(queries->scalar_type() == points.scalar_type(), "knn: queries must have the dtype of points");
    require(is_same_device(*queries, points), "knn: all tensors must be on one device, but queries is on another");
    require(k >= 1, "knn: k must be at least 1, got k=", k);
  } else {
    require(1 <= k && k < N, "knn: k must be in [1, N), got k=", k, " with N=", N);
  }
  const int64_t Q = queries ? queries->size(1) : N;
  require(query_group.has_value() == point_group.has_value(),
          "knn: barred must give the groups of both queries and points");
  if (query_group) {
    require_int64("knn", "query_group", *query_group, points);
    require_int64("knn", "point_group", *point_group, points);
    require(has_shape(*query_group, {Q}) && has_shape(*point_group, {N}), "knn: barred must be [Q] and [N] with Q=", Q,
            " and N=", N, ", got ", shape(*query_group), " and ", shape(*point_group));
  }
  if (within) {
    require(within->scalar_type() == ScalarType::Float, "knn: within must be float32");
    require(has_shape(*within, {S, Q}), "knn: within must be [S, Q] with S=", S, " and Q=", Q, ", got ",
            shape(*within));
    require(is_same_device(*within, points), "knn: all tensors must be on one device, but within is on another");
  }
  Tensor dist2 = empty(points, {S, Q, k}, ScalarType::Float), index = empty(points, {S, Q, k}, ScalarType::Long);
  Tensor dense_points = dense_float(points);
  MaybeTensor dense_queries, dense_query_group, dense_point_group, dense_within;
  if (queries) dense_queries = dense_float(*queries);
  if (query_group) dense_query_group = torch::stable::contiguous(*query_group);
  if (point_group) dense_point_group = torch::stable::contiguous(*point_group);
  if (within) dense_within = torch::stable::contiguous(*within);
  Knn op;
  op.points = data<float>(dense_points);
  op.queries = queries ? data<float>(*dense_queries) : nullptr;
  op.is_self = !queries;  // not a null pointer, which an empty tensor has as well
  op.query_group = query_group ? data<int64_t>(*dense_query_group) : nullptr;
  op.point_group = point_group ? data<int64_t>(*dense_point_group) : nullptr;
  op.within = within ? data<float>(*dense_within) : nullptr;
  op.S = S, op.N = N, op.Q = Q, op.D = D, op.k = k;
  op.dist2 = mutable_data<float>(dist2);
  op.index = mutable_data<int64_t>(index);
  knn_cpu(op, parallel_for);
  return {dist2, index};
}

// ---- kmeans

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans(const Tensor& points, int64_t n_clusters, const MaybeTensor& init,
                                                  bool is_random, int64_t n_init, int64_t max_iter, double tol,
                                                  int64_t seed) {
  require_points("kmeans", "points", points);
  const int64_t S = points.size(0), N = points.size(1), D = points.size(2), K = n_clusters;
  require(1 <= K && K <= N, "kmeans: n_clusters must be in [1, N], got n_clusters=", K, " with N=", N);
  require(n_init >= 1, "kmeans: n_init must be at least 1, got n_init=", n_init);
  require(max_iter >= 1, "kmeans: max_iter must be at least 1, got max_iter=", max_iter);
  require(tol >= 0, "kmeans: tol must not be negative, got tol=", tol);
  if (init) {
    require(has_shape(*init, {S, K, D}), "kmeans: init must be [S, K, D] = [", S, ", ", K, ", ", D, "], got ",
            shape(*init));
    require(is_point_type(init->scalar_type()), "kmeans: init must be float32, bfloat16 or float16");
    require(is_same_device(*init, points), "kmeans: all tensors must be on one device, but init is on another");
    require(n_init == 1, "kmeans: n_init must be 1 when init is a tensor, got n_init=", n_init);
  }
  Tensor label = empty(points, {S, N}, ScalarType::Long), centroid = empty(points, {S, K, D}, ScalarType::Float);
  Tensor inertia = empty(points, {S}, ScalarType::Double), n_iter = empty(points, {S}, ScalarType::Long);
  Tensor dense_points = dense_float(points);
  MaybeTensor dense_init;
  if (init) dense_init = dense_float(*init);
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
  kmeans_cpu(op, parallel_for);
  return {label, centroid, inertia, n_iter};
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
  require(n_truth.has_value() == n_label.has_value(), name, ": give both n_truth and n_label, or neither");
  if (n_truth) {
    require(*n_truth >= 1 && *n_label >= 1 && *n_truth <= (int64_t{1} << 28) / *n_label, name,
            ": n_truth and n_label must be at least 1 and their product at most 2^28, got ", *n_truth, " and ",
            *n_label);
  }
  Tensor scores = empty(truth, {6, S}, ScalarType::Double);
  Tensor dense_truth = torch::stable::contiguous(truth), dense_label = torch::stable::contiguous(label);
  PartitionScores op;
  op.truth = data<int64_t>(dense_truth);
  op.label = data<int64_t>(dense_label);
  op.truth_stride = truth.dim() == 2 ? N : 0;
  op.label_stride = label.dim() == 2 ? N : 0;
  op.S = S, op.N = N;
  op.n_truth = n_truth.value_or(-1);
  op.n_label = n_label.value_or(-1);
  op.scores = mutable_data<double>(scores);
  require(partition_scores_cpu(op, parallel_for), name,
          ": truth must be in [0, n_truth) and label in [0, n_label), with n_truth=", op.n_truth,
          " and n_label=", op.n_label);
  return scores;
}

// ---- capture_rows

void capture_rows(const Tensor& x, const Tensor& start, const Tensor& stop, const Tensor& slot, const Tensor& bank,
                  const Tensor& norm2) {
  const char* name = "capture_rows";
  require(x.dim() == 3, name, ": x must be [B, T, D], got ", shape(x));
  require(is_point_type(x.scalar_type()), name, ": x must be float32, bfloat16 or float16");
  require_int64(name, "start", start, x);
  require_int64(name, "stop", stop, x);
  require_int64(name, "slot", slot, x);
  const int64_t B = x.size(0), D = x.size(2);
  require(start.dim() == 2 && start.size(1) == B && has_shape(stop, {start.size(0), B}), name,
          ": start and stop must be [R, B] with B=", B, ", got ", shape(start), " and ", shape(stop));
  require(slot.numel() == 1 && slot.dim() <= 1, name, ": slot must be one number, got ", shape(slot));
  const int64_t R = start.size(0);
  require(bank.dim() == 3 && bank.size(0) == R && bank.size(2) == D, name, ": bank must be [R, N, D] with R=", R,
          " and D=", D, ", got ", shape(bank));
  const int64_t N = bank.size(1);
  require(bank.scalar_type() == x.scalar_type(), name, ": bank must have the dtype of x");
  require(has_shape(norm2, {R, N}) && norm2.scalar_type() == ScalarType::Float, name, ": norm2 must be [R, N] = [", R,
          ", ", N, "] float32, got ", shape(norm2));
  require(is_same_device(bank, x) && is_same_device(norm2, x), name, ": all tensors must be on one device");
  require(B <= N, name, ": the batch must fit the bank, got B=", B, " with N=", N);
  CaptureRows op;
  op.element = x.scalar_type() == ScalarType::Float      ? Element::float32
               : x.scalar_type() == ScalarType::BFloat16 ? Element::bfloat16
                                                         : Element::float16;
  op.x = x.const_data_ptr();
  op.start = data<int64_t>(start);
  op.stop = data<int64_t>(stop);
  op.slot = data<int64_t>(slot);
  op.bank = bank.mutable_data_ptr();
  op.norm2 = mutable_data<float>(norm2);
  op.B = B, op.T = x.size(1), op.D = D, op.R = R, op.N = N;
  copy_strides(x, op.x_stride);
  copy_strides(start, op.start_stride);
  copy_strides(stop, op.stop_stride);
  copy_strides(bank, op.bank_stride);
  copy_strides(norm2, op.norm2_stride);
  require(capture_rows_cpu(op, parallel_for), name,
          ": slot must be at least 0 and spans must satisfy 0 <= start < stop <= T, with T=", op.T);
}

}  // namespace
}  // namespace clmfast

STABLE_TORCH_LIBRARY(clmfast, m) {
  m.def(
      "knn(Tensor points, int k, Tensor? queries, Tensor? query_group, Tensor? point_group, Tensor? within) -> (Tensor "
      "dist2, Tensor index)");
  m.def(
      "kmeans(Tensor points, int n_clusters, Tensor? init, bool is_random, int n_init, int max_iter, float tol, int "
      "seed)"
      " -> (Tensor label, Tensor centroid, Tensor inertia, Tensor n_iter)");
  m.def("partition_scores(Tensor truth, Tensor label, int? n_truth, int? n_label) -> Tensor");
  m.def("capture_rows(Tensor x, Tensor start, Tensor stop, Tensor slot, Tensor(a!) bank, Tensor(b!) norm2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clmfast, CPU, m) {
  m.impl("knn", TORCH_BOX(&clmfast::knn));
  m.impl("kmeans", TORCH_BOX(&clmfast::kmeans));
  m.impl("partition_scores", TORCH_BOX(&clmfast::partition_scores));
  m.impl("capture_rows", TORCH_BOX(&clmfast::capture_rows));
}
