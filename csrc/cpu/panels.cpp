#include "panels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

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
  for (int64_t c = 0; c < PANEL; ++c) norm2[c] = 0;
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t c = 0; c < PANEL; ++c) {
      double x = panel[d * PANEL + c];
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
  bool is_finite = is_finite_row(row, frame.D);
  if (is_finite) {
    place_row(row, frame.centre, frame.scale, frame.D, out, stride);
  } else {
    for (int64_t d = 0; d < frame.D; ++d) out[d * stride] = 0;
  }
  return is_finite;
}

// Writes the centre, returns the scale.
float make_frame(const float* points, int64_t n, const float* others, int64_t m, int64_t D, float* centre) {
  constexpr int64_t SAMPLE = 256;  // rows that the centre is the mean of: near enough to the mean of all
  std::vector<double> mean(D);
  int64_t n_sampled = 0;
  float reach = 0;
  for (int64_t i = 0; i < n + m; ++i) {
    const float* row = i < n ? points + i * D : others + (i - n) * D;
    float row_reaches = row_reach(row, D);
    if (!(row_reaches < INF)) continue;
    reach = std::max(reach, row_reaches);
    if (i >= n || i % ((n + SAMPLE - 1) / SAMPLE) != 0) continue;
    ++n_sampled;
    for (int64_t d = 0; d < D; ++d) mean[d] += row[d];
  }
  // Half the largest |x| to 1, but within what float32 holds as a normal number.
  float scale = reach > 0 ? std::ldexp(1.0f, std::clamp(-std::ilogb(reach) - 1, -126, 126)) : 1;
  for (int64_t d = 0; d < D; ++d)
    centre[d] = static_cast<float>(mean[d] / static_cast<double>(std::max<int64_t>(n_sampled, 1)) * scale);
  return scale;
}

}  // namespace

Frame frame_of(const Packed& packed, int64_t s) {
  const double D = static_cast<double>(packed.D), steps = (D + 8) * 0x1p-24;
  return {packed.centre + s * packed.D, packed.D, packed.scale[s], steps / (1 - steps), (D + 8) * 0x1p-118};
}

PackedMemory::PackedMemory(int64_t S, int64_t N, int64_t D)
    : Packed{S, N, D, nullptr, nullptr, nullptr, nullptr},
      floats_(new float[S * (D + 1 + n_panels(N) * D * PANEL)]),
      doubles_(new double[S * n_panels(N) * PANEL]) {
  panels = floats_.get();  // first, where the alignment is best
  centre = panels + S * n_panels(N) * D * PANEL;
  scale = centre + S * D;
  norm2 = doubles_.get();
}

bool suits(const Packed& packed, int64_t s, const float* row) {
  float reach = row_reach(row, packed.D);
  return !(reach < INF) || reach * packed.scale[s] <= 4;  // as the centre is at most 1, coordinates are at most 8
}

void make_frames(const Packed& packed, const float* points, int64_t n, const float* others, int64_t M, int64_t m,
                 ParallelFor parallel_for) {
  const int64_t N = packed.N, D = packed.D;
  for_each(parallel_for, packed.S, [&](int64_t s) {
    packed.scale[s] = make_frame(points + s * N * D, n, others + s * M * D, m, D, packed.centre + s * D);
  });
}

void pack_rows(const Packed& packed, const float* points, int64_t n, int64_t first, int64_t count,
               ParallelFor parallel_for) {
  const int64_t N = packed.N, D = packed.D;
  const std::vector<int64_t> chosen = panels_of(N, first, count);
  const int64_t n_chosen = static_cast<int64_t>(chosen.size());
  for_each(parallel_for, packed.S * n_chosen, [&](int64_t task) {
    const int64_t s = task / n_chosen, i_panel = chosen[task % n_chosen];
    int64_t row[PANEL];
    std::iota(row, row + PANEL, i_panel * PANEL);
    pack_panel(frame_of(packed, s), points + s * N * D, row, std::clamp<int64_t>(n - row[0], 0, PANEL),
               packed.panel(s, i_panel), packed.norm2_of(s) + i_panel * PANEL);
  });
}

void pack_panel(const Frame& frame, const float* points, const int64_t* row, int64_t n, float* panel, double* norm2) {
  bool is_point[PANEL] = {};
  for (int64_t c = 0; c < n; ++c) is_point[c] = place(frame, points + row[c] * frame.D, panel + c, PANEL);
  for (int64_t d = 0; d < frame.D; ++d)
    for (int64_t c = n; c < PANEL; ++c) panel[d * PANEL + c] = 0;
  panel_norm2(panel, frame.D, norm2);
  for (int64_t c = 0; c < PANEL; ++c)
    if (!is_point[c]) norm2[c] = INF;
}

double pack_row(const Frame& frame, const float* row, float* out, int64_t stride) {
  if (!place(frame, row, out, stride)) return INF;
  double norm2 = 0;
  for (int64_t d = 0; d < frame.D; ++d) norm2 += static_cast<double>(out[d * stride]) * out[d * stride];
  return norm2;
}

void low_norm2(const Frame& frame, const double* norm2, float* out) {
  for (int64_t c = 0; c < PANEL; ++c) out[c] = static_cast<float>((1 - frame.kappa) * norm2[c]);
}

}  // namespace clmfast
