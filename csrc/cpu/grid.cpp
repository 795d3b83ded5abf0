#include "grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "pair.h"
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// The largest cell: it fits 16 bits, and a squared distance an int32.
double reach_of(int64_t D) { return std::floor(std::sqrt(0x1p29 / static_cast<double>(D))); }

// Writes the cells of a row [D] (and zeros up to whole lanes), and returns the sum of (y - cell)^2.
CLMFAST_BODY double move_row_body(const float* row, const float* centre, double unit, double reach, int64_t D,
                                  int16_t* cells) {
  constexpr double WHOLE = 0x1.8p52;  // adding it leaves no digits behind the point
  double lane[LANES] = {};
  for (int64_t d = 0; d < D; d += LANES) {
    float x[LANES] = {}, c[LANES] = {};
    const int64_t n = std::min(LANES, D - d);
    copy<LANES>(row + d, n, x);
    copy<LANES>(centre + d, n, c);
    for (int64_t l = 0; l < LANES; ++l) {
      double y = x[l] * unit - c[l];
      double cell = y < -reach ? -reach : y;
      cell = cell > reach ? reach : cell;
      cell = (cell + WHOLE) - WHOLE;
      lane[l] += (y - cell) * (y - cell);
      cells[d + l] = static_cast<int16_t>(static_cast<int32_t>(cell));
    }
  }
  double sum = 0;
  for (double x : lane) sum += x;
  return sum;
}

CLMFAST_PER_ISA(double, move_row,
                (const float* row, const float* centre, double unit, double reach, int64_t D, int16_t* cells),
                (row, centre, unit, reach, D, cells))

// At least the distance from the cell to the point, given the sum of squares: the arithmetic of y loses less than 2^-8
// where the point is near the grid, and less than 2^-20 of the whole where it is far off.
float rest_of(double squares) { return static_cast<float>(std::sqrt(squares) * (1 + 0x1p-20) + 0x1p-8); }

struct Moved {
  std::vector<int16_t> cells;
  float rest;
  int32_t norm2 = 0;

  Moved(const Grid& grid, int64_t s, const float* row) : cells((grid.D + LANES - 1) / LANES * LANES) {
    if (!is_finite_row(row, grid.D)) {
      rest = -INF;
      return;
    }
    rest = rest_of(move_row(row, grid.centre + s * grid.D, grid.unit[s], reach_of(grid.D), grid.D, cells.data()));
    for (int16_t cell : cells) norm2 += cell * cell;
  }
};

// The sum of (y - cell)^2 that a grid of `reach` steps of size `step` leaves, on average over where its cells lie, of
// coordinates at distance x from the centre.
CLMFAST_BODY float squared_rests_body(const float* x, int64_t n, float step, float reach) {
  float lane[LANES] = {};
  const float end = step * reach, within = step * step / 12;
  for (int64_t i = 0; i + LANES <= n; i += LANES) {
    for (int64_t l = 0; l < LANES; ++l) {
      const float beyond = x[i + l] - end, outside = beyond * beyond + within;
      lane[l] += beyond > 0 ? outside : within;
    }
  }
  float sum = 0;
  for (float part : lane) sum += part;
  return sum;
}

CLMFAST_PER_ISA(float, squared_rests, (const float* x, int64_t n, float step, float reach), (x, n, step, reach))

