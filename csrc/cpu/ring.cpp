// Rings on the CPU. A step of ring_knn, with the sets side by side:
//   search   the rows that changed meet all panels. Each tile of distances serves both sides: the changed rows look for
//            their own neighbours, and the rows of the panel for new ones among the changed.
//   merge    the lists of the rows that stay: out with what is gone, in with what was found.
//   refill   rows whose list ran short search again.
#include "../ring.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "groups.h"
#include "search.h"

namespace clmfast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 64;  // queries of one task: enough to reuse a panel, few enough to balance the threads

struct Changed {
  int64_t N, first, count;

  bool has(int64_t i) const {
    const int64_t behind = i - first;
    return behind + (behind >> 63 & N) < count;
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

// Which of `rows` [n] are the same point, as places in `rows`, kind by kind, both ascending: states that nothing sets
// apart yet, as those of one token at one place in layer 0. What is known of one is known of all.
std::vector<std::vector<int64_t>> kinds_of(const int64_t* rows, int64_t n, const float* points, int64_t D,
                                           const int32_t* norm2) {
  std::vector<std::vector<int64_t>> kinds;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = rows[i];
    const auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const std::vector<int64_t>& kind) {
      const int64_t other = rows[kind[0]];
      return norm2[row] == norm2[other] && std::memcmp(points + row * D, points + other * D, D * sizeof *points) == 0;
    });
    if (kind == kinds.end()) kinds.push_back({i});
    else kind->push_back(i);
  }
  return kinds;
}

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
  std::vector<Groups> point_groups = {};  // of each view
  // Of the queries that stay, all views: who is at least as far, in steps, need not be looked at. -infinity: of others.
  std::vector<float> limit = std::vector<float>(S * n_panels(Q) * PANEL);

  Neighbour* list(int64_t v, int64_t s, int64_t q) const { return op.key + ((v * S + s) * Q + q) * op.length; }
  Neighbour& bound(int64_t v, int64_t s, int64_t q) const { return op.bound[(v * S + s) * Q + q]; }
  const float* point(int64_t s, int64_t i) const { return op.points.points + (s * N + i) * D; }
  const float* query(int64_t s, int64_t q) const { return op.queries.points + (s * Q + q) * D; }

  bool is_barred(int64_t v, int64_t q, int64_t i) const {
    return (op.is_self && q == i) || op.query_group[v * Q + q] == op.point_group[v * N + i];
  }

  void find_limits(int64_t s) {
    float* out = &limit[s * n_panels(Q) * PANEL];
    std::fill_n(out, n_panels(Q) * PANEL, -INF);
    for (int64_t q = 0; q < op.queries.n; ++q) {
      if (changed_queries.has(q)) continue;
      Neighbour farthest = bound(0, s, q);
      for (int64_t v = 1; v < op.V; ++v) farthest = std::max(farthest, bound(v, s, q));
      out[q] = limit_below(queries.unit[s], farthest);
    }
  }

  // A point that query q may have to take into a list; returns whether it has to.
  bool note(int64_t v, int64_t s, int64_t q, Neighbour point, std::vector<Arrival>& arrivals) const {
    const bool is_arrival = point < bound(v, s, q) && !is_barred(v, q, index_of(point));
    if (is_arrival) arrivals.push_back({v, q, point});
    return is_arrival;
  }

  // `rows` [n] of a set's points [., D], kind by kind, meet all columns:
  // visit(i, first column, n columns, dist2, known) for every i < n; `known` as of Row.
  template <class Visit>
  void sweep_kinds(const Grid& grid, int64_t s, const float* points, const int64_t* rows, int64_t n,
                   const Grid& columns, int64_t n_columns, const Visit& visit) const {
    const std::vector<std::vector<int64_t>> kinds = kinds_of(rows, n, points, D, grid.norm2_of(s));
    std::vector<int64_t> first_of;
    for (const std::vector<int64_t>& kind : kinds) first_of.push_back(rows[kind[0]]);
    float known[Row::MOST];
    sweep(grid_rows(grid, s, first_of.data(), static_cast<int64_t>(kinds.size())), columns, 0, n_panels(n_columns),
          [&](int64_t i_kind, int64_t first, int64_t n_met, float* dist2) {
            const bool is_asked_again = kinds[i_kind].size() > 1 || op.V > 1;
            if (is_asked_again) std::fill_n(known, n_met, -1.0f);
            for (int64_t i : kinds[i_kind]) visit(i, first, n_met, dist2, is_asked_again ? known : nullptr);
          });
  }

  // The queries `rows` [n] look for their neighbours, and write their lists. With `arrivals`, these rows are new points
  // as well, and the queries that stay look for neighbours among them.
  // Returns how many points it measured in vain.
  int64_t search(int64_t s, const int64_t* rows, int64_t n, std::vector<Arrival>* arrivals) const {
    int64_t n_wasted = 0;
    std::vector<Nearest> nearest;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = 0; v < op.V; ++v) {
        std::fill_n(list(v, s, rows[i]), op.length, NO_NEIGHBOUR);
        nearest.emplace_back(list(v, s, rows[i]), op.length, points.unit[s], NO_NEIGHBOUR);
      }
    }
    std::vector<std::pair<int64_t, float>> barred;  // column, and what stood there
    sweep_kinds(
        queries, s, query(s, 0), rows, n, points, op.points.n,
        [&](int64_t i, int64_t first, int64_t n_columns, float* dist2, float* known) {
          const int64_t q = rows[i];
          auto bar = [&](int64_t column) {
            barred.emplace_back(column - first, dist2[column - first]);
            dist2[column - first] = INF;
          };
          for (int64_t v = 0; v < op.V; ++v) {
            if (op.is_self && first <= q && q < first + n_columns) bar(q);
            point_groups[v].for_members(op.query_group[v * Q + q], first, n_columns, bar);
            n_wasted += look(
                {dist2, first, n_columns, queries.rest_of(s)[q], points.rest_of(s) + first,
                 arrivals ? &limit[s * n_panels(Q) * PANEL + first] : nullptr, query(s, q), point(s, 0), D, known},
                op.length, nearest[i * op.V + v], [&](int64_t c, float measured) {
                  return arrivals && !changed_queries.has(first + c) &&
                         note(v, s, first + c, neighbour(measured, q), *arrivals);
                });
            for (; !barred.empty(); barred.pop_back()) dist2[barred.back().first] = barred.back().second;
          }
        });
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = 0; v < op.V; ++v) {
        // A list that is not full holds every candidate there is.
        const Neighbour last = list(v, s, rows[i])[op.length - 1];
        bound(v, s, rows[i]) = last == NO_NEIGHBOUR ? NO_NEIGHBOUR : last + 1;
      }
    }
    return n_wasted;
  }

  // Queries that stay look for neighbours among the points `rows`, where queries and points are different rings.
  int64_t meet_queries(int64_t s, const int64_t* rows, int64_t n, std::vector<Arrival>& arrivals) const {
    int64_t n_wasted = 0;
    Nearest nobody;
    sweep_kinds(points, s, point(s, 0), rows, n, queries, op.queries.n,
                [&](int64_t i, int64_t first, int64_t n_columns, float* dist2, float* known) {
                  const int64_t row = rows[i];
                  n_wasted += look({dist2, first, n_columns, points.rest_of(s)[row], queries.rest_of(s) + first,
                                    &limit[s * n_panels(Q) * PANEL + first], point(s, row), query(s, 0), D, known},
                                   0, nobody, [&](int64_t c, float measured) {
                                     bool is_taken = false;
                                     for (int64_t v = 0; v < op.V; ++v)
                                       is_taken |= note(v, s, first + c, neighbour(measured, row), arrivals);
                                     return is_taken;
                                   });
                });
    return n_wasted;
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
    auto blocks_of = [](int64_t n) { return (n + BLOCK - 1) / BLOCK; };
    const std::vector<int64_t> new_queries = changed_queries.rows(op.queries.n);
    const std::vector<int64_t> new_points = changed_points.rows(op.points.n);
    const int64_t n_new = static_cast<int64_t>(new_queries.size()), n_blocks = blocks_of(n_new);
    // Where all queries are new, none stays that could take a point in.
    const int64_t n_met = n_new == op.queries.n ? 0 : static_cast<int64_t>(new_points.size());
    const int64_t n_meetings = blocks_of(n_met), n_tasks = n_blocks + (op.is_self ? 0 : n_meetings);
    std::vector<std::vector<Arrival>> arrivals(S * n_tasks);
    for (int64_t v = 0; v < op.V; ++v) point_groups.emplace_back(op.point_group + v * N, op.points.n);

    for_each(parallel_for, S, [&](int64_t s) { find_limits(s); });
    std::vector<int64_t> wasted(S * n_tasks);
    for_each(parallel_for, S * n_tasks, [&](int64_t task) {
      const int64_t s = task / n_tasks, block = task % n_tasks;
      if (block < n_blocks) {
        const int64_t first = block * BLOCK;
        wasted[task] = search(s, &new_queries[first], std::min(BLOCK, n_new - first),
               op.is_self && n_met ? &arrivals[task] : nullptr);
      } else {
        const int64_t first = (block - n_blocks) * BLOCK;
        wasted[task] = meet_queries(s, &new_points[first], std::min(BLOCK, n_met - first), arrivals[task]);
      }
    });

    for (int64_t s = 0; s < S; ++s) {
      int64_t &at_first = points.wasted[2 * s], &more = points.wasted[2 * s + 1];
      const int64_t n = std::accumulate(&wasted[s * n_tasks], &wasted[s * n_tasks] + n_tasks, int64_t{0});
      if (at_first < 0) at_first = n;
      else more += std::max<int64_t>(0, n - at_first);
    }

    std::vector<std::vector<int64_t>> refill(S);
    for_each(parallel_for, S, [&](int64_t s) { refill[s] = merge(s, arrivals.data() + s * n_tasks, n_tasks); });
    int64_t n_refilled = 0;
    std::vector<std::pair<int64_t, int64_t>> blocks;  // set, first
    for (int64_t s = 0; s < S; ++s) {
      n_refilled += static_cast<int64_t>(refill[s].size());
      for (int64_t block = 0; block < blocks_of(refill[s].size()); ++block) blocks.emplace_back(s, block * BLOCK);
    }
    for_each(parallel_for, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const auto [s, first] = blocks[task];
      const int64_t n = static_cast<int64_t>(refill[s].size());
      search(s, &refill[s][first], std::min(BLOCK, n - first), nullptr);
    });
    for_each(parallel_for, S, [&](int64_t s) { write_index(s); });
    return n_refilled;
  }
};

}  // namespace

