#include "search.h"

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

// A distance in steps that no point exceeds whose dist2, rounded to float32, is at most this.
float limit_for(double unit, double dist2) {
  return static_cast<float>(std::sqrt(dist2 * (1 + 0x1p-22) + 0x1p-148) * unit * (1 + 0x1p-20));
}

// A little more than the k-th smallest of n floats >= 0, n >= k, and at most the next one where that is far. Halving the
// range has nothing to predict, which partial sorting has; floats >= 0 sort as their bits.
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

// Appends the columns of `tile_row` that are closer than `limit`; returns how many. May write up to LANES further.
#define CLMFAST_APPEND_PARAMETERS                                                                                    \
  (const int32_t* tile_row, const float* rest, float row_rest, float limit, uint32_t columns, uint32_t first, float* least, \
   float* most, uint32_t* index)
#define CLMFAST_APPEND_ARGUMENTS (tile_row, rest, row_rest, limit, columns, first, least, most, index)

int64_t append_any CLMFAST_APPEND_PARAMETERS {
  int64_t n = 0;
  for (uint32_t bits = columns; bits; bits &= bits - 1) {
    const uint32_t c = __builtin_ctz(bits);
    const float distance = std::sqrt(static_cast<float>(tile_row[c])), rests = row_rest + rest[c];
    least[n] = distance - rests;
    most[n] = distance + rests;
    index[n] = first + c;
    n += least[n] < limit;
  }
  return n;
}

#if defined(__x86_64__)
// The chosen lanes side by side; returns how many. All LANES are written.
CLMFAST_AVX512 inline int64_t write_chosen(__mmask16 chosen, __m512 low, __m512 high, __m512i point, float* least,
                                           float* most, uint32_t* index) {
  _mm512_storeu_ps(least, _mm512_maskz_compress_ps(chosen, low));
  _mm512_storeu_ps(most, _mm512_maskz_compress_ps(chosen, high));
  _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(chosen, point));
  return __builtin_popcount(chosen);
}

CLMFAST_AVX512 int64_t append_avx512 CLMFAST_APPEND_PARAMETERS {
  int64_t n = 0;
  for (int64_t c = 0; c < TILE_COLS; c += LANES) {
    constexpr __mmask16 ALL = 0xffff;  // of the forms without a mask, GCC 12 says that they read what is not set
    const __m512 cells = _mm512_maskz_cvtepi32_ps(ALL, _mm512_loadu_si512(tile_row + c));
    const __m512 distance = _mm512_maskz_sqrt_ps(ALL, cells);
    const __m512 rests = _mm512_add_ps(_mm512_set1_ps(row_rest), _mm512_loadu_ps(rest + c));
    const __m512 low = _mm512_sub_ps(distance, rests), high = _mm512_add_ps(distance, rests);
    const __mmask16 is_close = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(columns >> c), low, _mm512_set1_ps(limit),
                                                       _CMP_LT_OQ);
    const __m512i point = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + c)),
                                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    n += write_chosen(is_close, low, high, point, least + n, most + n, index + n);
  }
  return n;
}
#else
constexpr auto append_avx512 = append_any;
#endif

// Keeps those of the n entries whose lower bound is below the limit; returns how many.
int64_t keep_below_any(float limit, int64_t n, float* least, float* most, uint32_t* index) {
  int64_t n_left = 0;
  for (int64_t i = 0; i < n; ++i) {
    least[n_left] = least[i];
    most[n_left] = most[i];
    index[n_left] = index[i];
    n_left += least[i] < limit;
  }
  return n_left;
}

#if defined(__x86_64__)
CLMFAST_AVX512 int64_t keep_below_avx512(float limit, int64_t n, float* least, float* most, uint32_t* index) {
  int64_t n_left = 0;
  for (int64_t i = 0; i < n; i += LANES) {
    const __mmask16 is_there = n - i >= LANES ? 0xffff : (1u << (n - i)) - 1;
    const __m512 low = _mm512_loadu_ps(least + i), high = _mm512_loadu_ps(most + i);
    const __m512i point = _mm512_loadu_si512(index + i);
    const __mmask16 is_kept = _mm512_mask_cmp_ps_mask(is_there, low, _mm512_set1_ps(limit), _CMP_LT_OQ);
    n_left += write_chosen(is_kept, low, high, point, least + n_left, most + n_left, index + n_left);
  }
  return n_left;
}
#else
constexpr auto keep_below_avx512 = keep_below_any;
#endif

int64_t keep_below(float limit, int64_t n, float* least, float* most, uint32_t* index) {
  static const auto once = pick(keep_below_any, keep_below_any, keep_below_avx512);
  return once(limit, n, least, most, index);
}

// Rows that are measured lie anywhere: memory is asked for them ahead of time.
void fetch(const float* row, int64_t D) {
  constexpr int64_t LINE = 16;
  for (int64_t d = 0; d < D; d += LINE) __builtin_prefetch(row + d);
}

// Bit c is set where group[c] = own, of n <= TILE_COLS.
CLMFAST_BODY uint32_t equal_to_body(int64_t own, const int64_t* group, int64_t n) {
  uint32_t bits = 0;
  if (n == TILE_COLS) {
    for (int64_t c = 0; c < TILE_COLS; ++c) bits |= static_cast<uint32_t>(group[c] == own) << c;
  } else {
    for (int64_t c = 0; c < n; ++c) bits |= static_cast<uint32_t>(group[c] == own) << c;
  }
  return bits;
}

