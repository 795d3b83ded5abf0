// knn on the CPU. Blocks of queries meet all points. In the self form a block of points meets itself first, then two
// blocks meet once, and both look for neighbours in the same numbers; unless i may be barred from j and j not from i.
#include "../knn.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "groups.h"
#include "kinds.h"
#include "pair.h"
#include "search.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
// Queries of a task that meet all points: whole GridRows, many enough to reuse panels, few enough for many threads.
constexpr int64_t QUERY_BLOCK = 4 * GridRows::MOST;

// Points of a block in the self form. The more a query sees at once, the fewer it measures in vain; but threads share
// the blocks out.
int64_t point_block(int64_t S, int64_t N) {
  constexpr int64_t MOST = 16 * PANEL, LEAST = 8 * PANEL, ENOUGH = 12;  // meetings at a time
  return S * (n_panels(N) * PANEL / MOST / 2) >= ENOUGH ? MOST : LEAST;
}

// Neighbours at dist2 <= within lie below this.
Neighbour bound_of(float within) {
  if (!(within >= 0)) return 0;
  return neighbour(within, 0) + (Neighbour{1} << 32);
}

// to[c][r] = from[r][c] of a panel of columns.
void mirror(const float* from, int64_t n_rows, float* to, int64_t stride) {
  for (int64_t c = 0; c < PANEL; ++c)
    for (int64_t r = 0; r < n_rows; ++r) to[c * stride + r] = from[r * stride + c];
}

// Turning a row costs TURNED D products in float32, about twice as many in whole numbers.
bool pays_to_turn(const Knn& op) {
  const int64_t of_turning = 2 * TURNED * op.D * (op.N + op.Q + 512);
  return op.Q * op.N * (op.D - TURNED) > 2 * of_turning;
}

void nobody_else(int64_t, float) {}

// Are the numbers of two points for both of them? Not where the groups that points bar are not those that they are of.
bool is_mutual(const Knn& op) {
  const KnnView& view = op.view[0];
  return op.is_self && (!view.query_group || std::equal(view.query_group, view.query_group + op.N, view.point_group));
}

struct Search {
  const Knn& op;
  const Grid &points, &queries;
  const std::vector<Groups>& groups;  // of each view

  const float* query(int64_t s, int64_t i) const {
    return (op.is_self ? op.points : op.queries) + (s * op.Q + i) * op.D;
  }

  // Of query i, as answer a of its set; the list is the memory of op.index.
  Nearest nearest(int64_t s, int64_t i, int64_t a) const {
    Neighbour* list = op.index + (s * op.A + a) * op.k;
    std::fill_n(list, op.k, NO_NEIGHBOUR);
    const Neighbour bound = op.within ? bound_of(op.within[s * op.Q + i]) : NO_NEIGHBOUR;
    return Nearest(list, op.k, points.unit[s], bound);
  }

  // Calls bar(point) for points first, ..., first + n - 1 that query i may not find as answer r of view v.
  template <class Bar>
  void for_barred(int v, int64_t i, int64_t r, int64_t first, int64_t n, const Bar& bar) const {
    if (op.is_self && first <= i && i < first + n) bar(i);
    if (op.view[v].query_group) groups[v].for_members(op.view[v].query_group[r], first, n, bar);
  }

  bool is_barred(int v, int64_t i, int64_t r, int64_t point) const {
    const KnnView& view = op.view[v];
    return (op.is_self && i == point) || (view.query_group && view.query_group[r] == view.point_group[point]);
  }

  // Query i looks at a row of numbers.
  template <class Found>
  void look_at(int64_t s, int64_t i, int64_t first, int64_t n, const float* dist2, const float* column_limit,
               Nearest& own, const Found& found) const {
    const float* all = op.points + s * op.N * op.D;
    look({dist2, first, n, queries.rest_of(s)[i], points.rest_of(s) + first, column_limit, query(s, i), all, op.D},
         op.k, own, found);
  }

