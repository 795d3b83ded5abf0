#include "search.h"

#include "isa.h"
#include "lanes.h"

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

// ---- columns, from comparisons of PANEL of them

#define CLMFAST_CLOSE_PARAMETERS                                                                                 \
  (const float* dist2, int64_t n, float above, float limit, float rest, const float* column_limit,              \
   const float* column_rest, int32_t* column)
#define CLMFAST_CLOSE_ARGUMENTS (dist2, n, above, limit, rest, column_limit, column_rest, column)
#define CLMFAST_SMALL_PARAMETERS (const float* dist2, int64_t n, float most, int32_t* column)

// Bits of `word` are columns from p on.
inline int32_t* write_bits(uint32_t word, int64_t p, int32_t* column) {
  for (; word; word &= word - 1) *column++ = static_cast<int32_t>(p + __builtin_ctz(word));
  return column;
}

int64_t close_ones_baseline CLMFAST_CLOSE_PARAMETERS {
  int32_t* end = column;
  for (int64_t c = 0; c < n; ++c) {
    float reach = (column_limit && column_limit[c] > limit ? column_limit[c] : limit) + (rest + column_rest[c]);
    reach = reach > 0 ? reach : 0;  // also where it is NaN, as for a row that is no point or has no limit
    if (dist2[c] < reach * reach && dist2[c] > above) *end++ = static_cast<int32_t>(c);
  }
  return end - column;
}

int64_t small_ones_baseline CLMFAST_SMALL_PARAMETERS {
  int32_t* end = column;
  for (int64_t c = 0; c < n; ++c)
    if (dist2[c] <= most) *end++ = static_cast<int32_t>(c);
  return end - column;
}

#if defined(__x86_64__)
CLMFAST_AVX2 int64_t close_ones_avx2 CLMFAST_CLOSE_PARAMETERS {
  const __m256 row_limit = _mm256_set1_ps(limit), row_rest = _mm256_set1_ps(rest), zero = _mm256_setzero_ps();
  int32_t* end = column;
  for (int64_t p = 0; p < n; p += PANEL) {
    uint32_t word = 0;
    for (int64_t c = 0; c < PANEL; c += 8) {
      // max takes its second argument where one is NaN, as for a row that is no point or has no limit
      __m256 reach = column_limit ? _mm256_max_ps(row_limit, _mm256_loadu_ps(column_limit + p + c)) : row_limit;
      reach = _mm256_add_ps(reach, _mm256_add_ps(row_rest, _mm256_loadu_ps(column_rest + p + c)));
      reach = _mm256_max_ps(reach, zero);
      const __m256 x = _mm256_loadu_ps(dist2 + p + c);
      const __m256 is_close = _mm256_and_ps(_mm256_cmp_ps(x, _mm256_mul_ps(reach, reach), _CMP_LT_OQ),
                                            _mm256_cmp_ps(x, _mm256_set1_ps(above), _CMP_GT_OQ));
      word |= static_cast<uint32_t>(_mm256_movemask_ps(is_close)) << c;
    }
    end = write_bits(word, p, end);
  }
  return end - column;
}

CLMFAST_AVX2 int64_t small_ones_avx2 CLMFAST_SMALL_PARAMETERS {
  int32_t* end = column;
  for (int64_t p = 0; p < n; p += PANEL) {
    uint32_t word = 0;
    for (int64_t c = 0; c < PANEL; c += 8) {
      const __m256 is_small = _mm256_cmp_ps(_mm256_loadu_ps(dist2 + p + c), _mm256_set1_ps(most), _CMP_LE_OQ);
      word |= static_cast<uint32_t>(_mm256_movemask_ps(is_small)) << c;
    }
    end = write_bits(word, p, end);
  }
  return end - column;
}

// Columns of the mask, from c on: nothing to predict.
CLMFAST_AVX512 inline int32_t* write_mask(__mmask16 mask, int64_t c, int32_t* column) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i columns = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(c)));
  _mm512_storeu_si512(column, _mm512_maskz_compress_epi32(mask, columns));
  return column + __builtin_popcount(mask);
}

