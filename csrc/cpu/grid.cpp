#include "grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "lanes.h"
#include "pair.h"
#include "sums.h"
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

CLMFAST_BODY void centre_row_body(const float* row, const float* centre, float scale, int64_t D, float* to) {
  for (int64_t d = 0; d < D; ++d) to[d] = row[d] * scale - centre[d] * scale;
}

CLMFAST_BODY void scale_row_body(float* row, int64_t n, float scale) {
  for (int64_t d = 0; d < n; ++d) row[d] *= scale;
}

CLMFAST_PER_ISA(void, centre_row, (const float* row, const float* centre, float scale, int64_t D, float* to),
                (row, centre, scale, D, to))
CLMFAST_PER_ISA(void, scale_row, (float* row, int64_t n, float scale), (row, n, scale))

void choose(const Grid& grid, int64_t s, const float* points, bool may_turn) {
  const int64_t n = grid.N, D = grid.D, most = may_turn ? SAMPLE : SAMPLE / 4;
  const int64_t stride = std::max<int64_t>((n + most - 1) / most, 1);
  std::vector<double> mean(D);
  std::vector<const float*> sample;
  float largest = 0;
  for (int64_t i = 0; i < n; i += stride) {
    const float* row = points + i * D;
    const float row_reaches = row_reach(row, D);
    if (!(row_reaches < INF)) continue;
    sample.push_back(row);
    largest = std::max(largest, row_reaches);
    add_row(row, D, mean.data());
  }
  float* centre = grid.centre + s * D;
  for (int64_t d = 0; d < D; ++d)
    centre[d] = static_cast<float>(mean[d] / static_cast<double>(std::max<size_t>(sample.size(), 1)));
  // Differences from the centre, of which the largest becomes 1, first by a power of two so that none is infinite. What
  // float32 cannot hold, or is below its normal numbers, needs no steps of its own.
  const int exponent = largest > 0 ? std::clamp(std::ilogb(largest), -120, 126) : 0;
  const double scale = std::ldexp(1.0, -exponent);
  std::vector<float> centred(sample.size() * D), turn, distance;
  for (size_t i = 0; i < sample.size(); ++i)
    centre_row(sample[i], centre, static_cast<float>(scale), D, centred.data() + i * D);
  const int64_t n_centred = static_cast<int64_t>(centred.size());
  const float farthest = std::max({row_reach(centred.data(), n_centred), static_cast<float>(largest * scale) * 0x1p-24f, 0x1p-60f});
  scale_row(centred.data(), n_centred, 1 / farthest);
  double widest = 1;
  if (may_turn && find_turn(centred, D, turn, distance)) {
    grid.n_turned[s] = TURNED;
    const std::vector<float> tiles = interleaved(turn.data(), TURNED, D, TILE_ROWS);
    std::copy(tiles.begin(), tiles.end(), grid.turn + s * TURNED * D);
    widest = 0x1p-60;
    for (float& x : distance) widest = std::max<double>(widest, x = std::abs(x));
    for (float& x : distance) x /= static_cast<float>(widest);
  } else {
    grid.n_turned[s] = 0;
    distance.clear();
    const int64_t step = std::max<int64_t>(static_cast<int64_t>(sample.size()) / 32, 1);
    for (int64_t i = 0; i < n_centred; i += step * D)
      for (int64_t d = 0; d < D; ++d) distance.push_back(std::abs(centred[i + d]));
  }
  const double unit = scale / (best_step(distance, grid.n_coordinates(s)) * widest * farthest);
  grid.unit[s] = static_cast<float>(std::min(unit, 0x1p106));
}

// ---- the move

// What a panel of points becomes, beside its cells.
struct Placed {
  float rest2[PANEL];    // |y - cell|^2
  float length2[PANEL];  // |z|^2; only where there is a turn
  int32_t norm2[PANEL];  // of the cells
};

template <int W>
CLMFAST_BODY Lanes<W> load_some(const float* from, int64_t n) {
  if (n >= W) return lanes<W>(from);
  float some[W] = {};
  for (int64_t l = 0; l < n; ++l) some[l] = from[l];
  return lanes<W>(some);
}

// Adds z to what was seen of a row, and returns its cells.
template <int W>
CLMFAST_BODY typename LanesOf<W>::Int to_cell(Lanes<W> z, float reach, Lanes<W>& rest2,
                                              typename LanesOf<W>::Int& norm2) {
  constexpr float WHOLE = 0x1.8p23f;  // adding it leaves no digits behind the point
  const Lanes<W> zero = {}, least = zero - reach, most = zero + reach;
  Lanes<W> whole = z > least ? z : least;  // also where it is NaN
  whole = whole < most ? whole : most;
  whole = (whole + WHOLE) - WHOLE;
  rest2 += (z - whole) * (z - whole);
  const auto cell = __builtin_convertvector(whole, typename LanesOf<W>::Int);
  norm2 += cell * cell;
  return cell;
}

// The sums of W rows of numbers, as Sum adds them.
template <class Sum, int W>
CLMFAST_BODY Sum sums_of(Lanes<W>* row) {
  transpose<W>(row);
  Sum sum = {};
  for (int i = 0; i < W; ++i) sum += reinterpret_cast<Sum&>(row[i]);
  return sum;
}

