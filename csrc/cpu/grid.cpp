#include "grid.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "pair.h"
#include "tile.h"
#include "turn.h"
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t SAMPLE = 256;  // points that a grid is chosen by
static_assert(TURNED % TILE_ROWS == 0 && TURNED % PAIR == 0, "whole tiles and pairs");

// The largest cell: it fits 16 bits, and a squared distance an int32 with room to spare.
double reach_of(int64_t n_coordinates) {
  return std::floor(std::sqrt(0x1p28 / static_cast<double>(std::max<int64_t>(n_coordinates, 1))));
}

// ---- the choice

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

// The step that leaves least rest of coordinates at these distances from the centre, of which the largest is 1. Few
// coordinates beyond the reach cost less than coarser steps for all.
double best_step(std::vector<float>& distance, int64_t n_coordinates) {
  distance.resize((distance.size() + LANES - 1) / LANES * LANES);
  const float reach = static_cast<float>(reach_of(n_coordinates));
  double least = std::numeric_limits<double>::infinity(), best = 1;
  for (float end : {1.0f, 0.85f, 0.7f, 0.6f, 0.5f, 0.4f, 0.3f}) {
    const double rests = squared_rests(distance.data(), static_cast<int64_t>(distance.size()), end / reach, reach);
    if (rests < least) least = rests, best = end;
  }
  return best / reach;
}

void choose(const Grid& grid, int64_t s, const float* points, int64_t n) {
  const int64_t D = grid.D, stride = std::max<int64_t>((n + SAMPLE - 1) / SAMPLE, 1);
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
  // Differences from the centre, of which the largest becomes 1. What float32 cannot hold, or is below its normal
  // numbers, needs no steps of its own.
  double farthest = std::max(largest * 0x1p-24, 0x1p-120);
  for (const float* row : sample)
    for (int64_t d = 0; d < D; ++d) farthest = std::max(farthest, std::abs(row[d] - mean[d]));
  std::vector<float> centred(sample.size() * D), turn, distance;
  for (size_t i = 0; i < sample.size(); ++i)
    for (int64_t d = 0; d < D; ++d) centred[i * D + d] = static_cast<float>((sample[i][d] - mean[d]) / farthest);
  double widest = 1;
  if (find_turn(centred, D, turn, distance)) {
    grid.n_turned[s] = TURNED;
    const std::vector<float> tiles = interleaved(turn.data(), TURNED, D, TILE_ROWS);
    std::copy(tiles.begin(), tiles.end(), grid.turn + s * TURNED * D);
    widest = 0x1p-60;
    for (float& x : distance) widest = std::max<double>(widest, x = std::abs(x));
    for (float& x : distance) x /= static_cast<float>(widest);
  } else {
    grid.n_turned[s] = 0;
    distance.clear();
    for (size_t i = 0; i < sample.size(); i += 8)
      for (int64_t d = 0; d < D; ++d) distance.push_back(std::abs(centred[i * D + d]));
  }
  grid.unit[s] = 1 / (best_step(distance, grid.n_coordinates(s)) * widest * farthest);
  for (int64_t d = 0; d < D; ++d) grid.centre[s * D + d] = static_cast<float>(mean[d] * grid.unit[s]);
  grid.wasted[2 * s] = -1;
  grid.wasted[2 * s + 1] = 0;
}

// ---- the move

// z[d, c] = unit row[d] - centre[d] for one column c of a panel; returns |z|^2.
CLMFAST_BODY float place_body(const float* row, const float* centre, double unit, int64_t D, float* z) {
  float lane[LANES] = {};
  for (int64_t first = 0; first < D; first += LANES) {
    const int64_t n = std::min(LANES, D - first);
    float part[LANES] = {};
    if (n == LANES) {
      for (int64_t l = 0; l < LANES; ++l) part[l] = static_cast<float>(row[first + l] * unit - centre[first + l]);
    } else {
      for (int64_t l = 0; l < n; ++l) part[l] = static_cast<float>(row[first + l] * unit - centre[first + l]);
    }
    for (int64_t l = 0; l < LANES; ++l) lane[l] += part[l] * part[l];
    for (int64_t l = 0; l < n; ++l) z[(first + l) * PANEL] = part[l];
  }
  float sum = 0;
  for (float part : lane) sum += part;
  return sum;
}