  // Lists to answers.
  void write(int64_t s, int64_t first, int64_t n) const {
    for (int64_t e = (s * op.A + first) * op.k; e < (s * op.A + first + n) * op.k; ++e) {
      const Neighbour found = op.index[e];
      op.dist2[e] = found == NO_NEIGHBOUR ? INF : dist2_of(found);
      op.index[e] = found == NO_NEIGHBOUR ? -1 : index_of(found);
    }
  }
};

// ---- queries that meet all points

// What query i asks in view v is answer r of the view: visit(v, r, answer of the set).
template <class Visit>
void for_views(const Knn& op, int64_t i, const Visit& visit) {
  int64_t first = 0;  // answer of the view
  for (int v = 0; v < op.n_views; first += op.view[v++].Q)
    if (const int64_t r = i - (op.Q - op.view[v].Q); r >= 0) visit(v, r, first + r);
}

// Queries at, ..., at + n - 1 of the only set.
void search_queries(const Search& search, int64_t at, int64_t n) {
  const Knn& op = search.op;
  std::vector<Nearest> nearest(n * op.n_views);
  for (int64_t i = at; i < at + n; ++i)
    for_views(op, i, [&](int v, int64_t, int64_t answer) {
      nearest[(i - at) * op.n_views + v] = search.nearest(0, i, answer);
    });
  std::vector<std::pair<int64_t, float>> barred;  // column, and what stood there
  sweep(grid_rows(search.queries, 0, at, n), search.points, 0, n_panels(op.N),
        [&](int64_t row, int64_t first, int64_t n_columns, float* dist2) {
          for_views(op, at + row, [&](int v, int64_t r, int64_t) {
            search.for_barred(v, at + row, r, first, n_columns, [&](int64_t point) {
              barred.emplace_back(point - first, dist2[point - first]);
              dist2[point - first] = INF;
            });
            search.look_at(0, at + row, first, n_columns, dist2, nullptr, nearest[row * op.n_views + v], nobody_else);
            for (; !barred.empty(); barred.pop_back()) dist2[barred.back().first] = barred.back().second;
          });
        });
  for (int64_t i = at; i < at + n; ++i)
    for_views(op, i, [&](int, int64_t, int64_t answer) { search.write(0, answer, 1); });
}

using Kinds = std::vector<std::vector<int64_t>>;

// The same among points of a few kinds: each is measured once for all queries that are equal.
void search_kinds(const Search& search, const Kinds& kinds, int64_t at, int64_t n) {
  const Knn& op = search.op;
  std::vector<Neighbour> near;  // dist2 and kind
  std::vector<int64_t> tied, n_found;
  for (const std::vector<int64_t>& equal : kinds_of(search.query(0, at), n, op.D, n)) {
    const float* query = search.query(0, at + equal[0]);
    near.clear();
    for (const std::vector<int64_t>& kind : kinds) {
      const float* point = op.points + kind[0] * op.D;
      if (!is_finite_row(point, op.D) || !is_finite_row(query, op.D)) continue;
      near.push_back(neighbour(static_cast<float>(pair_dist2(query, point, op.D)), &kind - kinds.data()));
    }
    std::sort(near.begin(), near.end());
    n_found.assign(op.A, 0);
    bool is_full = false;
    for (size_t begin = 0, end = 0; begin < near.size() && !is_full; begin = end) {
      // Kinds at the same distance are one, in order of index.
      const float dist2 = dist2_of(near[begin]);
      tied.clear();
      for (; end < near.size() && dist2_of(near[end]) == dist2; ++end) {
        const std::vector<int64_t>& kind = kinds[index_of(near[end])];
        tied.insert(tied.end(), kind.begin(), kind.end());
      }
      std::sort(tied.begin(), tied.end());
      is_full = true;
      for (int64_t place : equal) {
        const int64_t i = at + place;
        if (op.within && !(dist2 <= op.within[i])) continue;
        for_views(op, i, [&](int v, int64_t r, int64_t answer) {
          int64_t& e = n_found[answer];
          for (size_t m = 0; m < tied.size() && e < op.k; ++m) {
            if (search.is_barred(v, i, r, tied[m])) continue;
            op.dist2[answer * op.k + e] = dist2;
            op.index[answer * op.k + e++] = tied[m];
          }
          is_full &= e == op.k;
        });
      }
    }
    for (int64_t place : equal)
      for_views(op, at + place, [&](int, int64_t, int64_t answer) {
        for (int64_t e = n_found[answer]; e < op.k; ++e) {
          op.dist2[answer * op.k + e] = INF;
          op.index[answer * op.k + e] = -1;
        }
      });
  }
}