// z [D, PANEL] = (row - centre) unit.
template <int W>
CLMFAST_BODY void place_body(const float* const* row, const float* centre, float unit, int64_t D, float* z,
                             Placed* placed) {
  for (int64_t c = 0; c < PANEL; c += W) {
    Lanes<W> square[W] = {};
    for (int64_t d = 0; d < D; d += W) {
      Lanes<W> of_row[W];
      for (int r = 0; r < W; ++r) {
        of_row[r] = (load_some<W>(row[c + r] + d, D - d) - load_some<W>(centre + d, D - d)) * unit;
        square[r] += of_row[r] * of_row[r];
      }
      transpose<W>(of_row);
      for (int l = 0; l < W && d + l < D; ++l) lanes<W>(z + (d + l) * PANEL + c) = of_row[l];
    }
    lanes<W>(placed->length2 + c) = sums_of<Lanes<W>, W>(square);
  }
}

// The cells of a panel of points that are not projected. A step takes 2 W coordinates, or those that are left, and pairs
// each of its first half with one of its second. `pairs` [W, grid_depth(D) + W] is scratch.
template <int W>
CLMFAST_BODY void to_cells_body(const float* const* row, const float* centre, float unit, int64_t D, float reach,
                                float* pairs, int16_t* cells, Placed* placed) {
  using Int = typename LanesOf<W>::Int;
  constexpr int64_t AHEAD = 2048;  // bytes: points come from the third cache, row by row
  const int64_t depth = grid_depth(D), stride = depth + W;
  for (int64_t c = 0; c < PANEL; c += W) {
    Lanes<W> rest2[W], norm2[W];
    for (int r = 0; r < W; ++r) {
      Lanes<W> rests = {};
      Int norms = {};
      for (int64_t g = 0; g < depth; g += W) {
        const int64_t half = std::min<int64_t>(W, depth - g), n_second = std::min(half, D - 2 * g - half);
        const float *first = row[c + r] + 2 * g, *centre_first = centre + 2 * g;
        for (int64_t line : {0, 64}) __builtin_prefetch(reinterpret_cast<const char*>(first) + AHEAD + line);
        const Int low = to_cell<W>((load_some<W>(first, half) - load_some<W>(centre_first, half)) * unit, reach, rests,
                                   norms);
        const Int high = to_cell<W>(
            (load_some<W>(first + half, n_second) - load_some<W>(centre_first + half, n_second)) * unit, reach, rests,
            norms);
        reinterpret_cast<Int&>(lanes<W>(pairs + r * stride + g)) = (low & 0xffff) | (high << 16);
      }
      rest2[r] = rests;
      std::memcpy(&norm2[r], &norms, sizeof norms);
    }
    lanes<W>(placed->rest2 + c) = sums_of<Lanes<W>, W>(rest2);
    reinterpret_cast<Int&>(placed->norm2[c]) = sums_of<Int, W>(norm2);
    for (int64_t g = 0; g < depth; g += W) {
      Lanes<W> square[W];  // of bits
      for (int r = 0; r < W; ++r) square[r] = lanes<W>(pairs + r * stride + g);
      transpose<W>(square);
      for (int l = 0; l < W && g + l < depth; ++l)
        lanes<W>(reinterpret_cast<float*>(cells + ((g + l) * PANEL + c) * PAIR)) = square[l];
    }
  }
}

// The cells of y [M, PANEL].
template <int W>
CLMFAST_BODY void turned_to_cells_body(const float* y, int64_t M, float reach, int16_t* cells, Placed* placed) {
  using Int = typename LanesOf<W>::Int;
  for (int64_t c = 0; c < PANEL; c += W) {
    Lanes<W> rest2 = {};
    Int norm2 = {};
    for (int64_t m = 0; m < M; m += PAIR) {
      const Int low = to_cell<W>(lanes<W>(y + m * PANEL + c), reach, rest2, norm2);
      const Int high = to_cell<W>(lanes<W>(y + (m + 1) * PANEL + c), reach, rest2, norm2);
      reinterpret_cast<Int&>(cells[m * PANEL + c * PAIR]) = (low & 0xffff) | (high << 16);
    }
    lanes<W>(placed->rest2 + c) = rest2;
    reinterpret_cast<Int&>(placed->norm2[c]) = norm2;
  }
}

CLMFAST_PER_WIDTH(place,
                  (const float* const* row, const float* centre, float unit, int64_t D, float* z, Placed* placed),
                  (row, centre, unit, D, z, placed))
CLMFAST_PER_WIDTH(to_cells,
                  (const float* const* row, const float* centre, float unit, int64_t D, float reach, float* pairs,
                   int16_t* cells, Placed* placed),
                  (row, centre, unit, D, reach, pairs, cells, placed))
CLMFAST_PER_WIDTH(turned_to_cells, (const float* y, int64_t M, float reach, int16_t* cells, Placed* placed),
                  (y, M, reach, cells, placed))

