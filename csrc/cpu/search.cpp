#include "search.h"

#include "isa.h"
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// A distance in steps that no point exceeds whose dist2, rounded to float32, is at most this.
float limit_for(double unit, double dist2) {
  return static_cast<float>(std::sqrt(dist2 * (1 + 0x1p-22) + 0x1p-148) * unit * (1 + 0x1p-20));
}

// ---- bits, from comparisons of PANEL columns

#define CLMFAST_CLOSE_PARAMETERS                                                                                 \
  (const float* dist2, int64_t n, float limit, float rest, const float* column_limit, const float* column_rest, \
   uint32_t* bits)
#define CLMFAST_CLOSE_ARGUMENTS (dist2, n, limit, rest, column_limit, column_rest, bits)

void close_ones_baseline CLMFAST_CLOSE_PARAMETERS {
  for (int64_t p = 0; p < n; p += PANEL) {
    uint32_t word = 0;
    for (int64_t c = p; c < p + PANEL; ++c) {
      float reach = (column_limit && column_limit[c] > limit ? column_limit[c] : limit) + (rest + column_rest[c]);
      reach = reach > 0 ? reach : 0;  // also where it is NaN: who has no limit and who is no point
      word |= static_cast<uint32_t>(dist2[c] < reach * reach) << (c - p);
    }
    bits[p / PANEL] = word;
  }
}

void small_ones_baseline(const float* dist2, int64_t n, float most, uint32_t* bits) {
  for (int64_t p = 0; p < n; p += PANEL) {
    uint32_t word = 0;
    for (int64_t c = 0; c < PANEL; ++c) word |= static_cast<uint32_t>(dist2[p + c] <= most) << c;
    bits[p / PANEL] = word;
  }
}

#if defined(__x86_64__)
CLMFAST_AVX2 void close_ones_avx2 CLMFAST_CLOSE_PARAMETERS {
  const __m256 row_limit = _mm256_set1_ps(limit), row_rest = _mm256_set1_ps(rest), zero = _mm256_setzero_ps();
  for (int64_t p = 0; p < n; p += PANEL) {
    uint32_t word = 0;
    for (int64_t c = 0; c < PANEL; c += 8) {
      // max takes its second argument where one is NaN: who has no limit and who is no point reach nothing
      __m256 reach = column_limit ? _mm256_max_ps(row_limit, _mm256_loadu_ps(column_limit + p + c)) : row_limit;
      reach = _mm256_add_ps(reach, _mm256_add_ps(row_rest, _mm256_loadu_ps(column_rest + p + c)));
      reach = _mm256_max_ps(reach, zero);
      const __m256 is_close = _mm256_cmp_ps(_mm256_loadu_ps(dist2 + p + c), _mm256_mul_ps(reach, reach), _CMP_LT_OQ);
      word |= static_cast<uint32_t>(_mm256_movemask_ps(is_close)) << c;
    }
    bits[p / PANEL] = word;
  }
}

CLMFAST_AVX2 void small_ones_avx2(const float* dist2, int64_t n, float most, uint32_t* bits) {
  for (int64_t p = 0; p < n; p += PANEL) {
    uint32_t word = 0;
    for (int64_t c = 0; c < PANEL; c += 8) {
      const __m256 is_small = _mm256_cmp_ps(_mm256_loadu_ps(dist2 + p + c), _mm256_set1_ps(most), _CMP_LE_OQ);
      word |= static_cast<uint32_t>(_mm256_movemask_ps(is_small)) << c;
    }
    bits[p / PANEL] = word;
  }
}
#else
constexpr auto close_ones_avx2 = close_ones_baseline;
constexpr auto small_ones_avx2 = small_ones_baseline;
#endif

// Minima of groups of columns that lie n_minima apart; n is a multiple of n_minima.
CLMFAST_BODY void minima_body(const float* x, int64_t n, int64_t n_minima, float* out) {
  for (int64_t m = 0; m < n_minima; ++m) out[m] = x[m];
  for (int64_t i = n_minima; i < n; i += n_minima)
    for (int64_t m = 0; m < n_minima; ++m) out[m] = x[i + m] < out[m] ? x[i + m] : out[m];
}

