// capture_rows: copies chosen rows of a batch into a ring of rows, and their squared norms beside them.
//
//   x      [B, T, D] float32, bfloat16 or float16, any strides; or packed, [n, D]: then T = n, x[b] is all of x
//   start, stop  [R, B] int64, 0 <= start < stop <= T
//   slot   one int64 >= 0 on x's device: the row of the ring that the batch's first row goes to
//   bank   [R, N, D] of x's dtype, norm2 [R, N] float32: written in place, any strides; B <= N
//
//     row(r, b)  = mean of x[b, t] over start[r, b] <= t < stop[r, b]
//     bank [r, (slot + b) mod N] = row(r, b)
//     norm2[r, (slot + b) mod N] = float32( sum_d bank[r, (slot + b) mod N, d]^2 )      summed in float64, d ascending
//
// A span of one token is copied bit for bit. A longer one is summed in float64, t ascending, and rounded to float32,
// then to x's dtype.
// Allocates nothing and waits for nothing. The CPU checks the spans: it returns false, having written nothing, if one
// is out of range. A GPU, which could tell nobody without waiting, writes NaN into the row and its norm instead, or into
// all of them if the slot is negative; and it sums the norm in another fixed order.
#pragma once

#include <cstdint>

#include "element.h"
#include "parallel.h"
#include "stream.h"

namespace clmfast {

struct CaptureRows {
  Element element;
  const void* x;
  const int64_t *start, *stop, *slot;
  void* bank;
  float* norm2;
  int64_t B, T, D, R, N;
  int64_t x_stride[3], start_stride[2], stop_stride[2], bank_stride[3], norm2_stride[2];  // in elements
};

bool capture_rows_cpu(const CaptureRows& op, ParallelFor parallel_for);
void capture_rows_cuda(const CaptureRows& op, CudaStream stream);

}  // namespace clmfast
