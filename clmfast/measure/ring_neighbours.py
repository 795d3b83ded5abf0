"""Exact nearest neighbours among the rows of a ring of which only a few change per step.

A row that stays keeps its distances, so a step costs (changed rows) x (all rows) instead of (all rows)^2: with a batch
of 128 in a ring of 2048, a sixteenth. The answer equals `ops.knn` on the whole ring, bit for bit.

How: every query keeps a list of its nearest points, longer than k, and a bound: *every* point nearer than the bound is
in the list. Replaced points leave the list, new points that lie within the bound enter it, and the bound only ever
shrinks (when the list overflows). A list that falls below k entries is computed anew.
"""

from __future__ import annotations

import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from clmfast import ops

# A new row's list starts with this many entries per neighbour asked for. A row stays for `window / batch` steps, in
# which about as many entries leave as enter.
LIST_PER_K = 2.5
NO_KEY = torch.iinfo(torch.int64).max


def sort_key(dist2: Tensor, index: Tensor) -> Tensor:
    """One int64 that orders neighbours as ops.knn does: by dist2 (float32 >= 0, whose bits sort as integers), then by
    index; missing neighbours (-1) come last."""
    key = (dist2.contiguous().view(torch.int32).long() << 32) | index
    return key.masked_fill_(index < 0, NO_KEY)


class RingNeighbours:
    """The k nearest points of every query, while queries and points change a few rows at a time.

    After `update`, `index` [S, Q, k] int64 and `dist2` [S, Q, k] float32 hold what
    `ops.knn(points, k, queries, barred)` returns for the same tensors.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.length = int(k * LIST_PER_K)
        self.n_recomputed = 0
        self._key = torch.empty(0, 0, 0, dtype=torch.int64)  # [S, Q, length] ascending
        self._bound = torch.empty(0, 0, dtype=torch.int64)  # [S, Q]

    @property
    def index(self) -> Tensor:
        key = self._key[..., : self.k]
        return torch.where(key == NO_KEY, -1, key & 0xFFFFFFFF)

    @property
    def dist2(self) -> Tensor:
        return (self._key[..., : self.k] >> 32).int().view(torch.float32).masked_fill(self.index < 0, torch.inf)

    def update(
        self,
        points: Tensor,
        changed_points: Tensor,
        queries: Tensor,
        changed_queries: Tensor,
        query_group: Tensor,
        point_group: Tensor,
    ) -> None:
        """Take over the rows that changed since the last update.

        points [S, N, D]; queries [S, Q, D]; changed_* ascending row numbers, int64; *_group as `barred` of ops.knn:
        pairs of equal group are no neighbours. Sets that grew since the last update are computed anew.
        """
        shape = (points.shape[0], queries.shape[1], self.length)
        if self._key.shape != shape:
            self._key = torch.full(shape, NO_KEY)
            self._bound = torch.full(shape[:2], NO_KEY)
            changed_queries = torch.arange(shape[1])
        else:
            is_gone = torch.zeros(points.shape[1], dtype=torch.bool)
            is_gone[changed_points] = True
            # Usually few new points lie within a query's bound; if there are more than k, the bound shrinks.
            n_new = min(len(changed_points), self.k)
            near = ops.knn(
                points[:, changed_points],
                n_new,
                queries,
                (query_group, point_group[changed_points].contiguous()),
                within=self._within(),
            )
            new_index = torch.where(near.index >= 0, changed_points[near.index.clamp(min=0)], -1)
            has_all = len(changed_points) <= n_new
            _merge(
                self._key.numpy(),
                self._bound.numpy(),
                sort_key(near.dist2, new_index).numpy(),
                is_gone.numpy(),
                has_all,
            )
        # A bound of NO_KEY means that the list holds every candidate there is: nothing to gain.
        is_short = (self._key[..., self.k - 1] >= self._bound) & (self._bound != NO_KEY)
        anew = is_short.any(0)  # in all sets, as one call of all sets costs less than one of each set that needs it
        self.n_recomputed += int(anew.sum())
        anew[changed_queries] = True
        rows = anew.nonzero()[:, 0]
        near = ops.knn(points, self.length, queries[:, rows], (query_group[rows], point_group))
        key = sort_key(near.dist2, near.index)
        self._key[:, rows] = key
        # One past the last entry; a list that is not full holds all there is, and NO_KEY says so.
        self._bound[:, rows] = torch.where(key[..., -1] == NO_KEY, NO_KEY, key[..., -1] + 1)

    def _within(self) -> Tensor:
        """[S, Q] float32: dist2 of each query's bound; inf where the list holds all there is."""
        dist2 = (self._bound >> 32).int().view(torch.float32)
        return dist2.masked_fill(self._bound == NO_KEY, torch.inf)


@njit(cache=True)
def _merge(keys: NDArray, bounds: NDArray, new_keys: NDArray, is_gone: NDArray, has_all: bool) -> None:
    """Drop gone points from every list, then insert the new ones (ascending) that lie within the bound."""
    n_sets, n_queries, length = keys.shape
    n_new = new_keys.shape[2]
    merged = keys[0, 0].copy()
    no_key = NO_KEY
    for s in range(n_sets):
        for q in range(n_queries):
            old, new = keys[s, q], new_keys[s, q]
            bound = bounds[s, q]
            if not has_all and new[n_new - 1] < bound:
                bound = new[n_new - 1] + 1  # there may be more new points right behind the last one that we were given
            i = j = n = 0
            while n < length:
                while i < length and old[i] != no_key and is_gone[old[i] & 0xFFFFFFFF]:
                    i += 1
                a = old[i] if i < length else no_key
                b = new[j] if j < n_new else no_key
                key = min(a, b)
                if key >= bound:
                    break
                merged[n] = key
                n += 1
                if a <= b:
                    i += 1
                else:
                    j += 1
            if n == length:
                bound = min(bound, merged[n - 1] + 1)
            for e in range(length):
                old[e] = merged[e] if e < n else no_key
            bounds[s, q] = bound