// Moves one panel of points. `scratch` [D + TURNED, PANEL] and room for a square.
void move_panel(const Grid& grid, int64_t s, const float* points, int64_t i_panel, float* scratch) {
  const int64_t n = grid.N, D = grid.D, M = grid.n_coordinates(s), first = i_panel * PANEL;
  const bool is_turned = grid.n_turned[s] > 0;
  const float *centre = grid.centre + s * D, unit = grid.unit[s], reach = static_cast<float>(reach_of(M));
  const float* row[PANEL];
  for (int64_t c = 0; c < PANEL; ++c) row[c] = first + c < n ? points + (first + c) * D : centre;
  Placed placed;
  int16_t* cells = grid.panel(s, i_panel);
  if (is_turned) {
    float *z = scratch, *y = scratch + D * PANEL;
    place(row, centre, unit, D, z, &placed);
    for (int64_t m = 0; m < M; m += TILE_ROWS)
      dot_tile(grid.turn + (s * TURNED + m) * D, TILE_ROWS, z, D, y + m * PANEL);
    turned_to_cells(y, M, reach, cells, &placed);
  } else {
    to_cells(row, centre, unit, D, reach, scratch, cells, &placed);
  }
  for (int64_t c = 0; c < PANEL; ++c) {
    // What z loses by rounding, 2^-23 of it, and y in every product with a row of the turn, (D + 2) 2^-24 of z. Without
    // a turn |z| <= |cell| + |z - cell|. The sums, of D squares, are rounded as well.
    const float slack = 1 + 0x1p-10f + static_cast<float>(D) * 0x1p-22f, off = std::sqrt(placed.rest2[c]) * slack;
    const float length = is_turned ? std::sqrt(placed.length2[c]) * slack
                                   : std::sqrt(static_cast<float>(placed.norm2[c])) * slack + off;
    const float lost = is_turned ? static_cast<float>(D + 5) * 0x1p-24f * std::sqrt(static_cast<float>(M)) : 0x1.1p-23f;
    float rest = off + lost * length + 0x1p-8f;
    if (!(rest < INF)) rest = INF;  // so far away that float32 does not hold it
    const bool is_point = first + c < n && (rest < INF || is_finite_row(row[c], D));
    grid.rest_of(s)[first + c] = is_point ? rest : -INF;
    grid.norm2_of(s)[first + c] = is_point ? placed.norm2[c] : NOBODY;
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
    : Grid{S, N, D, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
      floats_(new float[S * ((other ? 0 : D + TURNED * D + 1) + n_panels(N) * PANEL)]),
      integers_(new int32_t[S * n_panels(N) * PANEL]),
      counts_(new int64_t[S]),
      cells_(new int16_t[S * n_panels(N) * grid_depth(D) * PANEL * PAIR]) {
  rest = floats_.get();
  centre = other ? other->centre : rest + S * n_panels(N) * PANEL;
  turn = other ? other->turn : centre + S * D;
  unit = other ? other->unit : turn + S * TURNED * D;
  n_turned = other ? other->n_turned : counts_.get();
  norm2 = integers_.get();
  cells = cells_.get();
}

void make_grid(const Grid& grid, int64_t s, const float* points, bool may_turn) {
  choose(grid, s, points + s * grid.N * grid.D, may_turn);
}

void move_to_grid(const Grid& grid, const float* points, ParallelFor parallel_for) {
  constexpr int64_t TASK = 8;  // panels
  const int64_t n_tasks = (n_panels(grid.N) + TASK - 1) / TASK;
  for_each(parallel_for, grid.S * n_tasks, [&](int64_t task) {
    const int64_t s = task / n_tasks, begin = task % n_tasks * TASK;
    const std::unique_ptr<float[]> scratch(new float[(grid.D + TURNED) * PANEL + LANES * LANES]);
    for (int64_t i_panel = begin; i_panel < std::min(begin + TASK, n_panels(grid.N)); ++i_panel)
      move_panel(grid, s, points + s * grid.N * grid.D, i_panel, scratch.get());
  });
}

GridRows::GridRows(const Grid& grid, int64_t s, int64_t first, int64_t n)
    : s_(s), n_(n), depth_(grid.depth(s)), cells_(depth_ * MOST * PAIR) {
  std::fill_n(norm2_, MOST, 0);
  for (int64_t r = 0, n_there; r < n; r += n_there) {
    const int64_t row = first + r, c = row % PANEL;
    n_there = std::min(n - r, PANEL - c);  // in one panel
    const int16_t* from = grid.panel(s, row / PANEL) + c * PAIR;
    std::copy_n(grid.norm2_of(s) + row, n_there, norm2_ + r);
    for (int64_t g = 0; g < depth_; ++g) std::copy_n(from + g * PANEL * PAIR, n_there * PAIR, cells_.data() + (g * MOST + r) * PAIR);
  }
}

void GridRows::dist2(const Grid& other, int64_t i_panel, float* dist2, int64_t stride) const {
  cell_dist2(cells_.data(), n_, norm2_, other.panel(s_, i_panel), other.norm2_of(s_) + i_panel * PANEL, depth_, dist2,
             stride);
}

}  // namespace clmfast
