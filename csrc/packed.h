// Point sets made ready for screening: scaled, centred and interleaved in panels. cpu/panels.h says how, and why a
// result never depends on it.
//
// A view: the memory is its maker's, and may outlive a call, so that only rows that change are packed again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace clmfast {

constexpr int64_t PANEL = 32;  // points side by side

constexpr int64_t n_panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

// Those panels of N points that hold one of the `count` from `first` on, round and round.
inline std::vector<int64_t> panels_of(int64_t N, int64_t first, int64_t count) {
  std::vector<int64_t> chosen;
  for (int64_t i_panel = 0; i_panel < n_panels(N); ++i_panel) {
    bool has_any = false;
    for (int64_t i = i_panel * PANEL; i < std::min(N, (i_panel + 1) * PANEL); ++i)
      has_any |= (i - first + N) % N < count;
    if (has_any) chosen.push_back(i_panel);
  }
  return chosen;
}

struct Packed {
  int64_t S, N, D;
  float* centre;  // [S, D], of each set's frame
  float* scale;   // [S]
  float* panels;  // [S, n_panels(N), D, PANEL]
  double* norm2;  // [S, n_panels(N) * PANEL]: squared norms in the frame; infinity where there is no finite point

  float* panel(int64_t s, int64_t i_panel) const { return panels + (s * n_panels(N) + i_panel) * D * PANEL; }
  double* norm2_of(int64_t s) const { return norm2 + s * n_panels(N) * PANEL; }
};

}  // namespace clmfast
