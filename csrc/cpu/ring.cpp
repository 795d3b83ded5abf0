// Rings on the CPU. A step of ring_knn, with the sets side by side:
//   search   the rows that changed meet all panels. Each tile of distances serves both sides: the changed rows look for
//            their own neighbours, and the rows of the panel for new ones among the changed.
//   merge    the lists of the rows that stay: out with what is gone, in with what was found.
//   refill   rows whose list ran short search again.
#include "../ring.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "pair.h"
#include "panels.h"
#include "search.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

struct Changed {
  int64_t N, first, count;

  bool has(int64_t i) const {
    int64_t behind = i - first;
    return (behind < 0 ? behind + N : behind) < count;
  }

  // The filled ones, ascending.
  std::vector<int64_t> rows(int64_t n) const {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < n; ++i)
      if (has(i)) rows.push_back(i);
    return rows;
  }
};

// A new point that a query which stays must take into its list.
struct Arrival {
  int64_t view, query;
  Neighbour point;
};

// Puts the point in its place; what falls off the end of a full list is the new bound.
void insert(Neighbour* list, int64_t length, Neighbour& bound, Neighbour point) {
  if (point >= bound) return;
  const Neighbour last = list[length - 1];
  if (last != NO_NEIGHBOUR) bound = std::max(last, point);
  if (point > last) return;
  int64_t e = length - 1;
  for (; e > 0 && list[e - 1] > point; --e) list[e] = list[e - 1];
  list[e] = point;
}

struct Update {
  const RingKnn& op;
  const Grid &points, &queries;
  ParallelFor parallel_for;
  const int64_t S = points.S, D = points.D, N = points.N, Q = queries.N;
  const Changed changed_points{N, op.points.first, op.points.count}, changed_queries{Q, op.queries.first,
                                                                                     op.queries.count};
  // Of the queries that stay, all views: the distance that the rest of the point may be added to. -infinity: of others.
  std::vector<float> limit = std::vector<float>(S * n_panels(Q) * TILE_COLS);

  Neighbour* list(int64_t v, int64_t s, int64_t q) const { return op.key + ((v * S + s) * Q + q) * op.length; }
  Neighbour& bound(int64_t v, int64_t s, int64_t q) const { return op.bound[(v * S + s) * Q + q]; }
  const float* point(int64_t s, int64_t i) const { return op.points.points + (s * N + i) * D; }
  const float* query(int64_t s, int64_t q) const { return op.queries.points + (s * Q + q) * D; }

  bool is_barred(int64_t v, int64_t q, int64_t i) const {
    return (op.is_self && q == i) || op.query_group[v * Q + q] == op.point_group[v * N + i];
  }

  void find_limits(int64_t s) {
    float* out = &limit[s * n_panels(Q) * TILE_COLS];
    std::fill_n(out, n_panels(Q) * TILE_COLS, -INF);
    for (int64_t q = 0; q < op.queries.n; ++q) {
      if (changed_queries.has(q)) continue;
      for (int64_t v = 0; v < op.V; ++v) out[q] = std::max(out[q], limit_below(queries.unit[s], bound(v, s, q)));
      out[q] += queries.rest_of(s)[q];
    }
  }

  // The queries `rows` [n] look for their neighbours, and write their lists.
  // With `arrivals`, queries that stay also look for neighbours among `rows`, which are points then.
  void search(int64_t s, const int64_t* rows, int64_t n, std::vector<Arrival>* arrivals) const {
    Search search(points, s, point(s, 0), op.points.n, op.length, op.V);
    const std::vector<Neighbour> no_bound(op.V, NO_NEIGHBOUR);
    for (int64_t i = 0; i < n; ++i) search.add(query(s, rows[i]), no_bound.data());
    auto barred = [&](int64_t v, int64_t i, int64_t i_panel) {
      return (op.is_self ? same_row(rows[i], i_panel) : 0) |
             same_group(op.query_group[v * Q + rows[i]], op.point_group + v * N, N, i_panel);
    };
    int32_t tile[TILE_ROWS * TILE_COLS];
    for (int64_t i_panel = 0; i_panel < n_panels(op.points.n); ++i_panel) {
      for (int64_t group = 0; group < search.rows().n_groups(); ++group) {
        search.rows().dist2(group, points, i_panel, tile);
        if (arrivals) note_arrivals(s, search.rows(), group, rows, i_panel, tile, *arrivals);
        search.take(group, i_panel, tile, barred);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = 0; v < op.V; ++v) {
        const auto& found = search.finish(i, v);
        Neighbour* out = list(v, s, rows[i]);
        std::fill(std::copy(found.begin(), found.end(), out), out + op.length, NO_NEIGHBOUR);
        // A list that is not full holds every candidate there is.
        bound(v, s, rows[i]) = out[op.length - 1] == NO_NEIGHBOUR ? NO_NEIGHBOUR : out[op.length - 1] + 1;
      }
    }
  }