CLMFAST_AVX512 int64_t close_ones_avx512 CLMFAST_CLOSE_PARAMETERS {
  const __m512 row_limit = _mm512_set1_ps(limit), row_rest = _mm512_set1_ps(rest), zero = _mm512_setzero_ps();
  constexpr __mmask16 ALL = 0xffff;  // of the forms without a mask, GCC 12 says that they read what is not set
  int32_t* end = column;
  for (int64_t c = 0; c < n; c += 16) {
    __m512 reach = column_limit ? _mm512_maskz_max_ps(ALL, row_limit, _mm512_loadu_ps(column_limit + c)) : row_limit;
    reach = _mm512_add_ps(reach, _mm512_add_ps(row_rest, _mm512_loadu_ps(column_rest + c)));
    reach = _mm512_maskz_max_ps(ALL, reach, zero);
    const __m512 x = _mm512_loadu_ps(dist2 + c);
    const __mmask16 is_close = _mm512_cmp_ps_mask(x, _mm512_mul_ps(reach, reach), _CMP_LT_OQ);
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(is_close, x, _mm512_set1_ps(above), _CMP_GT_OQ);
    if (mask) end = write_mask(mask, c, end);  // rare
  }
  return end - column;
}

CLMFAST_AVX512 int64_t small_ones_avx512 CLMFAST_SMALL_PARAMETERS {
  int32_t* end = column;
  for (int64_t c = 0; c < n; c += 16)
    end = write_mask(_mm512_cmp_ps_mask(_mm512_loadu_ps(dist2 + c), _mm512_set1_ps(most), _CMP_LE_OQ), c, end);
  return end - column;
}
#else
constexpr auto close_ones_avx2 = close_ones_baseline, close_ones_avx512 = close_ones_baseline;
constexpr auto small_ones_avx2 = small_ones_baseline, small_ones_avx512 = small_ones_baseline;
#endif

// Minima of groups of columns that lie n_minima apart; n is a multiple of n_minima, which is one of PANEL.
template <int W>
CLMFAST_BODY void minima_body(const float* x, int64_t n, int64_t n_minima, float* out) {
  constexpr int R = PANEL / W < 4 ? PANEL / W : 4;  // registers of minima at a time
  for (int64_t m = 0; m < n_minima; m += R * W) {
    Lanes<W> least[R];
    for (int r = 0; r < R; ++r) least[r] = lanes<W>(x + m + r * W);
    for (int64_t i = m + n_minima; i < n; i += n_minima) {
      for (int r = 0; r < R; ++r) {
        const Lanes<W> other = lanes<W>(x + i + r * W);
        least[r] = other < least[r] ? other : least[r];
      }
    }
    for (int r = 0; r < R; ++r) lanes<W>(out + m + r * W) = least[r];
  }
}

CLMFAST_PER_WIDTH(minima, (const float* x, int64_t n, int64_t n_minima, float* out), (x, n, n_minima, out))

// How many of n floats >= 0, a multiple of PANEL, have bits up to `most`.
int64_t count_baseline(const float* x, int64_t n, int32_t most) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    count += bits <= most;
  }
  return count;
}

#if defined(__x86_64__)
CLMFAST_AVX2 inline int64_t count_avx2(const float* x, int64_t n, int32_t most) {
  __m256i beyond = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8)
    beyond = _mm256_add_epi32(beyond, _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)),
                                                         _mm256_set1_epi32(most)));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(beyond), _mm256_extracti128_si256(beyond, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return n + _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}

CLMFAST_AVX512 inline int64_t count_avx512(const float* x, int64_t n, int32_t most) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16)
    count += __builtin_popcount(_mm512_cmple_epi32_mask(_mm512_loadu_si512(x + i), _mm512_set1_epi32(most)));
  return count;
}
#else
constexpr auto count_avx2 = count_baseline, count_avx512 = count_baseline;
#endif

// A little more than the k-th smallest of n floats >= 0, n >= k. Halving the range has nothing to predict, which
// partial sorting has; floats >= 0 sort as their bits.
template <int64_t (*count)(const float*, int64_t, int32_t)>
CLMFAST_BODY float kth_of_body(const float* x, int64_t n, int64_t k) {
  constexpr int32_t NEAR = 1 << 8;
  int32_t low = INT32_MAX, high = 0;  // fewer than k are below `low`, at least k are at most `high`
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    low = std::min(low, bits);
    high = std::max(high, bits);
  }
  while (high - low > NEAR) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t n_within = count(x, n, middle);
    if (n_within < k) low = middle;
    else high = middle;
    if (n_within == k) break;
  }
  float value;
  std::memcpy(&value, &high, sizeof value);
  return value;
}

