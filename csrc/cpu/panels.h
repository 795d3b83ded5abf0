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
#include <vector>

#include "tile.h"

namespace clmfast {

// x -> float32(scale x - centre). Any centre near the points and any scale near 1 / (largest |x|) will do: the bound
// holds for all.
struct Frame {
  std::vector<float> centre;  // in scaled units
  float scale = 1;            // a power of two: scaling rounds nothing
  double kappa = 0, eta = 0;
};

// A frame for the finite rows of points [N, D], centred on them, and wide enough for the finite rows of others [M, D]
// as well.
Frame frame_of(const float* points, int64_t N, const float* others, int64_t M, int64_t D);

// One row into the frame: out[d * stride], and its squared norm there. A row that is not finite becomes zeros with
// norm infinity.
double pack_row(const Frame& frame, const float* row, float* out, int64_t stride);

constexpr int64_t n_panels(int64_t N) { return (N + TILE_COLS - 1) / TILE_COLS; }

// Panel i_panel of points [N, D]: panel [D, TILE_COLS] and norm2 [TILE_COLS]; columns beyond N are zeros with norm
// infinity.
void pack_panel(const Frame& frame, const float* points, int64_t N, int64_t i_panel, float* panel, double* norm2);

}  // namespace clmfast