  // Of a tile of points `rows` against a panel of queries: who of the queries that stay has to take which point.
  void note_arrivals(int64_t s, const GridRows& grid_rows, int64_t group, const int64_t* rows, int64_t i_panel,
                     const int32_t* tile, std::vector<Arrival>& arrivals) const {
    const int64_t n = grid_rows.n_rows(group), first = group * TILE_ROWS;
    float rest[TILE_ROWS];
    uint32_t passed[TILE_ROWS];
    for (int64_t r = 0; r < n; ++r) rest[r] = grid_rows.rest(first + r);
    screen(tile, n, rest, &limit[(s * n_panels(Q) + i_panel) * TILE_COLS], passed);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t i_point = rows[first + r];
      for (uint32_t bits = passed[r]; bits; bits &= bits - 1) {
        const int64_t q = i_panel * TILE_COLS + __builtin_ctz(bits);
        Neighbour arrived = NO_NEIGHBOUR;
        for (int64_t v = 0; v < op.V; ++v) {
          if (is_barred(v, q, i_point)) continue;
          if (arrived == NO_NEIGHBOUR)
            arrived = neighbour(static_cast<float>(pair_dist2(query(s, q), point(s, i_point), D)), i_point);
          if (arrived < bound(v, s, q)) arrivals.push_back({v, q, arrived});
        }
      }
    }
  }

  // Queries that stay look for neighbours among the points `rows`, where queries and points are different rings.
  void meet_queries(int64_t s, const int64_t* rows, int64_t n, std::vector<Arrival>& arrivals) const {
    GridRows grid_rows(points, s);
    for (int64_t i = 0; i < n; ++i) grid_rows.add(point(s, rows[i]));
    int32_t tile[TILE_ROWS * TILE_COLS];
    for (int64_t i_panel = 0; i_panel < n_panels(op.queries.n); ++i_panel) {
      for (int64_t group = 0; group < grid_rows.n_groups(); ++group) {
        grid_rows.dist2(group, queries, i_panel, tile);
        note_arrivals(s, grid_rows, group, rows, i_panel, tile, arrivals);
      }
    }
  }

  // Brings the lists of the queries that stay up to date, and returns the queries whose list ran short.
  std::vector<int64_t> merge(int64_t s, const std::vector<Arrival>* arrivals, int64_t n_arrivals) const {
    std::vector<int64_t> is_short;
    for (int64_t v = 0; v < op.V; ++v) {
      for (int64_t q = 0; q < op.queries.n; ++q) {
        if (changed_queries.has(q)) continue;
        Neighbour* entries = list(v, s, q);
        int64_t n_left = 0;
        for (int64_t e = 0; e < op.length; ++e) {
          const Neighbour entry = entries[e];
          entries[n_left] = entry;
          n_left += !changed_points.has(index_of(entry));
        }
        std::fill(entries + n_left, entries + op.length, NO_NEIGHBOUR);
      }
    }
    for (int64_t i = 0; i < n_arrivals; ++i)
      for (const Arrival& arrival : arrivals[i])
        insert(list(arrival.view, s, arrival.query), op.length, bound(arrival.view, s, arrival.query), arrival.point);
    for (int64_t q = 0; q < op.queries.n; ++q) {
      bool has_too_few = false;
      for (int64_t v = 0; v < op.V && !changed_queries.has(q); ++v)
        has_too_few |= list(v, s, q)[op.k - 1] == NO_NEIGHBOUR && bound(v, s, q) != NO_NEIGHBOUR;
      if (has_too_few) is_short.push_back(q);
    }
    return is_short;
  }

  void write_index(int64_t s) const {
    for (int64_t v = 0; v < op.V; ++v) {
      for (int64_t q = 0; q < op.queries.n; ++q) {
        const Neighbour* entries = list(v, s, q);
        int64_t* out = op.index + ((v * S + s) * Q + q) * op.k;
        for (int64_t e = 0; e < op.k; ++e) out[e] = entries[e] == NO_NEIGHBOUR ? -1 : index_of(entries[e]);
      }
    }
  }

  int64_t run() {
    auto blocks_of = [](int64_t n) { return (n + Search::MOST - 1) / Search::MOST; };
    const std::vector<int64_t> new_queries = changed_queries.rows(op.queries.n);
    const std::vector<int64_t> new_points = changed_points.rows(op.points.n);
    const int64_t n_new = static_cast<int64_t>(new_queries.size()), n_blocks = blocks_of(n_new);
    // Where all queries are new, none stays that could take a point in.
    const int64_t n_met = n_new == op.queries.n ? 0 : static_cast<int64_t>(new_points.size());
    const int64_t n_meetings = blocks_of(n_met), n_tasks = n_blocks + (op.is_self ? 0 : n_meetings);
    std::vector<std::vector<Arrival>> arrivals(S * n_tasks);

    for_each(parallel_for, S, [&](int64_t s) { find_limits(s); });
    for_each(parallel_for, S * n_tasks, [&](int64_t task) {
      const int64_t s = task / n_tasks, block = task % n_tasks;
      if (block < n_blocks) {
        const int64_t first = block * Search::MOST;
        search(s, &new_queries[first], std::min(Search::MOST, n_new - first),
               op.is_self && n_met ? &arrivals[task] : nullptr);
      } else {
        const int64_t first = (block - n_blocks) * Search::MOST;
        meet_queries(s, &new_points[first], std::min(Search::MOST, n_met - first), arrivals[task]);
      }
    });

    std::vector<std::vector<int64_t>> refill(S);
    for_each(parallel_for, S, [&](int64_t s) { refill[s] = merge(s, arrivals.data() + s * n_tasks, n_tasks); });
    int64_t n_refilled = 0;
    std::vector<std::pair<int64_t, int64_t>> blocks;  // set, first
    for (int64_t s = 0; s < S; ++s) {
      n_refilled += static_cast<int64_t>(refill[s].size());
      for (int64_t block = 0; block < blocks_of(refill[s].size()); ++block) blocks.emplace_back(s, block * Search::MOST);
    }
    for_each(parallel_for, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const auto [s, first] = blocks[task];
      const int64_t n = static_cast<int64_t>(refill[s].size());
      search(s, &refill[s][first], std::min(Search::MOST, n - first), nullptr);
    });
    for_each(parallel_for, S, [&](int64_t s) { write_index(s); });
    return n_refilled;
  }
};

}  // namespace

