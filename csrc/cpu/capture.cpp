// capture_rows on the CPU: one task per written row.
#include "../capture.h"

#include <cstring>

#include "element.h"

namespace clmfast {
namespace {

template <class T>
void capture_row(const CaptureRows& op, int64_t r, int64_t b) {
  const int64_t first = op.start[r * op.start_stride[0] + b * op.start_stride[1]];
  const int64_t last = op.stop[r * op.stop_stride[0] + b * op.stop_stride[1]] - 1;
  const int64_t slot = (*op.slot % op.N + b) % op.N;
  const T* x = static_cast<const T*>(op.x) + b * op.x_stride[0];
  T* row = static_cast<T*>(op.bank) + r * op.bank_stride[0] + slot * op.bank_stride[1];
  double norm2 = 0;
  for (int64_t d = 0; d < op.D; ++d) {
    const T* column = x + d * op.x_stride[2];
    T value = column[first * op.x_stride[1]];
    if (last > first) {
      double sum = 0;
      for (int64_t t = first; t <= last; ++t) sum += widen(column[t * op.x_stride[1]]);
      value = narrow<T>(static_cast<float>(sum / static_cast<double>(last + 1 - first)));
    }
    row[d * op.bank_stride[2]] = value;
    double widened = widen(value);
    norm2 += widened * widened;
  }
  op.norm2[r * op.norm2_stride[0] + slot * op.norm2_stride[1]] = static_cast<float>(norm2);
}

}  // namespace

bool capture_rows_cpu(const CaptureRows& op, ParallelFor parallel_for) {
  if (*op.slot < 0) return false;
  for (int64_t r = 0; r < op.R; ++r) {
    for (int64_t b = 0; b < op.B; ++b) {
      int64_t start = op.start[r * op.start_stride[0] + b * op.start_stride[1]];
      int64_t stop = op.stop[r * op.stop_stride[0] + b * op.stop_stride[1]];
      if (start < 0 || start >= stop || stop > op.T) return false;
    }
  }
  auto capture = op.element == Element::float32    ? capture_row<float>
                 : op.element == Element::bfloat16 ? capture_row<BFloat16>
                                                   : capture_row<Float16>;
  for_each(parallel_for, op.R * op.B, [&](int64_t task) { capture(op, task / op.B, task % op.B); });
  return true;
}

}  // namespace clmfast