CLMFAST_PER_ISA(void, minima, (const float* x, int64_t n, int64_t n_minima, float* out), (x, n, n_minima, out))

// A little more than the k-th smallest of n floats >= 0, n >= k. Halving the range has nothing to predict, which
// partial sorting has; floats >= 0 sort as their bits.
CLMFAST_BODY float kth_of_body(const float* x, int64_t n, int64_t k) {
  constexpr uint32_t NEAR = 1 << 8;
  uint32_t low = ~0u, high = 0;  // fewer than k are below `low`, at least k are at most `high`
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    low = std::min(low, bits);
    high = std::max(high, bits);
  }
  while (high - low > NEAR) {
    const uint32_t middle = low + (high - low) / 2;
    int32_t n_within = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      n_within += bits <= middle;
    }
    if (n_within < k) low = middle;
    else high = middle;
    if (n_within == k) break;
  }
  float value;
  std::memcpy(&value, &high, sizeof value);
  return value;
}

CLMFAST_PER_ISA(float, kth_of, (const float* x, int64_t n, int64_t k), (x, n, k))

// Every place gets its neighbour to the left if that is above x, or else x if x is below it: nothing to predict.
CLMFAST_BODY void insert_chunk_body(Neighbour* list, int64_t n, Neighbour x, Neighbour* scratch) {
  for (int64_t e = 0; e < n; ++e) scratch[e] = list[e - 1] > x ? list[e - 1] : x < list[e] ? x : list[e];
  for (int64_t e = 0; e < n; ++e) list[e] = scratch[e];
}

CLMFAST_PER_ISA(void, insert_chunk, (Neighbour* list, int64_t n, Neighbour x, Neighbour* scratch),
                (list, n, x, scratch))

}  // namespace

void insert(Neighbour* list, int64_t k, Neighbour x) {
  constexpr int64_t CHUNK = 64;
  Neighbour scratch[CHUNK];
  for (; k > 1 && list[k - 2] > x; k -= std::min(k - 1, CHUNK))  // from behind, as long as something moves
    insert_chunk(list + k - std::min(k - 1, CHUNK), std::min(k - 1, CHUNK), x, scratch);
  if (k >= 1 && x < list[k - 1]) list[k - 1] = x;
}

void close_ones CLMFAST_CLOSE_PARAMETERS {
  static const auto once = pick(close_ones_baseline, close_ones_avx2, close_ones_avx2);
  once CLMFAST_CLOSE_ARGUMENTS;
}

void small_ones(const float* dist2, int64_t n, float most, uint32_t* bits) {
  static const auto once = pick(small_ones_baseline, small_ones_avx2, small_ones_avx2);
  once(dist2, n, most, bits);
}

float about_kth(const float* dist2, int64_t n, int64_t k) {
  if (k >= n) return INF;
  // So many groups that hardly two of the k smallest share one.
  int64_t n_minima = PANEL;
  while (n_minima < 4 * k && n % (2 * n_minima) == 0) n_minima *= 2;
  if (n_minima < k) n_minima = n;
  float least[Row::MOST];
  minima(dist2, n, n_minima, least);
  return kth_of(least, n_minima, k);
}

float limit_below(double unit, Neighbour bound) {
  if (bound <= 0) return -INF;
  if (bound > neighbour(std::numeric_limits<float>::max(), 0)) return INF;  // dist2 overflows: the index decides
  // Below the bound lie some of its own dist2: those of a smaller index.
  return limit_for(unit, dist2_of(bound + (Neighbour{1} << 32) - (index_of(bound) == 0)));
}

std::vector<GridRows> grid_rows(const Grid& grid, int64_t s, const int64_t* row, int64_t n) {
  std::vector<GridRows> rows;
  rows.reserve((n + GridRows::MOST - 1) / GridRows::MOST);
  for (int64_t i = 0; i < n; i += GridRows::MOST) rows.emplace_back(grid, s, row + i, std::min(GridRows::MOST, n - i));
  return rows;
}

std::vector<GridRows> grid_rows(const Grid& grid, int64_t s, int64_t first, int64_t n) {
  std::vector<int64_t> row(n);
  for (int64_t i = 0; i < n; ++i) row[i] = first + i;
  return grid_rows(grid, s, row.data(), n);
}

}  // namespace clmfast
