#include "panels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "pair.h"

namespace clmfast {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

CLMFAST_BODY void place_row_body(const float* row, const float* centre, float scale, int64_t D, float* out,
                                 int64_t stride) {
  for (int64_t d = 0; d < D; ++d) out[d * stride] = row[d] * scale - centre[d];
}

CLMFAST_BODY void panel_norm2_body(const float* panel, int64_t D, double* norm2) {
  for (int64_t c = 0; c < TILE_COLS; ++c) norm2[c] = 0;
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      double x = panel[d * TILE_COLS + c];
      norm2[c] += x * x;
    }
  }
}

CLMFAST_PER_ISA(void, place_row,
                (const float* row, const float* centre, float scale, int64_t D, float* out, int64_t stride),
                (row, centre, scale, D, out, stride))
CLMFAST_PER_ISA(void, panel_norm2, (const float* panel, int64_t D, double* norm2), (panel, D, norm2))

// Places the row, or zeros if it is not finite; returns whether it is.
bool place(const Frame& frame, const float* row, float* out, int64_t stride) {
  const int64_t D = static_cast<int64_t>(frame.centre.size());
  bool is_finite = is_finite_row(row, D);
  if (is_finite) {
    place_row(row, frame.centre.data(), frame.scale, D, out, stride);
  } else {
    for (int64_t d = 0; d < D; ++d) out[d * stride] = 0;
  }
  return is_finite;
}

}  // namespace

Frame frame_of(const float* points, int64_t N, const float* others, int64_t M, int64_t D) {
  constexpr int64_t SAMPLE = 256;  // rows that the centre is the mean of: near enough to the mean of all
  std::vector<double> mean(D);
  int64_t n_sampled = 0;
  float reach = 0;
  for (int64_t i = 0; i < N + M; ++i) {
    const float* row = i < N ? points + i * D : others + (i - N) * D;
    float row_reaches = row_reach(row, D);
    if (!(row_reaches < INF)) continue;
    reach = std::max(reach, row_reaches);
    if (i >= N || i % ((N + SAMPLE - 1) / SAMPLE) != 0) continue;
    ++n_sampled;
    for (int64_t d = 0; d < D; ++d) mean[d] += row[d];
  }
  Frame frame;
  // Half the largest |x| to 1, but within what float32 holds as a normal number.
  if (reach > 0) frame.scale = std::ldexp(1.0f, std::clamp(-std::ilogb(reach) - 1, -126, 126));
  frame.centre.resize(D);
  for (int64_t d = 0; d < D; ++d)
    frame.centre[d] = static_cast<float>(mean[d] / static_cast<double>(std::max<int64_t>(n_sampled, 1)) * frame.scale);
  double steps = static_cast<double>(D + 8) * 0x1p-24;
  frame.kappa = steps / (1 - steps);
  frame.eta = static_cast<double>(D + 8) * 0x1p-118;
  return frame;
}

double pack_row(const Frame& frame, const float* row, float* out, int64_t stride) {
  if (!place(frame, row, out, stride)) return INF;
  const int64_t D = static_cast<int64_t>(frame.centre.size());
  double norm2 = 0;
  for (int64_t d = 0; d < D; ++d) norm2 += static_cast<double>(out[d * stride]) * out[d * stride];
  return norm2;
}

void pack_panel(const Frame& frame, const float* points, int64_t N, int64_t i_panel, float* panel, double* norm2) {
  const int64_t D = static_cast<int64_t>(frame.centre.size());
  bool is_point[TILE_COLS] = {};
  for (int64_t c = 0; c < TILE_COLS; ++c) {
    int64_t i = i_panel * TILE_COLS + c;
    if (i < N) {
      is_point[c] = place(frame, points + i * D, panel + c, TILE_COLS);
    } else {
      for (int64_t d = 0; d < D; ++d) panel[d * TILE_COLS + c] = 0;
    }
  }
  panel_norm2(panel, D, norm2);
  for (int64_t c = 0; c < TILE_COLS; ++c)
    if (!is_point[c]) norm2[c] = INF;
}

}  // namespace clmfast