Knn one_set(Knn op, int64_t s) {
  op.S = 1;
  op.points += s * op.N * op.D;
  if (op.queries) op.queries += s * op.Q * op.D;
  if (op.within) op.within += s * op.Q;
  op.dist2 += s * op.A * op.k;
  op.index += s * op.A * op.k;
  return op;
}

void search_set(const Knn& op, const std::vector<Groups>& groups, ParallelFor parallel_for) {
  auto for_blocks = [&](const auto& task) {
    for_each(parallel_for, (op.Q + QUERY_BLOCK - 1) / QUERY_BLOCK, [&](int64_t block) {
      task(block * QUERY_BLOCK, std::min(QUERY_BLOCK, op.Q - block * QUERY_BLOCK));
    });
  };
  // A point that is measured costs about as much as eight that are screened.
  if (const Kinds kinds = kinds_of(op.points, op.N, op.D, op.N / 8); !kinds.empty()) {
    const Grid none = {};
    const Search search{op, none, none, groups};
    return for_blocks([&](int64_t at, int64_t n) { search_kinds(search, kinds, at, n); });
  }
  const GridMemory points(1, op.N, op.D), queries(1, op.is_self ? 0 : op.Q, op.D, &points);
  make_grid(points, 0, op.points, pays_to_turn(op));
  move_to_grid(points, op.points, parallel_for);
  if (!op.is_self) move_to_grid(queries, op.queries, parallel_for);
  const Search search{op, points, op.is_self ? points : queries, groups};
  for_blocks([&](int64_t at, int64_t n) { search_queries(search, at, n); });
}

// ---- points that meet each other

struct Meetings {
  const Search& search;
  const Knn& op = search.op;
  const Grid& points = search.points;
  const int64_t block_size = point_block(op.S, op.N);
  const int64_t n_blocks = (op.N + block_size - 1) / block_size, stride = n_blocks * block_size;
  std::vector<Nearest> nearest = std::vector<Nearest>(op.S * stride);
  std::vector<float> limit = std::vector<float>(op.S * stride, -INF);

  int64_t size_of(int64_t block) const { return std::min(block_size, op.N - block * block_size); }

  // Point i looks at a row of numbers.
  template <class Found>
  void look_at(int64_t s, int64_t i, int64_t first, int64_t n, float* dist2, const float* column_limit,
               const Found& found) {
    search.for_barred(0, i, i, first, n, [&](int64_t point) { dist2[point - first] = INF; });
    Nearest& own = nearest[s * stride + i];
    search.look_at(s, i, first, n, dist2, column_limit, own, found);
    limit[s * stride + i] = own.limit();
  }

  // The points of a block look at each other: each at all others at once, so that its limit is low when it meets other
  // blocks. Of their numbers, which are the same both ways, half is copied.
  void meet_itself(int64_t s, int64_t block) {
    const int64_t at = block * block_size, n = n_panels(size_of(block));
    const int64_t row_stride = (n + 1) * PANEL;  // no power of two, as in sweep
    std::unique_ptr<float[]> dist2(new float[(n * PANEL + GridRows::MOST) * row_stride]);
    int64_t r = 0;
    for (const GridRows& rows : grid_rows(points, s, at, size_of(block))) {
      for (int64_t p = r / PANEL; p < n; ++p) {
        float* tile = &dist2[r * row_stride + p * PANEL];
        rows.dist2(points, at / PANEL + p, tile, row_stride);
        if (p > r / PANEL) mirror(tile, rows.size(), &dist2[p * PANEL * row_stride + r], row_stride);
      }
      r += rows.size();
    }
    for (r = 0; r < size_of(block); ++r) {
      nearest[s * stride + at + r] = search.nearest(s, at + r, at + r);
      look_at(s, at + r, at, n * PANEL, &dist2[r * row_stride], nullptr, nobody_else);
    }
  }

