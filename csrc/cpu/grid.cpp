#include "grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "pair.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t LANES = 16;

// The largest cell: it fits a byte, and a squared distance an int32.
double reach_of(int64_t D) { return std::min(127.0, std::floor(std::sqrt(0x1p29 / static_cast<double>(D)))); }

// Writes the cells of a row [D] (and zeros up to whole lanes), and returns the sum of (y - cell)^2.
CLMFAST_BODY double move_row_body(const float* row, const float* centre, double unit, double reach, int64_t D,
                                  int8_t* cells) {
  constexpr double WHOLE = 0x1.8p52;  // adding it leaves no digits behind the point
  double lane[LANES] = {};
  for (int64_t d = 0; d < D; d += LANES) {
    float x[LANES] = {}, c[LANES] = {};
    const int64_t n = std::min(LANES, D - d);
    if (n == LANES) {
      std::memcpy(x, row + d, sizeof x);
      std::memcpy(c, centre + d, sizeof c);
    } else {
      std::memcpy(x, row + d, n * sizeof(float));
      std::memcpy(c, centre + d, n * sizeof(float));
    }
    for (int64_t l = 0; l < LANES; ++l) {
      double y = x[l] * unit - c[l];
      double cell = y < -reach ? -reach : y;
      cell = cell > reach ? reach : cell;
      cell = (cell + WHOLE) - WHOLE;
      lane[l] += (y - cell) * (y - cell);
      cells[d + l] = static_cast<int8_t>(static_cast<int32_t>(cell));
    }
  }
  double sum = 0;
  for (double x : lane) sum += x;
  return sum;
}

CLMFAST_PER_ISA(double, move_row,
                (const float* row, const float* centre, double unit, double reach, int64_t D, int8_t* cells),
                (row, centre, unit, reach, D, cells))

// At least the distance from the cell to the point, given the sum of squares: the arithmetic of y loses less than 2^-8
// where the point is near the grid, and less than 2^-20 of the whole where it is far off.
float rest_of(double squares) { return static_cast<float>(std::sqrt(squares) * (1 + 0x1p-20) + 0x1p-8); }

struct Moved {
  std::vector<int8_t> cells;
  float rest;
  int32_t norm2 = 0, sum = 0;

  Moved(const Grid& grid, int64_t s, const float* row) : cells((grid.D + LANES - 1) / LANES * LANES) {
    if (!is_finite_row(row, grid.D)) {
      rest = -INF;
      return;
    }
    rest = rest_of(move_row(row, grid.centre + s * grid.D, grid.unit[s], reach_of(grid.D), grid.D, cells.data()));
    for (int8_t cell : cells) norm2 += cell * cell, sum += cell;
  }
};

// Writes the centre, returns the unit. The farthest coordinate of the sample lands at the reach.
double make_grid(const float* points, int64_t n, int64_t D, float* centre) {
  constexpr int64_t SAMPLE = 256;
  const int64_t stride = std::max<int64_t>((n + SAMPLE - 1) / SAMPLE, 1);
  std::vector<double> mean(D);
  std::vector<const float*> sample;
  double largest = 0, farthest = 0;
  for (int64_t i = 0; i < n; i += stride) {
    const float* row = points + i * D;
    const float row_reaches = row_reach(row, D);
    if (!(row_reaches < INF)) continue;
    sample.push_back(row);
    largest = std::max<double>(largest, row_reaches);
    for (int64_t d = 0; d < D; ++d) mean[d] += row[d];
  }
  for (double& x : mean) x /= static_cast<double>(std::max<size_t>(sample.size(), 1));
  for (const float* row : sample)
    for (int64_t d = 0; d < D; ++d) farthest = std::max(farthest, std::abs(row[d] - mean[d]));
  // Differences that float32 cannot hold, or are below its normal numbers, need no steps of their own.
  const double unit = reach_of(D) / std::max({farthest, largest * 0x1p-24, 0x1p-120});
  for (int64_t d = 0; d < D; ++d) centre[d] = static_cast<float>(mean[d] * unit);
  return unit;
}

// ---- squared distances of cells: out[r][c] = start[r] + norm2[c] - 2 sum_d rows[r][d] panel[c][d]
// As the panel's bytes are cell + 128, the sum is 128 sum_d cell_r[d] too large; `start` has |cell_r|^2 and makes up for
// it. Intermediate sums may wrap around, the result does not.

#define CLMFAST_DIST2_PARAMETERS                                                                              \
  (const int8_t* rows, int64_t n_rows, const int32_t* start, const uint8_t* panel, const int32_t* norm2, int64_t depth, \
   int32_t* out)