// The cells of y [M, PANEL], their squared norms, and the sums of (y - cell)^2.
CLMFAST_BODY void to_cells_body(const float* y, int64_t M, float reach, int16_t* cells, int32_t* norm2, float* rest2) {
  constexpr float WHOLE = 0x1.8p23f;  // adding it leaves no digits behind the point
  for (int64_t c = 0; c < PANEL; ++c) norm2[c] = 0, rest2[c] = 0;
  for (int64_t m = 0; m < M; m += PAIR) {
    int16_t* to = cells + m * PANEL;
    for (int64_t c = 0; c < PANEL; ++c) {
      int32_t pair[PAIR] = {};
      for (int64_t e = 0; e < PAIR; ++e) {
        const float at = m + e < M ? y[(m + e) * PANEL + c] : 0;
        float cell = at > -reach ? at : -reach;  // also where it is NaN
        cell = cell < reach ? cell : reach;
        cell = (cell + WHOLE) - WHOLE;
        rest2[c] += (at - cell) * (at - cell);
        pair[e] = static_cast<int32_t>(cell);
        norm2[c] += pair[e] * pair[e];
      }
      to[c * PAIR] = static_cast<int16_t>(pair[0]);
      to[c * PAIR + 1] = static_cast<int16_t>(pair[1]);
    }
  }
}

CLMFAST_PER_ISA(float, place, (const float* row, const float* centre, double unit, int64_t D, float* z),
                (row, centre, unit, D, z))
CLMFAST_PER_ISA(void, to_cells,
                (const float* y, int64_t M, float reach, int16_t* cells, int32_t* norm2, float* rest2),
                (y, M, reach, cells, norm2, rest2))

// Moves one panel of points, of which those from n on are none. z [D, PANEL] and y [TURNED, PANEL] are scratch.
void move_panel(const Grid& grid, int64_t s, const float* points, int64_t n, int64_t i_panel, float* z, float* y) {
  const int64_t D = grid.D, M = grid.n_coordinates(s), first = i_panel * PANEL;
  const bool is_turned = grid.n_turned[s] > 0;
  float length2[PANEL] = {}, rest2[PANEL];
  bool is_point[PANEL];
  for (int64_t c = 0; c < PANEL; ++c) {
    const float* row = points + (first + c) * D;
    is_point[c] = first + c < n && is_finite_row(row, D);
    if (is_point[c]) {
      length2[c] = place(row, grid.centre + s * D, grid.unit[s], D, z + c);
    } else {
      for (int64_t d = 0; d < D; ++d) z[d * PANEL + c] = 0;
    }
  }
  if (is_turned)
    for (int64_t m = 0; m < M; m += TILE_ROWS)
      dot_tile(grid.turn + (s * TURNED + m) * D, TILE_ROWS, z, D, y + m * PANEL);
  to_cells(is_turned ? y : z, M, static_cast<float>(reach_of(M)), grid.panel(s, i_panel), grid.norm2_of(s) + first,
           rest2);
  // What y loses by rounding: 2^-24 of z, and (D + 2) 2^-24 of it in every product with a row of the turn.
  const float lost = is_turned ? static_cast<float>(D + 4) * 0x1p-24f * std::sqrt(static_cast<float>(M)) : 0x1p-23f;
  for (int64_t c = 0; c < PANEL; ++c) {
    float rest = std::sqrt(rest2[c]) * (1 + 0x1p-10f) + lost * std::sqrt(length2[c]) * (1 + 0x1p-10f) + 0x1p-8f;
    if (!(rest < INF)) rest = INF;  // so far away that float32 does not hold it
    grid.rest_of(s)[first + c] = is_point[c] ? rest : -INF;
    if (!is_point[c]) grid.norm2_of(s)[first + c] = NOBODY;
  }
}

// ---- squared distances of cells: out[r][c] = row_norm2[r] + norm2[c] - 2 sum_d rows[r][d] panel[c][d]

#define CLMFAST_DIST2_PARAMETERS                                                                                   \
  (const int16_t* rows, int64_t n_rows, const int32_t* row_norm2, const int16_t* panel, const int32_t* norm2,      \
   int64_t depth, float* out, int64_t stride)
#define CLMFAST_DIST2_ARGUMENTS (rows, n_rows, row_norm2, panel, norm2, depth, out, stride)