  // Two blocks of points look at each other.
  void meet(int64_t s, int64_t block, int64_t other) {
    const int64_t at = block * block_size, begin_panel = other * block_size / PANEL;
    sweep(grid_rows(points, s, at, size_of(block)), points, begin_panel, begin_panel + n_panels(size_of(other)),
          [&](int64_t r, int64_t first, int64_t n, float* dist2) {
            look_at(s, at + r, first, n, dist2, &limit[s * stride + first], [&](int64_t c, float measured) {
              Nearest& of_column = nearest[s * stride + first + c];
              of_column.take(neighbour(measured, at + r));
              limit[s * stride + first + c] = of_column.limit();
            });
          });
  }
};

// A round-robin tournament: in each of n_rounds(n) rounds every block is in at most one pair, and every two blocks meet
// once. The last of an even number stays, the others go round.
int64_t n_rounds(int64_t n) { return n % 2 ? n : n - 1; }

std::vector<std::pair<int64_t, int64_t>> pairs_of(int64_t n, int64_t round) {
  const int64_t n_turning = n_rounds(n);
  std::vector<std::pair<int64_t, int64_t>> pairs;
  if (n_turning < n) pairs.emplace_back(round, n - 1);
  for (int64_t i = 1; i <= (n_turning - 1) / 2; ++i)
    pairs.emplace_back((round + i) % n_turning, (round + n_turning - i) % n_turning);
  return pairs;
}

}  // namespace

void knn_cpu(const Knn& op, ParallelFor parallel_for) {
  std::vector<Groups> groups;
  for (int v = 0; v < op.n_views; ++v)
    groups.push_back(op.view[v].point_group ? Groups(op.view[v].point_group, op.N) : Groups());
  if (!is_mutual(op)) {
    constexpr int64_t ENOUGH = 12;  // sets to share out among threads, each of which then stays in its second cache
    auto search = [&](int64_t s, ParallelFor within) { search_set(one_set(op, s), groups, within); };
    if (op.S >= ENOUGH) for_each(parallel_for, op.S, [&](int64_t s) { search(s, in_line); });
    else for (int64_t s = 0; s < op.S; ++s) search(s, parallel_for);
    return;
  }
  const GridMemory points(op.S, op.N, op.D);
  for_each(parallel_for, op.S, [&](int64_t s) { make_grid(points, s, op.points, true); });
  move_to_grid(points, op.points, parallel_for);
  const Search search{op, points, points, groups};
  Meetings meetings{search};
  const int64_t n_blocks = meetings.n_blocks;
  for_each(parallel_for, op.S * n_blocks,
           [&](int64_t task) { meetings.meet_itself(task / n_blocks, task % n_blocks); });
  for (int64_t round = 0; n_blocks > 1 && round < n_rounds(n_blocks); ++round) {
    const auto pairs = pairs_of(n_blocks, round);
    const int64_t n_pairs = static_cast<int64_t>(pairs.size());
    for_each(parallel_for, op.S * n_pairs, [&](int64_t task) {
      meetings.meet(task / n_pairs, pairs[task % n_pairs].first, pairs[task % n_pairs].second);
    });
  }
  for_each(parallel_for, op.S * n_blocks, [&](int64_t task) {
    search.write(task / n_blocks, task % n_blocks * meetings.block_size, meetings.size_of(task % n_blocks));
  });
}

}  // namespace clmfast
