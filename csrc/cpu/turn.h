// A turn: the few directions in which points differ most, by which the grid tells them apart.
#pragma once

#include <cstdint>
#include <vector>

namespace clmfast {

// Rows [n, K] side by side for dot_tile, `side` together (TILE_ROWS on its left, TILE_COLS on its right); places beyond
// n are zeros.
std::vector<float> interleaved(const float* rows, int64_t n, int64_t K, int64_t side);

// Directions that hold most of the sample [n, D], whose mean is 0: the span of some of its rows, drawn by one step of
// the power iteration towards that of the first principal components. `projected` is the sample in them, transposed.
// False if there are none that hold enough.
//   rows [TURNED, D]: |rows z| <= |z| for every z
bool find_turn(const std::vector<float>& sample, int64_t D, std::vector<float>& rows, std::vector<float>& projected);

}  // namespace clmfast
