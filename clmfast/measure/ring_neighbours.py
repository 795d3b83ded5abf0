"""Exact nearest neighbours among the rows of a ring of which only a few change per step.

A row that stays keeps its distances, so a step costs (changed rows) x (all rows) instead of (all rows)^2: with a batch
of 128 in a ring of 2048, a sixteenth. The answer equals `ops.knn` on the whole ring, bit for bit. csrc/ring.h says how;
here is what is kept from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clmfast import ops
from clmfast.ops.ring import Ring, RingState

# A new row's list starts with this many entries per neighbour asked for. A row stays for `window / batch` steps, in
# which about as many entries leave as enter.
LIST_PER_K = 2.0


class RingNeighbours:
    """The k nearest points of every query, in each of V views, while queries and points change a few rows at a time."""

    def __init__(self, k: int, n_views: int, n_sets: int, n_queries: int) -> None:
        shape = (n_views, n_sets, n_queries)
        self.n_recomputed = 0  # lists that ran short
        self.k = k
        self._state = RingState(
            torch.empty(*shape, int(k * LIST_PER_K), dtype=torch.int64, device="cpu"),
            torch.empty(shape, dtype=torch.int64, device="cpu"),
            torch.empty(*shape, k, dtype=torch.int64, device="cpu"),
        )

    def search(self, points: Ring, queries: Ring | None, barred: tuple[Tensor, Tensor]) -> Tensor:
        """What `update` returns, from the whole rings as they are now: for a GPU, where searching everything is one
        launch, and keeping lists would be many."""
        filled = points.points[:, : points.n]
        asking = None if queries is None else queries.points[:, : queries.n]
        n_queries = (points if queries is None else queries).n
        groups = zip(barred[0][:, :n_queries], barred[1][:, : points.n], strict=True)
        return torch.stack([ops.knn(filled, self.k, asking, pair).index for pair in groups])

    def update(self, points: Ring, queries: Ring | None, barred: tuple[Tensor, Tensor]) -> Tensor:
        """Take over the rows that changed, and return the neighbours: index [V, S, n, k] int64 of the n filled queries.

        points, queries (None: the points themselves) and barred as for ops.ring_knn. At the first update all filled
        rows must count as changed. The result is a view that the next update writes over.
        """
        self.n_recomputed += ops.ring_knn(points, queries, barred, self._state)
        return self._state.index[:, :, : (points if queries is None else queries).n]
