#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "pair.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

float value_of(uint32_t order) {
  uint32_t bits = order >> 31 ? order & 0x7fffffff : ~order;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The smallest screened value, or one a little above, that proves a dist2 (in the units of the points) of at least
// this. 1 + 2^-30 covers pair_dist2's own rounding, which is below (D + 16) 2^-53.
float limit_for(const Frame& frame, double query_norm2, double dist2) {
  double low = dist2 * (1 + 0x1p-30) * frame.scale * frame.scale;
  double limit = low - (1 - frame.kappa) * query_norm2 + frame.eta;
  return static_cast<float>(limit + std::abs(limit) * 0x1p-22 + 0x1p-140);  // never rounded below
}

// At least the k-th smallest of n keys, and equal to it but for the last 8 bits. Counting from the top bit down has
// no branch to mispredict: for the 24th of 128 keys 0.3 us against 1.2 us of std::nth_element (AVX-512, Xeon of 2.8
// GHz).
CLMFAST_BODY uint32_t kth_key_body(const uint32_t* key, int64_t n, int64_t k) {
  uint32_t kth = 0;
  for (int bit = 31; bit >= 8; --bit) {
    uint32_t middle = kth | 1u << bit;
    int32_t n_below = 0;
    for (int64_t i = 0; i < n; ++i) n_below += key[i] < middle;
    if (n_below < k) kth = middle;
  }
  return kth | 0xff;
}

CLMFAST_PER_ISA(uint32_t, kth_key, (const uint32_t* key, int64_t n, int64_t k), (key, n, k))

CLMFAST_BODY void screen_body(float* tile, int64_t n_rows, const float* low_norm2, const float* limit,
                              uint32_t* passed) {
  for (int64_t r = 0; r < n_rows; ++r) {
    uint32_t bits = 0;
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      float screened = low_norm2[c] - 2 * tile[r * TILE_COLS + c];
      tile[r * TILE_COLS + c] = screened;
      bits |= static_cast<uint32_t>(screened < limit[r]) << c;
    }
    passed[r] = bits;
  }
}

}  // namespace

CLMFAST_PER_ISA(void, screen,
                (float* tile, int64_t n_rows, const float* low_norm2, const float* limit, uint32_t* passed),
                (tile, n_rows, low_norm2, limit, passed))

float limit_below(const Frame& frame, double query_norm2, Neighbour bound) {
  if (!(query_norm2 < INF) || bound <= 0) return -INF;
  if (bound > neighbour(std::numeric_limits<float>::max(), 0)) return INF;  // dist2 overflows: the index decides
  // Below the bound lie some of its own dist2: those of a smaller index.
  return limit_for(frame, query_norm2, dist2_of(bound + (Neighbour{1} << 32) - (index_of(bound) == 0)));
}

std::vector<double> largest_norms(const Packed& packed) {
  std::vector<double> largest(packed.S);
  for (int64_t s = 0; s < packed.S; ++s)
    for (int64_t i = 0; i < packed.N; ++i)
      if (double norm2 = packed.norm2_of(s)[i]; norm2 < INF) largest[s] = std::max(largest[s], norm2);
  return largest;
}

Search::Search(const Packed& packed, int64_t s, double largest_norm2, const float* points, int64_t n, int64_t k,
               int64_t n_views)
    : frame_(frame_of(packed, s)), points_(points), largest_norm2_(largest_norm2), k_(k), n_views_(n_views) {
  capacity_ = std::min(std::max<int64_t>(64, 4 * k), n) + TILE_COLS;
}

void Search::add(const float* row, const Neighbour* bound) {
  const int64_t i = n_queries(), group = i / TILE_ROWS;
  if (i % TILE_ROWS == 0) rows_.resize((group + 1) * TILE_ROWS * frame_.D);
  query_.push_back(row);
  norm2_.push_back(pack_row(frame_, row, &rows_[group * TILE_ROWS * frame_.D + i % TILE_ROWS], TILE_ROWS));
  for (int64_t v = 0; v < n_views_; ++v) slots_.push_back({limit_below(frame_, norm2_[i], bound[v]), bound[v], 0, {}});
  pending_key_.resize(slots_.size() * capacity_);
  pending_index_.resize(slots_.size() * capacity_);
}

// Of more than k pending, k are at most as far as the k-th screened value allows. What is screened at or above the
// limit is certainly farther, also after rounding to float32, and out.
void Search::tighten(int64_t at) {
  Slot& slot = slots_[at];
  uint32_t* key = &pending_key_[at * capacity_];
  int32_t* index = &pending_index_[at * capacity_];
  if (slot.n_pending > k_) {
    const double norm2 = norm2_[at / n_views_];
    double low = value_of(kth_key(key, slot.n_pending, k_)) + (1 - frame_.kappa) * norm2 - frame_.eta;
    double high = low + 2 * frame_.kappa * (norm2 + largest_norm2_) + 2 * frame_.eta;
    double dist2 = high / frame_.scale / frame_.scale * (1 + 0x1p-22) + 0x1p-148;
    if (dist2 < std::numeric_limits<float>::max())  // where dist2 overflows, the index decides
      slot.limit = std::min(slot.limit, limit_for(frame_, norm2, dist2));
  }
  const uint32_t limit = order_of(slot.limit);
  int64_t n_left = 0;
  for (int64_t i = 0; i < slot.n_pending; ++i) {
    key[n_left] = key[i];
    index[n_left] = index[i];
    n_left += key[i] < limit;
  }
  slot.n_pending = n_left;
}

void Search::measure(int64_t at) {
  Slot& slot = slots_[at];
  auto& nearest = slot.nearest;
  const float* row = query_[at / n_views_];
  nearest.reserve(nearest.size() + slot.n_pending);
  for (int64_t i = 0; i < slot.n_pending; ++i) {
    const int64_t index = pending_index_[at * capacity_ + i];
    Neighbour found = neighbour(static_cast<float>(pair_dist2(row, points_ + index * frame_.D, frame_.D)), index);
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
  else if (farthest < INF) slot.limit = std::min(slot.limit, limit_for(frame_, norm2_[at / n_views_], farthest));
}

const std::vector<Neighbour>& Search::finish(int64_t query, int64_t view) {
  const int64_t at = query * n_views_ + view;
  tighten(at);
  measure(at);
  std::sort(slots_[at].nearest.begin(), slots_[at].nearest.end());
  return slots_[at].nearest;
}

}  // namespace clmfast
