// capture_rows on the GPU; the contract is ../capture.h. A warp writes a row, in pieces of 16 bytes: piece p belongs to
// lane p % 32, whether or not the strides allow it to be moved as one. So the norm is one sum of one order, and the slot,
// read from device memory, may be counted on by a graph that is replayed.
#include "../capture.h"
#include "element.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace clmfast {
namespace {

constexpr int THREADS = 128;  // four rows: a batch of 128 with two readouts fills 64 multiprocessors. Not tuned yet

template <class T>
struct alignas(16) Piece {
  static constexpr int n = 16 / sizeof(T);
  T value[n];
};

// Where a row comes from and goes to.
template <class T>
struct Row {
  const T* x;  // of its first token
  int64_t n_tokens;
  T* to;
  float* norm2;
  bool is_moved_whole;  // one token, and pieces may be read and written as such
  bool is_in_range;
};

template <class T>
__device__ bool is_aligned(const T* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

template <class T>
__device__ Row<T> find_row(const CaptureRows& op, int64_t r, int64_t b) {
  const int64_t start = op.start[r * op.start_stride[0] + b * op.start_stride[1]];
  const int64_t stop = op.stop[r * op.stop_stride[0] + b * op.stop_stride[1]];
  const int64_t counter = *op.slot, slot = ((counter < 0 ? 0 : counter) % op.N + b) % op.N;
  Row<T> row;
  row.is_in_range = counter >= 0 && 0 <= start && start < stop && stop <= op.T;
  row.x = static_cast<const T*>(op.x) + b * op.x_stride[0] + (row.is_in_range ? start : 0) * op.x_stride[1];
  row.n_tokens = stop - start;
  row.to = static_cast<T*>(op.bank) + r * op.bank_stride[0] + slot * op.bank_stride[1];
  row.norm2 = op.norm2 + r * op.norm2_stride[0] + slot * op.norm2_stride[1];
  row.is_moved_whole = row.n_tokens == 1 && op.D % Piece<T>::n == 0 && op.x_stride[2] == 1 && op.bank_stride[2] == 1 &&
                       is_aligned(row.x) && is_aligned(row.to);
  return row;
}

// Coordinate d of the row as it is stored.
template <class T>
__device__ T stored(const CaptureRows& op, const Row<T>& row, int64_t d) {
  const T* column = row.x + d * op.x_stride[2];
  if (!row.is_in_range) return narrow<T>(__int_as_float(0x7fffffff));  // NaN
  if (row.n_tokens == 1) return *column;
  double sum = 0;
  for (int64_t t = 0; t < row.n_tokens; ++t) sum += static_cast<double>(widen(column[t * op.x_stride[1]]));
  return narrow<T>(static_cast<float>(sum / static_cast<double>(row.n_tokens)));
}

template <class T>
__global__ void __launch_bounds__(THREADS) capture_kernel(CaptureRows op) {
  const int64_t i_row = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + warp_id();
  if (i_row >= op.R * op.B) return;
  const Row<T> row = find_row<T>(op, i_row / op.B, i_row % op.B);
  double norm2 = 0;
  auto add = [&norm2](T value) {
    const double widened = widen(value);
    norm2 += widened * widened;
  };
  constexpr int n = Piece<T>::n;
  for (int64_t d = lane_id() * n; d < op.D; d += 32 * n) {
    if (row.is_in_range && row.is_moved_whole) {
      const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(row.x + d);
      *reinterpret_cast<Piece<T>*>(row.to + d) = piece;
#pragma unroll
      for (int e = 0; e < n; ++e) add(piece.value[e]);
    } else {
      for (int e = 0; e < n && d + e < op.D; ++e) {
        const T value = stored(op, row, d + e);
        row.to[(d + e) * op.bank_stride[2]] = value;
        add(value);
      }
    }
  }
  norm2 = warp_sum(norm2);
  // A row of no coordinates has norm 0, but not if it is out of range.
  if (lane_id() == 0) *row.norm2 = row.is_in_range ? static_cast<float>(norm2) : __int_as_float(0x7fffffff);
}

}  // namespace

void capture_rows_cuda(const CaptureRows& op, CudaStream stream) {
  const int64_t n_rows = op.R * op.B;
  if (n_rows == 0) return;
  const auto n_blocks = static_cast<unsigned>((n_rows + THREADS / 32 - 1) / (THREADS / 32));
  with_element(op.element,
               [&](auto element) { launch(capture_kernel<decltype(element)>, n_blocks, THREADS, 0, stream, op); });
}

}  // namespace clmfast