#define CLMFAST_DIST2_ARGUMENTS (rows, n_rows, start, panel, norm2, depth, out)

void dist2_baseline CLMFAST_DIST2_PARAMETERS {
  for (int64_t r = 0; r < n_rows; ++r) {
    uint32_t sum[TILE_COLS] = {};
    for (int64_t g = 0; g < depth; ++g) {
      const int8_t* row = rows + (g * TILE_ROWS + r) * BYTES;
      const uint8_t* column = panel + g * TILE_COLS * BYTES;
      for (int64_t c = 0; c < TILE_COLS; ++c)
        for (int64_t b = 0; b < BYTES; ++b) sum[c] += static_cast<uint32_t>(row[b] * column[c * BYTES + b]);
    }
    for (int64_t c = 0; c < TILE_COLS; ++c)
      out[r * TILE_COLS + c] =
          static_cast<int32_t>(static_cast<uint32_t>(start[r]) + static_cast<uint32_t>(norm2[c]) - 2 * sum[c]);
  }
}

#if defined(__x86_64__)

// Products of 16 bits, two to a lane: the even bytes of each lane, then the odd ones.
__attribute__((target("avx2"))) void dist2_avx2 CLMFAST_DIST2_PARAMETERS {
  constexpr int C = TILE_COLS / 8;
  const __m256i even = _mm256_set1_epi32(0x00ff00ff);
  for (int64_t r = 0; r < n_rows; ++r) {
    __m256i sum[C];
    for (int c = 0; c < C; ++c) sum[c] = _mm256_setzero_si256();
    for (int64_t g = 0; g < depth; ++g) {
      int32_t four;
      std::memcpy(&four, rows + (g * TILE_ROWS + r) * BYTES, sizeof four);
      const __m256i row = _mm256_set1_epi32(four);
      const __m256i row_even = _mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8), row_odd = _mm256_srai_epi16(row, 8);
      for (int c = 0; c < C; ++c) {
        const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + (g * TILE_COLS + c * 8) * BYTES));
        sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(_mm256_and_si256(p, even), row_even));
        sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(_mm256_srli_epi16(p, 8), row_odd));
      }
    }
    for (int c = 0; c < C; ++c) {
      const __m256i both = _mm256_add_epi32(
          _mm256_set1_epi32(start[r]), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(norm2 + c * 8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * TILE_COLS + c * 8),
                          _mm256_sub_epi32(_mm256_sub_epi32(both, sum[c]), sum[c]));
    }
  }
}

template <int R>
__attribute__((target("avx512f,avx512vnni"))) void dist2_vnni_rows(const int8_t* rows, const int32_t* start, const uint8_t* panel,
                                                                      const int32_t* norm2, int64_t depth, int32_t* out) {
  constexpr int C = TILE_COLS / 16;
  __m512i sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_si512();
  for (int64_t g = 0; g < depth; ++g) {
    __m512i p[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) p[c] = _mm512_loadu_si512(panel + (g * TILE_COLS + c * 16) * BYTES);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      typedef int32_t Four __attribute__((may_alias, aligned(1)));
      const Four& row = *reinterpret_cast<const Four*>(rows + (g * TILE_ROWS + r) * BYTES);
      // With the intrinsic, GCC 12 copies every sum before and after.
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        __m512i x = sum[r][c];
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(x) : "v"(p[c]), "m"(row));
        sum[r][c] = x;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512i both = _mm512_add_epi32(_mm512_set1_epi32(start[r]), _mm512_loadu_si512(norm2 + c * 16));
      _mm512_storeu_si512(out + r * TILE_COLS + c * 16, _mm512_sub_epi32(_mm512_sub_epi32(both, sum[r][c]), sum[r][c]));
    }
  }
}

void dist2_vnni CLMFAST_DIST2_PARAMETERS {
  if (n_rows > 8) return dist2_vnni_rows<12>(rows, start, panel, norm2, depth, out);
  if (n_rows > 4) return dist2_vnni_rows<8>(rows, start, panel, norm2, depth, out);
  dist2_vnni_rows<4>(rows, start, panel, norm2, depth, out);
}

#else

constexpr auto dist2_avx2 = dist2_baseline, dist2_vnni = dist2_baseline;

#endif

void cell_dist2 CLMFAST_DIST2_PARAMETERS {
  static const auto once = isa() >= Isa::avx512vnni ? dist2_vnni : pick(dist2_baseline, dist2_avx2, dist2_avx2);
  once CLMFAST_DIST2_ARGUMENTS;
}