void dist2_baseline CLMFAST_DIST2_PARAMETERS {
  for (int64_t r = 0; r < n_rows; ++r) {
    int32_t sum[PANEL] = {};
    for (int64_t g = 0; g < depth; ++g) {
      const int16_t* row = rows + (g * GridRows::MOST + r) * PAIR;
      const int16_t* column = panel + g * PANEL * PAIR;
      for (int64_t c = 0; c < PANEL; ++c) sum[c] += row[0] * column[c * PAIR] + row[1] * column[c * PAIR + 1];
    }
    for (int64_t c = 0; c < PANEL; ++c)
      out[r * stride + c] = static_cast<float>((row_norm2[r] - sum[c]) + (norm2[c] - sum[c]));
  }
}

#if defined(__x86_64__)

using Two = int32_t __attribute__((may_alias, aligned(2)));  // a PAIR

// 6 rows and 16 columns: their sums are 12 of the 16 registers.
__attribute__((target("avx2"))) void dist2_avx2_tile(const int16_t* rows, const int32_t* row_norm2,
                                                     const int16_t* panel, const int32_t* norm2, int64_t depth,
                                                     float* out, int64_t stride) {
  constexpr int R = 6, C = 2;
  __m256i sum[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_si256();
  for (int64_t g = 0; g < depth; ++g) {
    __m256i p[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      p[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + (g * PANEL + c * 8) * PAIR));
      asm("" : "+x"(p[c]));  // or GCC 12 loads it for every row
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i row = _mm256_set1_epi32(*reinterpret_cast<const Two*>(rows + (g * GridRows::MOST + r) * PAIR));
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const __m256i products = _mm256_madd_epi16(p[c], row);
        asm("vpaddd %1, %0, %0" : "+x"(sum[r][c]) : "x"(products));  // with the intrinsic, it moves the sums about
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m256i of_column = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(norm2 + c * 8));
      const __m256i x = _mm256_add_epi32(_mm256_sub_epi32(_mm256_set1_epi32(row_norm2[r]), sum[r][c]),
                                         _mm256_sub_epi32(of_column, sum[r][c]));
      _mm256_storeu_ps(out + r * stride + c * 8, _mm256_cvtepi32_ps(x));
    }
  }
}

__attribute__((target("avx2"))) void dist2_avx2 CLMFAST_DIST2_PARAMETERS {
  for (int64_t c = 0; c < PANEL; c += 16)
    for (int64_t r = 0; r < n_rows; r += 6)
      dist2_avx2_tile(rows + r * PAIR, row_norm2 + r, panel + c * PAIR, norm2 + c, depth, out + r * stride + c, stride);
}

template <int R>
__attribute__((target("avx512f,avx512vnni"))) void dist2_vnni_rows(const int16_t* rows, const int32_t* row_norm2,
                                                                   const int16_t* panel, const int32_t* norm2,
                                                                   int64_t depth, float* out, int64_t stride) {
  constexpr int C = PANEL / 16;
  __m512i sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_si512();
  for (int64_t g = 0; g < depth; ++g) {
    __m512i p[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) p[c] = _mm512_loadu_si512(panel + (g * PANEL + c * 16) * PAIR);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i row = _mm512_set1_epi32(*reinterpret_cast<const Two*>(rows + (g * GridRows::MOST + r) * PAIR));
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        __m512i x = sum[r][c];  // with the intrinsic, GCC 12 copies every sum before and after
        asm("vpdpwssd %2, %1, %0" : "+v"(x) : "v"(p[c]), "v"(row));
        sum[r][c] = x;
      }
    }
  }
  constexpr __mmask16 ALL = 0xffff;  // of the form without a mask, GCC 12 says that it reads what is not set
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512i of_column = _mm512_loadu_si512(norm2 + c * 16);
      const __m512i x = _mm512_add_epi32(_mm512_sub_epi32(_mm512_set1_epi32(row_norm2[r]), sum[r][c]),
                                         _mm512_sub_epi32(of_column, sum[r][c]));
      _mm512_storeu_ps(out + r * stride + c * 16, _mm512_maskz_cvtepi32_ps(ALL, x));
    }
  }
}

void dist2_vnni CLMFAST_DIST2_PARAMETERS {
  if (n_rows > 8) dist2_vnni_rows<12>(rows, row_norm2, panel, norm2, depth, out, stride);
  else if (n_rows > 4) dist2_vnni_rows<8>(rows, row_norm2, panel, norm2, depth, out, stride);
  else dist2_vnni_rows<4>(rows, row_norm2, panel, norm2, depth, out, stride);
}

