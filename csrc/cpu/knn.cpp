// knn on the CPU: one task is a block of queries of one set, which search.h leads past all panels of the set's points.
#include "../knn.h"

#include <algorithm>
#include <limits>

#include "search.h"

namespace clmfast {
namespace {

// Neighbours at dist2 <= within lie below this.
Neighbour bound_of(float within) {
  if (!(within >= 0)) return 0;
  return neighbour(within, 0) + (Neighbour{1} << 32);
}

void search_block(const Knn& op, const Grid& grid, int64_t s, int64_t first) {
  const float* points = op.points + s * op.N * op.D;
  const float* queries = op.is_self ? points : op.queries + s * op.Q * op.D;
  const int64_t n_queries = std::min(Search::MOST, op.Q - first);
  Search search(grid, s, points, op.N, op.k, 1);
  for (int64_t i = first; i < first + n_queries; ++i) {
    const Neighbour bound = op.within ? bound_of(op.within[s * op.Q + i]) : NO_NEIGHBOUR;
    search.add(queries + i * op.D, &bound);
  }
  auto barred = [&](int64_t, int64_t query, int64_t i_panel) {
    uint32_t bits = op.is_self ? same_row(first + query, i_panel) : 0;
    if (op.query_group) bits |= same_group(op.query_group[first + query], op.point_group, op.N, i_panel);
    return bits;
  };
  int32_t tile[TILE_ROWS * TILE_COLS];
  for (int64_t i_panel = 0; i_panel < n_panels(op.N); ++i_panel) {
    for (int64_t group = 0; group < search.rows().n_groups(); ++group) {
      search.rows().dist2(group, grid, i_panel, tile);
      search.take(group, i_panel, tile, barred);
    }
  }
  for (int64_t i = 0; i < n_queries; ++i) {
    const auto& found = search.finish(i, 0);
    const int64_t out = (s * op.Q + first + i) * op.k, n_found = static_cast<int64_t>(found.size());
    for (int64_t e = 0; e < op.k; ++e) {
      op.dist2[out + e] = e < n_found ? dist2_of(found[e]) : std::numeric_limits<float>::infinity();
      op.index[out + e] = e < n_found ? index_of(found[e]) : -1;
    }
  }
}

}  // namespace

void knn_cpu(const Knn& op, ParallelFor parallel_for) {
  const int64_t blocks = (op.Q + Search::MOST - 1) / Search::MOST;
  const GridMemory grid(op.S, op.N, op.D);
  make_grids(grid, op.points, op.N, parallel_for);
  move_to_grid(grid, op.points, op.N, 0, op.N, parallel_for);
  for_each(parallel_for, op.S * blocks,
           [&](int64_t task) { search_block(op, grid, task / blocks, task % blocks * Search::MOST); });
}

}  // namespace clmfast