void ring_pack_cpu(const Ring& points, const Packed& packed, bool is_new, ParallelFor parallel_for) {
  const int64_t S = packed.S, N = packed.N, D = packed.D;
  std::vector<char> is_out(S, is_new);
  if (!is_new) {
    const std::vector<int64_t> rows = Changed{N, points.first, points.count}.rows(points.n);
    for_each(parallel_for, S, [&](int64_t s) {
      for (int64_t i : rows) is_out[s] |= !suits(packed, s, points.points + (s * N + i) * D);
    });
  }
  const bool has_all = std::count(is_out.begin(), is_out.end(), 0) == S;
  if (!has_all) make_frames(packed, points.points, points.n, nullptr, 0, 0, parallel_for);
  pack_rows(packed, points.points, points.n, points.first, has_all ? points.count : N, parallel_for);
}

void ring_to_grid_cpu(const Ring& points, const Grid& grid, const Ring& queries, const Grid& query_grid, bool is_new,
                      ParallelFor parallel_for) {
  if (is_new) make_grids(grid, points.points, points.n, parallel_for);
  move_to_grid(grid, points.points, points.n, points.first, is_new ? grid.N : points.count, parallel_for);
  move_to_grid(query_grid, queries.points, queries.n, queries.first, is_new ? query_grid.N : queries.count,
               parallel_for);
}

int64_t ring_knn_cpu(const RingKnn& op, const Grid& points, const Grid& queries, ParallelFor parallel_for) {
  return Update{op, points, queries, parallel_for}.run();
}

}  // namespace clmfast
