// separation: how far apart labelled groups of points lie, from group centroids alone, for S sets at once.
//
//   points  [S, N, D] float32     (bfloat16 and float16 are widened by the torch side, which changes no value; a GPU
//                                 reads them as they are: then `points` points at what `element` says)
//   label   [N] int64 in [0, n_labels), shared by all sets; n_labels < 2^31
//   out     [3, S] float64: centroid silhouette, scatter ratio, total scatter (formulas: clmfast/measure/separation.py)
//
// Centroids are means in float64 of the points in their order, rounded to float32; distances to them are float64 dist2
// (cpu/pair.h), so the result is a pure function of points and label. Points that are not finite are left out.
// The CPU returns false, and leaves out unspecified, if a label is out of range. A GPU, which could tell nobody without
// waiting, returns NaN; and it sums the scatter between groups over d in another fixed order.
#pragma once

#include <cstdint>

#include "element.h"
#include "parallel.h"
#include "stream.h"

namespace clmfast {

struct Separation {
  const float* points;
  const int64_t* label;
  int64_t S, N, D, n_labels;
  double* out;
};

bool separation_cpu(const Separation& op, ParallelFor parallel_for);
size_t separation_cuda_scratch(const Separation& op);
void separation_cuda(const Separation& op, Element element, void* scratch, CudaStream stream);

}  // namespace clmfast