CLMFAST_BODY void screen_body(const int32_t* tile, int64_t n_rows, const float* row_limit, const float* column_limit,
                              uint32_t* passed) {
  for (int64_t r = 0; r < n_rows; ++r) {
    uint32_t bits = 0;
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      float limit = row_limit[r] + column_limit[c];
      limit = limit > 0 ? limit : 0;  // also where it is NaN: who has no limit and who is no point
      bits |= static_cast<uint32_t>(static_cast<float>(tile[r * TILE_COLS + c]) < limit * limit) << c;
    }
    passed[r] = bits;
  }
}

}  // namespace

CLMFAST_PER_ISA(void, screen,
                (const int32_t* tile, int64_t n_rows, const float* row_limit, const float* column_limit,
                 uint32_t* passed),
                (tile, n_rows, row_limit, column_limit, passed))

GridMemory::GridMemory(int64_t S, int64_t N, int64_t D)
    : Grid{S, N, D, nullptr, nullptr, nullptr, nullptr, nullptr},
      floats_(new float[S * (D + n_panels(N) * PANEL)]),
      doubles_(new double[S]),
      integers_(new int32_t[S * n_panels(N) * PANEL]),
      bytes_(new uint8_t[S * n_panels(N) * grid_depth(D) * PANEL * BYTES]) {
  centre = floats_.get();
  rest = centre + S * D;
  unit = doubles_.get();
  norm2 = integers_.get();
  cells = bytes_.get();
}

void make_grids(const Grid& grid, const float* points, int64_t n, ParallelFor parallel_for) {
  for_each(parallel_for, grid.S, [&](int64_t s) {
    grid.unit[s] = make_grid(points + s * grid.N * grid.D, n, grid.D, grid.centre + s * grid.D);
  });
}

void move_to_grid(const Grid& grid, const float* points, int64_t n, int64_t first, int64_t count,
                  ParallelFor parallel_for) {
  const int64_t N = grid.N, D = grid.D, depth = grid_depth(D);
  const std::vector<int64_t> chosen = panels_of(N, first, count);
  const int64_t n_chosen = static_cast<int64_t>(chosen.size());
  for_each(parallel_for, grid.S * n_chosen, [&](int64_t task) {
    const int64_t s = task / n_chosen, i_panel = chosen[task % n_chosen];
    uint8_t* panel = grid.panel(s, i_panel);
    std::memset(panel, 128, depth * PANEL * BYTES);
    for (int64_t c = 0; c < PANEL; ++c) {
      const int64_t i = i_panel * PANEL + c;
      grid.norm2_of(s)[i] = 0;
      grid.rest_of(s)[i] = -INF;
      if (i >= n) continue;
      const Moved moved(grid, s, points + (s * N + i) * D);
      grid.norm2_of(s)[i] = moved.norm2;
      grid.rest_of(s)[i] = moved.rest;
      for (int64_t g = 0; g < depth; ++g) {
        uint32_t four;
        std::memcpy(&four, &moved.cells[g * BYTES], sizeof four);
        four ^= 0x80808080;  // adds 128 to each
        std::memcpy(panel + (g * PANEL + c) * BYTES, &four, sizeof four);
      }
    }
  });
}

void GridRows::add(const float* row) {
  const int64_t i = size(), group = i / TILE_ROWS, depth = grid_depth(grid_.D);
  if (i % TILE_ROWS == 0) {
    cells_.resize((group + 1) * depth * TILE_ROWS * BYTES);
    start_.resize((group + 1) * TILE_ROWS);
  }
  const Moved moved(grid_, s_, row);
  for (int64_t g = 0; g < depth; ++g)
    std::memcpy(&cells_[((group * depth + g) * TILE_ROWS + i % TILE_ROWS) * BYTES], &moved.cells[g * BYTES], BYTES);
  start_[i] = static_cast<int32_t>(static_cast<uint32_t>(moved.norm2) + 256 * static_cast<uint32_t>(moved.sum));
  rest_.push_back(moved.rest);
}

void GridRows::dist2(int64_t group, const Grid& other, int64_t i_panel, int32_t* tile) const {
  const int64_t depth = grid_depth(grid_.D);
  cell_dist2(&cells_[group * depth * TILE_ROWS * BYTES], n_rows(group), &start_[group * TILE_ROWS],
             other.panel(s_, i_panel), other.norm2_of(s_) + i_panel * PANEL, depth, tile);
}

}  // namespace clmfast