// Writes the centre, returns the unit: the one of a few that leaves least rest. Few coordinates beyond the reach cost
// less than coarser steps for all.
double make_grid(const float* points, int64_t n, int64_t D, float* centre) {
  constexpr int64_t SAMPLE = 256;
  const int64_t stride = std::max<int64_t>((n + SAMPLE - 1) / SAMPLE, 1);
  std::vector<double> mean(D);
  std::vector<const float*> sample;
  double largest = 0;
  for (int64_t i = 0; i < n; i += stride) {
    const float* row = points + i * D;
    const float row_reaches = row_reach(row, D);
    if (!(row_reaches < INF)) continue;
    sample.push_back(row);
    largest = std::max<double>(largest, row_reaches);
    for (int64_t d = 0; d < D; ++d) mean[d] += row[d];
  }
  for (double& x : mean) x /= static_cast<double>(std::max<size_t>(sample.size(), 1));
  // The distances of coordinates from the centre, of which the largest becomes 1. Differences that float32 cannot hold,
  // or are below its normal numbers, need no steps of their own.
  double farthest = std::max(largest * 0x1p-24, 0x1p-120);
  for (const float* row : sample)
    for (int64_t d = 0; d < D; ++d) farthest = std::max(farthest, std::abs(row[d] - mean[d]));
  std::vector<float> distance;
  for (size_t i = 0; i < sample.size(); i += 8)
    for (int64_t d = 0; d < D; ++d) distance.push_back(static_cast<float>(std::abs(sample[i][d] - mean[d]) / farthest));
  distance.resize((distance.size() + LANES - 1) / LANES * LANES);
  const float reach = static_cast<float>(reach_of(D));
  double least = std::numeric_limits<double>::infinity(), best = 1;
  for (float end : {1.0f, 0.85f, 0.7f, 0.6f, 0.5f, 0.4f, 0.3f}) {
    const double rests = squared_rests(distance.data(), static_cast<int64_t>(distance.size()), end / reach, reach);
    if (rests < least) least = rests, best = end;
  }
  const double unit = reach / (best * farthest);
  for (int64_t d = 0; d < D; ++d) centre[d] = static_cast<float>(mean[d] * unit);
  return unit;
}

// ---- squared distances of cells: out[r][c] = row_norm2[r] + norm2[c] - 2 sum_d rows[r][d] panel[c][d]

#define CLMFAST_DIST2_PARAMETERS                                                                                    \
  (const int16_t* rows, int64_t n_rows, const int32_t* row_norm2, const int16_t* panel, const int32_t* norm2, int64_t depth, \
   int32_t* out)
#define CLMFAST_DIST2_ARGUMENTS (rows, n_rows, row_norm2, panel, norm2, depth, out)

void dist2_baseline CLMFAST_DIST2_PARAMETERS {
  for (int64_t r = 0; r < n_rows; ++r) {
    int32_t sum[TILE_COLS] = {};
    for (int64_t g = 0; g < depth; ++g) {
      const int16_t* row = rows + (g * TILE_ROWS + r) * PAIR;
      const int16_t* column = panel + g * TILE_COLS * PAIR;
      for (int64_t c = 0; c < TILE_COLS; ++c) sum[c] += row[0] * column[c * PAIR] + row[1] * column[c * PAIR + 1];
    }
    for (int64_t c = 0; c < TILE_COLS; ++c) out[r * TILE_COLS + c] = (row_norm2[r] - sum[c]) + (norm2[c] - sum[c]);
  }
}

#if defined(__x86_64__)

using Two = int32_t __attribute__((may_alias, aligned(2)));  // a PAIR

// R rows, so many that the sums stay in registers.
template <int R>
__attribute__((target("avx2"))) void dist2_avx2_rows(const int16_t* rows, const int32_t* row_norm2,
                                                     const int16_t* panel, const int32_t* norm2, int64_t depth,
                                                     int32_t* out) {
  constexpr int C = TILE_COLS / 8;
  __m256i sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_si256();
  for (int64_t g = 0; g < depth; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256i row = _mm256_set1_epi32(*reinterpret_cast<const Two*>(rows + (g * TILE_ROWS + r) * PAIR));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + (g * TILE_COLS + c * 8) * PAIR));
        sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(p, row));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m256i of_column = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(norm2 + c * 8));
      const __m256i x = _mm256_add_epi32(_mm256_sub_epi32(_mm256_set1_epi32(row_norm2[r]), sum[r][c]),
                                         _mm256_sub_epi32(of_column, sum[r][c]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * TILE_COLS + c * 8), x);
    }
  }
}

void dist2_avx2 CLMFAST_DIST2_PARAMETERS {
  for (int64_t r = 0; r < n_rows; r += 2)
    dist2_avx2_rows<2>(rows + r * PAIR, row_norm2 + r, panel, norm2, depth, out + r * TILE_COLS);
}

