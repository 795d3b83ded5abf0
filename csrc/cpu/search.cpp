#include "search.h"

#include <limits>

#include "isa.h"
#include "pair.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr uint32_t REFINED = 1u << 31;

// A distance in steps that no point exceeds whose dist2, rounded to float32, is at most this.
float limit_for(double unit, double dist2) {
  return static_cast<float>(std::sqrt(dist2 * (1 + 0x1p-22) + 0x1p-148) * unit * (1 + 0x1p-20));
}

// At least the k-th smallest of n floats >= 0, and equal to it but for the last 8 bits. Their bits sort as integers.
// Counting from the top bit down has nothing to predict, which partial sorting has.
CLMFAST_BODY float kth_of_body(const float* x, int64_t n, int64_t k) {
  uint32_t kth = 0;
  for (int bit = 30; bit >= 8; --bit) {
    const uint32_t middle = kth | 1u << bit;
    int32_t n_below = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      n_below += bits < middle;
    }
    if (n_below < k) kth = middle;
  }
  kth |= 0xff;
  float value;
  std::memcpy(&value, &kth, sizeof value);
  return value < INF ? value : INF;
}

CLMFAST_PER_ISA(float, kth_of, (const float* x, int64_t n, int64_t k), (x, n, k))

}  // namespace

float limit_below(double unit, Neighbour bound) {
  if (bound <= 0) return -INF;
  if (bound > neighbour(std::numeric_limits<float>::max(), 0)) return INF;  // dist2 overflows: the index decides
  // Below the bound lie some of its own dist2: those of a smaller index.
  return limit_for(unit, dist2_of(bound + (Neighbour{1} << 32) - (index_of(bound) == 0)));
}

Search::Search(const Grid& grid, int64_t s, const float* points, int64_t n, int64_t k, int64_t n_views)
    : grid_(grid), s_(s), points_(points), k_(k), n_views_(n_views), rows_(grid, s) {
  capacity_ = std::min(std::max<int64_t>(256, 4 * k), n) + TILE_COLS;
}

void Search::add(const float* row, const Neighbour* bound) {
  const float rest = (rows_.add(row), rows_.rest(rows_.size() - 1));
  query_.push_back(row);
  for (int64_t v = 0; v < n_views_; ++v)
    slots_.push_back({rest < 0 ? -INF : limit_below(grid_.unit[s_], bound[v]), bound[v], 0, {}});
  pending_least_.resize(slots_.size() * capacity_);
  pending_most_.resize(slots_.size() * capacity_);
  pending_index_.resize(slots_.size() * capacity_);
}

// Of more than k pending, k are at most as far as the k-th upper bound, which is returned. Who is certainly farther,
// also after rounding to float32, is out.
float Search::tighten(int64_t at) {
  Slot& slot = slots_[at];
  float *least = &pending_least_[at * capacity_], *most = &pending_most_[at * capacity_];
  uint32_t* index = &pending_index_[at * capacity_];
  float kth = INF;
  if (slot.n_pending > k_) {
    kth = kth_of(most, slot.n_pending, k_);
    const double unit = grid_.unit[s_], distance = kth * (1 + 0x1p-20) / unit, dist2 = distance * distance;
    if (dist2 < std::numeric_limits<float>::max())  // where dist2 overflows, the index decides
      slot.limit = std::min(slot.limit, limit_for(unit, dist2));
  }
  int64_t n_left = 0;
  for (int64_t i = 0; i < slot.n_pending; ++i) {
    least[n_left] = least[i];
    most[n_left] = most[i];
    index[n_left] = index[i];
    n_left += least[i] < slot.limit;
  }
  slot.n_pending = n_left;
  return kth;
}

// Better bounds for those whose upper bound is at most `up_to`.
void Search::refine(int64_t at, float up_to) {
  const float* row = query_[at / n_views_];
  const double error = (static_cast<double>(grid_.D) / 16 + 20) * 0x1p-23;
  for (int64_t i = at * capacity_; i < at * capacity_ + slots_[at].n_pending; ++i) {
    const uint32_t index = pending_index_[i];
    if (index & REFINED || pending_most_[i] > up_to) continue;
    pending_index_[i] |= REFINED;
    const float quick = quick_dist2(row, points_ + index * grid_.D, grid_.D);
    if (!(quick > 0x1p-100f && quick < INF)) continue;
    const double distance = std::sqrt(static_cast<double>(quick)) * grid_.unit[s_];
    pending_least_[i] = static_cast<float>(distance * (1 - error));
    pending_most_[i] = static_cast<float>(distance * (1 + error));
  }
}

void Search::make_room(int64_t at) {
  const Slot& slot = slots_[at];
  const float kth = tighten(at);
  if (slot.n_pending <= capacity_ / 2) return;
  refine(at, kth);
  tighten(at);
  if (slot.n_pending <= capacity_ / 2) return;
  refine(at, INF);
  tighten(at);
  if (slot.n_pending + TILE_COLS > capacity_) measure(at);  // too many of almost the same distance
}

void Search::measure(int64_t at) {
  Slot& slot = slots_[at];
  auto& nearest = slot.nearest;
  const float* row = query_[at / n_views_];
  nearest.reserve(nearest.size() + slot.n_pending);
  for (int64_t i = 0; i < slot.n_pending; ++i) {
    const int64_t index = pending_index_[at * capacity_ + i] & ~REFINED;
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
  refine(at, tighten(at));
  tighten(at);
  refine(at, INF);
  tighten(at);
  measure(at);
  std::sort(slots_[at].nearest.begin(), slots_[at].nearest.end());
  return slots_[at].nearest;
}

}  // namespace clmfast