CLMFAST_PER_ISA(uint32_t, equal_to, (int64_t own, const int64_t* group, int64_t n), (own, group, n))

}  // namespace

uint32_t same_group(int64_t own, const int64_t* group, int64_t N, int64_t i_panel) {
  const int64_t first = i_panel * TILE_COLS;
  return equal_to(own, group + first, std::min(TILE_COLS, N - first));
}

uint32_t same_row(int64_t row, int64_t i_panel) {
  const int64_t column = row - i_panel * TILE_COLS;
  return 0 <= column && column < TILE_COLS ? 1u << column : 0;
}

float limit_below(double unit, Neighbour bound) {
  if (bound <= 0) return -INF;
  if (bound > neighbour(std::numeric_limits<float>::max(), 0)) return INF;  // dist2 overflows: the index decides
  // Below the bound lie some of its own dist2: those of a smaller index.
  return limit_for(unit, dist2_of(bound + (Neighbour{1} << 32) - (index_of(bound) == 0)));
}

Search::Search(const Grid& grid, int64_t s, const float* points, int64_t n, int64_t k, int64_t n_views)
    : grid_(grid), s_(s), points_(points), k_(k), n_views_(n_views), rows_(grid, s) {
  capacity_ = std::min(std::max<int64_t>(128, 4 * k), n) + TILE_COLS;
  stride_ = capacity_ + LANES;
  const int64_t n_entries = MOST * n_views * stride_;
  pending_least_.reset(new float[n_entries]);
  pending_most_.reset(new float[n_entries]);
  pending_index_.reset(new uint32_t[n_entries]);
  slots_.reserve(MOST * n_views);
  query_.reserve(MOST);
}

void Search::add(const float* row, const Neighbour* bound) {
  const float rest = (rows_.add(row), rows_.rest(rows_.size() - 1));
  query_.push_back(row);
  for (int64_t v = 0; v < n_views_; ++v)
    slots_.push_back({rest < 0 ? -INF : limit_below(grid_.unit[s_], bound[v]), bound[v], 0, {}});
}

void Search::append(int64_t at, int64_t i_panel, const int32_t* tile_row, uint32_t columns) {
  static const auto once = pick(append_any, append_any, append_avx512);
  Slot& slot = slots_[at];
  const int64_t end = at * stride_ + slot.n_pending;
  slot.n_pending += once(tile_row, grid_.rest_of(s_) + i_panel * TILE_COLS, rows_.rest(at / n_views_), slot.limit, columns,
                         static_cast<uint32_t>(i_panel * TILE_COLS), &pending_least_[end], &pending_most_[end],
                         &pending_index_[end]);
}

// Of more than k pending, k are at most as far as the k-th upper bound. Who is certainly farther, also after rounding
// to float32, is out.
void Search::tighten(int64_t at) {
  Slot& slot = slots_[at];
  float *least = &pending_least_[at * stride_], *most = &pending_most_[at * stride_];
  uint32_t* index = &pending_index_[at * stride_];
  if (slot.n_pending > k_) {
    const float kth = kth_of(most, slot.n_pending, k_);
    const double unit = grid_.unit[s_], distance = kth * (1 + 0x1p-20) / unit, dist2 = distance * distance;
    if (dist2 < std::numeric_limits<float>::max())  // where dist2 overflows, the index decides
      slot.limit = std::min(slot.limit, limit_for(unit, dist2));
  }
  slot.n_pending = keep_below(slot.limit, slot.n_pending, least, most, index);
}

void Search::make_room(int64_t at) {
  tighten(at);
  if (slots_[at].n_pending + TILE_COLS > capacity_) measure(at);  // too many of almost the same distance
}

void Search::measure(int64_t at) {
  Slot& slot = slots_[at];
  auto& nearest = slot.nearest;
  const float* row = query_[at / n_views_];
  nearest.reserve(nearest.size() + slot.n_pending);
  const uint32_t* pending = &pending_index_[at * stride_];
  for (int64_t i = 0; i < slot.n_pending; ++i) {
    const int64_t index = pending[i];
    if (i + 2 < slot.n_pending) fetch(points_ + pending[i + 2] * grid_.D, grid_.D);
    Neighbour found = neighbour(static_cast<float>(pair_dist2(row, points_ + index * grid_.D, grid_.D)), index);
    if (found < slot.bound) nearest.push_back(found);
  }
  slot.n_pending = 0;
  if (static_cast<int64_t>(nearest.size()) < k_) return;
  std::nth_element(nearest.begin(), nearest.begin() + (k_ - 1), nearest.end());
  nearest.resize(k_);
  // Whatever comes later has a larger index, so it must be strictly nearer: of many duplicates the first k end the
  // search.
  const float farthest = dist2_of(nearest.back());
  if (farthest == 0) slot.limit = -INF;
  else if (farthest < INF)
    slot.limit = std::min(slot.limit, limit_for(grid_.unit[s_], farthest));
}

const std::vector<Neighbour>& Search::finish(int64_t query, int64_t view) {
  const int64_t at = query * n_views_ + view;
  tighten(at);
  measure(at);
  std::sort(slots_[at].nearest.begin(), slots_[at].nearest.end());
  return slots_[at].nearest;
}

}  // namespace clmfast