void ring_to_grid_cpu(const Ring& points, const Grid& grid, const Ring& queries, const Grid& query_grid, bool is_new,
                      ParallelFor parallel_for) {
  // To choose a grid and to move all points to it costs about as much as measuring so many pairs (Zen 3, 2048 x 128).
  constexpr int64_t PRICE = 60000;
  const std::vector<int64_t> changed = panels_of(grid.N, points.first, points.count),
                             all = panels_of(grid.N, 0, grid.N);
  const std::vector<int64_t> changed_queries = panels_of(query_grid.N, queries.first, queries.count),
                             all_queries = panels_of(query_grid.N, 0, query_grid.N);
  const bool is_shared = grid.cells == query_grid.cells;
  for_each(parallel_for, grid.S, [&](int64_t s) {
    const bool is_chosen_anew = is_new || grid.wasted[2 * s + 1] > PRICE;
    if (is_chosen_anew) make_grid(grid, s, points.points, points.n, true);
    move_to_grid(grid, s, points.points, points.n, is_chosen_anew ? all : changed);
    if (!is_shared)
      move_to_grid(query_grid, s, queries.points, queries.n, is_chosen_anew ? all_queries : changed_queries);
  });
}

int64_t ring_knn_cpu(const RingKnn& op, const Grid& points, const Grid& queries, ParallelFor parallel_for) {
  return Update{op, points, queries, parallel_for}.run();
}

}  // namespace clmfast