#else

constexpr auto dist2_avx2 = dist2_baseline, dist2_vnni = dist2_baseline;

#endif

void cell_dist2 CLMFAST_DIST2_PARAMETERS {
  static const auto once = isa() >= Isa::avx512vnni ? dist2_vnni : pick(dist2_baseline, dist2_avx2, dist2_avx2);
  once CLMFAST_DIST2_ARGUMENTS;
}

}  // namespace

GridMemory::GridMemory(int64_t S, int64_t N, int64_t D, const Grid* other)
    : Grid{S, N, D, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
      floats_(new float[S * ((other ? 0 : D + TURNED * D) + n_panels(N) * PANEL)]),
      doubles_(new double[S]),
      integers_(new int32_t[S * n_panels(N) * PANEL]),
      counts_(new int64_t[3 * S]),
      cells_(new int16_t[S * n_panels(N) * grid_depth(D) * PANEL * PAIR]) {
  rest = floats_.get();
  centre = other ? other->centre : rest + S * n_panels(N) * PANEL;
  turn = other ? other->turn : centre + S * D;
  unit = other ? other->unit : doubles_.get();
  n_turned = other ? other->n_turned : counts_.get();
  wasted = other ? other->wasted : counts_.get() + S;
  norm2 = integers_.get();
  cells = cells_.get();
}

void make_grid(const Grid& grid, int64_t s, const float* points, int64_t n) {
  choose(grid, s, points + s * grid.N * grid.D, n);
}

void make_grids(const Grid& grid, const float* points, int64_t n, ParallelFor parallel_for) {
  for_each(parallel_for, grid.S, [&](int64_t s) { make_grid(grid, s, points, n); });
}

void move_to_grid(const Grid& grid, int64_t s, const float* points, int64_t n, const std::vector<int64_t>& panels) {
  std::unique_ptr<float[]> scratch(new float[(grid.D + TURNED) * PANEL]);
  for (int64_t i_panel : panels)
    move_panel(grid, s, points + s * grid.N * grid.D, n, i_panel, scratch.get(), scratch.get() + grid.D * PANEL);
}

void move_to_grid(const Grid& grid, const float* points, int64_t n, ParallelFor parallel_for) {
  constexpr int64_t TASK = 8;  // panels
  const int64_t n_tasks = (n_panels(grid.N) + TASK - 1) / TASK;
  for_each(parallel_for, grid.S * n_tasks, [&](int64_t task) {
    std::vector<int64_t> panels;
    for (int64_t i = task % n_tasks * TASK; i < std::min((task % n_tasks + 1) * TASK, n_panels(grid.N)); ++i)
      panels.push_back(i);
    move_to_grid(grid, task / n_tasks, points, n, panels);
  });
}

GridRows::GridRows(const Grid& grid, int64_t s, const int64_t* row, int64_t n)
    : s_(s), n_(n), depth_(grid.depth(s)), cells_(depth_ * MOST * PAIR) {
  bool is_copied = false;
  for (int64_t r = 0; r < MOST; ++r) {
    norm2_[r] = 0;
    if (r >= n) continue;
    const int64_t i_panel = row[r] / PANEL, c = row[r] % PANEL;
    norm2_[r] = grid.norm2_of(s)[row[r]];
    const int16_t* from = grid.panel(s, i_panel) + c * PAIR;
    if (r == 0 && n == MOST && row[n - 1] == row[0] + n - 1 && row[n - 1] / PANEL == i_panel) {  // side by side
      for (int64_t g = 0; g < depth_; ++g)
        std::memcpy(&cells_[g * MOST * PAIR], from + g * PANEL * PAIR, MOST * PAIR * sizeof *from);
      is_copied = true;
    }
    if (is_copied) continue;
    for (int64_t g = 0; g < depth_; ++g)
      std::memcpy(&cells_[(g * MOST + r) * PAIR], from + g * PANEL * PAIR, PAIR * sizeof *from);
  }
}

void GridRows::dist2(const Grid& other, int64_t i_panel, float* dist2, int64_t stride) const {
  cell_dist2(cells_.data(), n_, norm2_, other.panel(s_, i_panel), other.norm2_of(s_) + i_panel * PANEL, depth_, dist2,
             stride);
}

}  // namespace clmfast