float kth_of_baseline(const float* x, int64_t n, int64_t k) { return kth_of_body<count_baseline>(x, n, k); }
CLMFAST_AVX2 float kth_of_avx2(const float* x, int64_t n, int64_t k) { return kth_of_body<count_avx2>(x, n, k); }
CLMFAST_AVX512 float kth_of_avx512(const float* x, int64_t n, int64_t k) {
  return kth_of_body<count_avx512>(x, n, k);
}

// x [n], all different, in order: how many are smaller says where each belongs.
CLMFAST_BODY void sort_few_body(const Neighbour* x, int64_t n, Neighbour* sorted) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t place = 0;
    for (int64_t j = 0; j < n; ++j) place += x[j] < x[i];
    sorted[place] = x[i];
  }
}

CLMFAST_PER_ISA(void, sort_few, (const Neighbour* x, int64_t n, Neighbour* sorted), (x, n, sorted))

// Every place gets its neighbour to the left if that is above x, or else x if x is below it: nothing to predict.
CLMFAST_BODY void insert_chunk_body(Neighbour* list, int64_t n, Neighbour x, Neighbour* scratch) {
  for (int64_t e = 0; e < n; ++e) scratch[e] = list[e - 1] > x ? list[e - 1] : x < list[e] ? x : list[e];
  for (int64_t e = 0; e < n; ++e) list[e] = scratch[e];
}

CLMFAST_PER_ISA(void, insert_chunk, (Neighbour* list, int64_t n, Neighbour x, Neighbour* scratch),
                (list, n, x, scratch))

}  // namespace

void Nearest::begin_with(const Neighbour* x, int64_t n) {
  Neighbour sorted[FEW];
  sort_few(x, n, sorted);
  n = std::lower_bound(sorted, sorted + n, bound_) - sorted;
  std::copy_n(sorted, std::min(n, k_), list_);
  if (n >= k_) bound_ = list_[k_ - 1], is_late_ = true;
}

void insert(Neighbour* list, int64_t k, Neighbour x) {
  constexpr int64_t CHUNK = 64;
  Neighbour scratch[CHUNK];
  for (; k > 1 && list[k - 2] > x; k -= std::min(k - 1, CHUNK))  // from behind, as long as something moves
    insert_chunk(list + k - std::min(k - 1, CHUNK), std::min(k - 1, CHUNK), x, scratch);
  if (k >= 1 && x < list[k - 1]) list[k - 1] = x;
}

int64_t close_ones CLMFAST_CLOSE_PARAMETERS {
  static const auto once = pick(close_ones_baseline, close_ones_avx2, close_ones_avx512);
  return once CLMFAST_CLOSE_ARGUMENTS;
}

int64_t small_ones CLMFAST_SMALL_PARAMETERS {
  static const auto once = pick(small_ones_baseline, small_ones_avx2, small_ones_avx512);
  return once(dist2, n, most, column);
}

float about_kth(const float* dist2, int64_t n, int64_t k) {
  if (k >= n) return INF;
  // So many groups that hardly two of the k smallest share one.
  int64_t n_minima = PANEL;
  while (n_minima < 4 * k && n % (2 * n_minima) == 0) n_minima *= 2;
  if (n_minima < k) n_minima = n;
  float least[Row::MOST];
  minima(dist2, n, n_minima, least);
  static const auto kth_of = pick(kth_of_baseline, kth_of_avx2, kth_of_avx512);
  return kth_of(least, n_minima, k);
}

float limit_below(double unit, Neighbour bound) {
  if (bound <= 0) return -INF;
  if (bound > neighbour(std::numeric_limits<float>::max(), 0)) return INF;  // dist2 overflows: the index decides
  // Below the bound lie some of its own dist2: those of a smaller index.
  return limit_for(unit, dist2_of(bound + (Neighbour{1} << 32) - (index_of(bound) == 0)));
}

std::vector<GridRows> grid_rows(const Grid& grid, int64_t s, int64_t first, int64_t n) {
  std::vector<GridRows> rows;
  rows.reserve((n + GridRows::MOST - 1) / GridRows::MOST);
  for (int64_t i = 0; i < n; i += GridRows::MOST)
    rows.emplace_back(grid, s, first + i, std::min(GridRows::MOST, n - i));
  return rows;
}

}  // namespace clmfast
