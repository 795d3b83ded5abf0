// knn on the CPU: screen in float32 by tiles, decide in float64 (panels.h has the bound that makes this exact).
//
// One task is a block of queries of one set. It meets the points panel by panel in ascending order. What passes a
// query's limit waits in `pending`; when that is full, the screened values themselves tell which of it can still be
// among the k nearest, and only those are measured.
#include "../knn.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"
#include "pair.h"
#include "panels.h"

namespace clmfast {
namespace {

constexpr int64_t BLOCK =
    4 * TILE_ROWS;  // queries of one task: enough to reuse a panel, few enough to balance the threads
constexpr float INF = std::numeric_limits<float>::infinity();

struct PackedSet {
  Frame frame;
  std::unique_ptr<float[]> panels;     // [n_panels, D, TILE_COLS]
  std::unique_ptr<float[]> low_norm2;  // [n_panels * TILE_COLS]: (1 - kappa) |p~|^2, infinity where there is no point
  std::vector<double> panel_norm2;     // [n_panels]: the largest |p~|^2 in each
  double largest_norm2;
};

// Floats as integers of the same order: the bits of a negative one are inverted, those of another put above them.
uint32_t key_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

float value_of(uint32_t key) {
  uint32_t bits = key >> 31 ? key & 0x7fffffff : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A neighbour as one integer that sorts by dist2 and then by index.
using Neighbour = uint64_t;

Neighbour neighbour(float dist2, int64_t index) {
  return static_cast<uint64_t>(key_of(dist2)) << 32 | static_cast<uint64_t>(index);
}
float dist2_of(Neighbour x) { return value_of(static_cast<uint32_t>(x >> 32)); }
int64_t index_of(Neighbour x) { return static_cast<int64_t>(x & 0xffffffff); }

struct Query {
  const float* row;
  double norm2;                    // A^2 of panels.h
  float within;                    // largest dist2 of a neighbour
  float limit;                     // what is screened at or above it is no neighbour
  std::vector<Neighbour> nearest;  // the best k measured so far
  uint32_t* pending_key;           // of the screened value; [capacity]
  int32_t* pending_index;
  int64_t n_pending = 0;
};

// The smallest screened value that proves a dist2 (in the units of the points) of at least this.
// 1 + 2^-30 covers pair_dist2's own rounding, which is below (D + 16) 2^-53.
float limit_for(const Query& query, const Frame& frame, double dist2) {
  double low = dist2 * (1 + 0x1p-30) * frame.scale * frame.scale;
  return std::nextafter(static_cast<float>(low - (1 - frame.kappa) * query.norm2 + frame.eta), INF);
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

// Of more than k pending, k are at most as far as the k-th screened value allows. What is screened at or above the
// value returned is certainly farther, also after rounding to float32, and out.
float limit_of_pending(const Query& query, const PackedSet& set, int64_t k) {
  const Frame& frame = set.frame;
  double low = value_of(kth_key(query.pending_key, query.n_pending, k)) + (1 - frame.kappa) * query.norm2 - frame.eta;
  double high = low + 2 * frame.kappa * (query.norm2 + set.largest_norm2) + 2 * frame.eta;
  double dist2 = high / frame.scale / frame.scale * (1 + 0x1p-22) + 0x1p-148;
  if (dist2 >= std::numeric_limits<float>::max()) return INF;  // where dist2 overflows, the index decides
  return limit_for(query, frame, dist2);
}

void measure_pending(Query& query, const PackedSet& set, const float* points, int64_t D, int64_t k) {
  auto& nearest = query.nearest;
  float limit = query.limit;
  if (query.n_pending > k) limit = std::min(limit, limit_of_pending(query, set, k));
  const uint32_t limit_key = key_of(limit);
  for (int64_t i = 0; i < query.n_pending; ++i) {
    if (query.pending_key[i] >= limit_key) continue;
    const int64_t index = query.pending_index[i];
    const float dist2 = static_cast<float>(pair_dist2(query.row, points + index * D, D));
    if (dist2 <= query.within) nearest.push_back(neighbour(dist2, index));
  }
  query.n_pending = 0;
  if (static_cast<int64_t>(nearest.size()) < k) return;
  std::nth_element(nearest.begin(), nearest.begin() + (k - 1), nearest.end());
  nearest.resize(k);
  // Whatever comes later has a larger index, so it must be strictly nearer: of many duplicates the first k end the
  // search.
  float farthest = dist2_of(nearest.back());
  query.limit = farthest == 0 ? -INF : farthest == INF ? INF : limit_for(query, set.frame, farthest);
}

// Bit c of passed[r] is set where column c of row r passes that row's limit; screened values replace the dot products.
CLMFAST_BODY void screen_body(float* dot, int64_t n_rows, const float* low_norm2, const float* limit,
                              uint32_t* passed) {
  for (int64_t r = 0; r < n_rows; ++r) {
    uint32_t bits = 0;
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      float screened = low_norm2[c] - 2 * dot[r * TILE_COLS + c];
      dot[r * TILE_COLS + c] = screened;
      bits |= static_cast<uint32_t>(screened < limit[r]) << c;
    }
    passed[r] = bits;
  }
}

CLMFAST_PER_ISA(void, screen,
                (float* dot, int64_t n_rows, const float* low_norm2, const float* limit, uint32_t* passed),
                (dot, n_rows, low_norm2, limit, passed))

void search_block(const Knn& op, const PackedSet& set, int64_t s, int64_t first) {
  const int64_t N = op.N, D = op.D, k = op.k;
  const float* points = op.points + s * N * D;
  const float* queries = op.is_self ? points : op.queries + s * op.Q * D;
  const int64_t n_queries = std::min(BLOCK, op.Q - first);
  const int64_t capacity = std::min(std::max<int64_t>(64, 4 * k), N) + TILE_COLS;

  std::vector<uint32_t> pending_key(n_queries * capacity);
  std::vector<int32_t> pending_index(n_queries * capacity);
  std::vector<float> rows(BLOCK * D);  // [groups of TILE_ROWS queries, D, TILE_ROWS]
  std::vector<Query> block(n_queries);
  for (int64_t i = 0; i < n_queries; ++i) {
    Query& query = block[i];
    query.row = queries + (first + i) * D;
    query.norm2 = pack_row(set.frame, query.row, &rows[i / TILE_ROWS * TILE_ROWS * D + i % TILE_ROWS], TILE_ROWS);
    query.within = op.within ? op.within[s * op.Q + first + i] : INF;
    const bool has_neighbours = query.norm2 < INF && query.within >= 0;
    const float too_far = std::nextafter(query.within, INF);
    query.limit = !has_neighbours ? -INF : too_far < INF ? limit_for(query, set.frame, too_far) : INF;
    query.nearest.reserve(std::min(k, N) + capacity);
    query.pending_key = &pending_key[i * capacity];
    query.pending_index = &pending_index[i * capacity];
  }

  alignas(64) float tile[TILE_ROWS * TILE_COLS];
  float limit[TILE_ROWS];
  uint32_t passed[TILE_ROWS];
  for (int64_t i_panel = 0; i_panel < n_panels(N); ++i_panel) {
    for (int64_t group = 0; group < n_queries; group += TILE_ROWS) {
      const int64_t n_rows = std::min(TILE_ROWS, n_queries - group);
      for (int64_t r = 0; r < n_rows; ++r) limit[r] = block[group + r].limit;
      dot_tile(&rows[group * D], n_rows, &set.panels[i_panel * D * TILE_COLS], D, tile);
      screen(tile, n_rows, &set.low_norm2[i_panel * TILE_COLS], limit, passed);
      for (int64_t r = 0; r < n_rows; ++r) {
        Query& query = block[group + r];
        const int64_t i_query = first + group + r;
        for (uint32_t bits = passed[r]; bits; bits &= bits - 1) {
          const int64_t c = __builtin_ctz(bits), i_point = i_panel * TILE_COLS + c;
          if (op.is_self && i_point == i_query) continue;
          if (op.query_group && op.query_group[i_query] == op.point_group[i_point]) continue;
          query.pending_key[query.n_pending] = key_of(tile[r * TILE_COLS + c]);
          query.pending_index[query.n_pending++] = static_cast<int32_t>(i_point);
        }
        if (query.n_pending + TILE_COLS > capacity) measure_pending(query, set, points, D, k);
      }
    }
  }

  for (int64_t i = 0; i < n_queries; ++i) {
    Query& query = block[i];
    measure_pending(query, set, points, D, k);
    std::sort(query.nearest.begin(), query.nearest.end());
    const int64_t out = (s * op.Q + first + i) * k, n_found = static_cast<int64_t>(query.nearest.size());
    for (int64_t e = 0; e < k; ++e) {
      op.dist2[out + e] = e < n_found ? dist2_of(query.nearest[e]) : INF;
      op.index[out + e] = e < n_found ? index_of(query.nearest[e]) : -1;
    }
  }
}

}  // namespace

void knn_cpu(const Knn& op, ParallelFor parallel_for) {
  const int64_t N = op.N, D = op.D, panels = n_panels(N), blocks = (op.Q + BLOCK - 1) / BLOCK;
  std::vector<PackedSet> sets(op.S);
  for_each(parallel_for, op.S, [&](int64_t s) {
    PackedSet& set = sets[s];
    const float* queries = op.is_self ? nullptr : op.queries + s * op.Q * D;
    set.frame = frame_of(op.points + s * N * D, N, queries, op.is_self ? 0 : op.Q, D);
    set.panels.reset(new float[panels * D * TILE_COLS]);
    set.low_norm2.reset(new float[panels * TILE_COLS]);
    set.panel_norm2.resize(panels);
  });
  for_each(parallel_for, op.S * panels, [&](int64_t task) {
    const int64_t s = task / panels, i_panel = task % panels;
    PackedSet& set = sets[s];
    double norm2[TILE_COLS];
    pack_panel(set.frame, op.points + s * N * D, N, i_panel, &set.panels[i_panel * D * TILE_COLS], norm2);
    for (int64_t c = 0; c < TILE_COLS; ++c) {
      set.low_norm2[i_panel * TILE_COLS + c] = static_cast<float>((1 - set.frame.kappa) * norm2[c]);
      if (norm2[c] < INF) set.panel_norm2[i_panel] = std::max(set.panel_norm2[i_panel], norm2[c]);
    }
  });
  for (PackedSet& set : sets)
    set.largest_norm2 = set.panel_norm2.empty() ? 0 : *std::max_element(set.panel_norm2.begin(), set.panel_norm2.end());
  for_each(parallel_for, op.S * blocks,
           [&](int64_t task) { search_block(op, sets[task / blocks], task / blocks, task % blocks * BLOCK); });
}

}  // namespace clmfast
