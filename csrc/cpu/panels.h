// A point set made ready for dot_tile: scaled, centred, rounded to float32 and interleaved; with the bound on what
// that costs.
//
// Screening and deciding. knn and kmeans must compare float64 distances exactly, but need to compute only few of
// them. For rows q, p the screen gives v = (1 - kappa) |p~|^2 - 2 q~.p~ in float32; whoever it cannot exclude is
// measured by pair_dist2. The bound, with u = 2^-24, q~ = float32(scale q - centre), A = |q~|, B = |p~|, and dist2 in
// scaled units:
//   rounding q, p      | |q~ - p~| - scale |q - p| | <= u (A + B) and |q~ - p~| <= A + B, so at most 4 u (A^2 + B^2)
//   the dot product    2 |error| <= 2 gamma_D A B <= gamma_D (A^2 + B^2), gamma_n = n u / (1 - n u)
//   putting together   rounding (1 - kappa) B^2 and v to float32: at most 3 u (A^2 + B^2)
//   underflow          less than eta = (D + 8) 2^-118 in all, even where denormals are flushed to zero
// In sum   | dist2 - (A^2 + kappa B^2 + v) | <= kappa (A^2 + B^2) + eta        with kappa = gamma_{D+8}
// and so   low <= dist2 <= low + 2 kappa (A^2 + B^2) + 2 eta                   with low = v + (1 - kappa) A^2 - eta.
// D < 2^20 keeps kappa below 1/8; coordinates of at most 8 leave no room for overflow.
#pragma once

#include <cstdint>
#include <memory>

#include "../packed.h"
#include "../parallel.h"

namespace clmfast {

// x -> float32(scale x - centre). Any centre near the points and any scale near 1 / (largest |x|) will do: the bound
// holds for all.
struct Frame {
  const float* centre;  // [D] in scaled units
  int64_t D;
  float scale;  // a power of two: scaling rounds nothing
  double kappa, eta;
};

Frame frame_of(const Packed& packed, int64_t s);

// The memory of a Packed that lives as long as one call.
struct PackedMemory : Packed {
  PackedMemory(int64_t S, int64_t N, int64_t D);

 private:
  std::unique_ptr<float[]> floats_;  // not vectors: to clear them first would cost as much as to fill them
  std::unique_ptr<double[]> doubles_;
};

// Does the frame of set s hold this row (or is the row not finite, and of no interest)?
bool suits(const Packed& packed, int64_t s, const float* row);

// Frames for the finite rows of points [S, N, D], of which n are filled, centred on them, and wide enough for the
// finite rows of others [S, M, D] as well.
void make_frames(const Packed& packed, const float* points, int64_t n, const float* others, int64_t M, int64_t m,
                 ParallelFor parallel_for);

// Packs those panels of points [S, N, D] that hold one of the `count` rows from `first` on, round and round; rows from
// n on are empty.
void pack_rows(const Packed& packed, const float* points, int64_t n, int64_t first, int64_t count,
               ParallelFor parallel_for);

// One panel of chosen rows of points [N, D]: panel [D, PANEL] and norm2 [PANEL]; columns from n <= PANEL on are empty.
void pack_panel(const Frame& frame, const float* points, const int64_t* row, int64_t n, float* panel, double* norm2);

// One row into the frame: out[d * stride], and its squared norm there. A row that is not finite becomes zeros with
// norm infinity.
double pack_row(const Frame& frame, const float* row, float* out, int64_t stride);

// (1 - kappa) |p~|^2 of a panel's points, as the screen wants it.
void low_norm2(const Frame& frame, const double* norm2, float* out);

}  // namespace clmfast