template <int R>
__attribute__((target("avx512f,avx512vnni"))) void dist2_vnni_rows(const int16_t* rows, const int32_t* row_norm2,
                                                                   const int16_t* panel, const int32_t* norm2,
                                                                   int64_t depth, int32_t* out) {
  constexpr int C = TILE_COLS / 16;
  __m512i sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_si512();
  for (int64_t g = 0; g < depth; ++g) {
    __m512i p[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) p[c] = _mm512_loadu_si512(panel + (g * TILE_COLS + c * 16) * PAIR);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i row = _mm512_set1_epi32(*reinterpret_cast<const Two*>(rows + (g * TILE_ROWS + r) * PAIR));
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        __m512i x = sum[r][c];  // with the intrinsic, GCC 12 copies every sum before and after
        asm("vpdpwssd %2, %1, %0" : "+v"(x) : "v"(p[c]), "v"(row));
        sum[r][c] = x;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512i of_column = _mm512_loadu_si512(norm2 + c * 16);
      const __m512i x = _mm512_add_epi32(_mm512_sub_epi32(_mm512_set1_epi32(row_norm2[r]), sum[r][c]),
                                         _mm512_sub_epi32(of_column, sum[r][c]));
      _mm512_storeu_si512(out + r * TILE_COLS + c * 16, x);
    }
  }
}

void dist2_vnni CLMFAST_DIST2_PARAMETERS {
  if (n_rows > 8) return dist2_vnni_rows<12>(rows, row_norm2, panel, norm2, depth, out);
  if (n_rows > 4) return dist2_vnni_rows<8>(rows, row_norm2, panel, norm2, depth, out);
  dist2_vnni_rows<4>(rows, row_norm2, panel, norm2, depth, out);
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
      cells_(new int16_t[S * n_panels(N) * grid_depth(D) * PANEL * PAIR]) {
  centre = floats_.get();
  rest = centre + S * D;
  unit = doubles_.get();
  norm2 = integers_.get();
  cells = cells_.get();
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
    int16_t* panel = grid.panel(s, i_panel);
    std::memset(panel, 0, depth * PANEL * PAIR * sizeof *panel);
    for (int64_t c = 0; c < PANEL; ++c) {
      const int64_t i = i_panel * PANEL + c;
      grid.norm2_of(s)[i] = 0;
      grid.rest_of(s)[i] = -INF;
      if (i >= n) continue;
      const Moved moved(grid, s, points + (s * N + i) * D);
      grid.norm2_of(s)[i] = moved.norm2;
      grid.rest_of(s)[i] = moved.rest;
      for (int64_t g = 0; g < depth; ++g)
        std::memcpy(panel + (g * PANEL + c) * PAIR, &moved.cells[g * PAIR], PAIR * sizeof *panel);
    }
  });
}

void GridRows::add(const float* row) {
  const int64_t i = size(), group = i / TILE_ROWS, depth = grid_depth(grid_.D);
  if (i % TILE_ROWS == 0) {
    cells_.resize((group + 1) * depth * TILE_ROWS * PAIR);
    norm2_.resize((group + 1) * TILE_ROWS);
  }
  const Moved moved(grid_, s_, row);
  for (int64_t g = 0; g < depth; ++g)
    std::memcpy(&cells_[((group * depth + g) * TILE_ROWS + i % TILE_ROWS) * PAIR], &moved.cells[g * PAIR],
                PAIR * sizeof cells_[0]);
  norm2_[i] = moved.norm2;
  rest_.push_back(moved.rest);
}

void GridRows::dist2(int64_t group, const Grid& other, int64_t i_panel, int32_t* tile) const {
  const int64_t depth = grid_depth(grid_.D);
  cell_dist2(&cells_[group * depth * TILE_ROWS * PAIR], n_rows(group), &norm2_[group * TILE_ROWS],
             other.panel(s_, i_panel), other.norm2_of(s_) + i_panel * PANEL, depth, tile);
}

}  // namespace clmfast
