"""ring_to_grid and ring_knn: rings of points of which a few rows change at a time. Contract: csrc/ring.h.

The state of all is a few tensors that the caller keeps; the ops write them in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PANEL, PAIR, TURNED = 32, 2, 60  # as in csrc/grid.h


class Grid(NamedTuple):
    """Points [S, N, D] as ring_knn screens them. What is in it is its own; no result shows it."""

    centre: Tensor  # [S, D] float32
    unit: Tensor  # [S] float64
    n_turned: Tensor  # [S] int64
    wasted: Tensor  # [S, 2] int64
    turn: Tensor  # [S, 60, D] float32
    cells: Tensor  # [S, ceil(N / 32), ceil(D / 2), 32, 2] int16
    norm2: Tensor  # [S, ceil(N / 32) * 32] int32
    rest: Tensor  # [S, ceil(N / 32) * 32] float32


class Ring(NamedTuple):
    """Points [S, N, D] float32, contiguous, of which rows 0..n-1 are filled; since the last call the `count` rows from
    `first` on were written, row 0 following row N - 1."""

    points: Tensor
    grid: Grid | None  # None: for a search of the whole ring, which needs none
    n: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count


class RingState(NamedTuple):
    """Neighbour lists of V views; `index` is the answer."""

    key: Tensor  # [V, S, Q, length] int64
    bound: Tensor  # [V, S, Q] int64
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; [V, S, Q, k] int64, rows of points; -1: no neighbour


def empty_grid(points: Tensor, shared: Grid | None = None) -> Grid:
    """Memory for points [S, N, D] on a grid; with `shared`, on that of another ring."""
    S, N, D = points.shape
    n_panels = -(-N // PANEL)
    return Grid(
        points.new_empty(S, D) if shared is None else shared.centre,
        points.new_empty(S, dtype=torch.float64) if shared is None else shared.unit,
        points.new_empty(S, dtype=torch.int64) if shared is None else shared.n_turned,
        points.new_empty(S, 2, dtype=torch.int64) if shared is None else shared.wasted,
        points.new_empty(S, TURNED, D) if shared is None else shared.turn,
        points.new_empty(S, n_panels, -(-D // PAIR), PANEL, PAIR, dtype=torch.int16),
        points.new_empty(S, n_panels * PANEL, dtype=torch.int32),
        points.new_empty(S, n_panels * PANEL),
    )


def ring_to_grid(points: Ring, queries: Ring, *, is_new: bool) -> None:
    """Move what changed in two rings that share a grid (empty_grid); with is_new, choose the grid and move everything.

    In place. A grid that no longer suits the points makes ring_knn slower, not wrong.
    """
    torch.ops.clmfast.ring_to_grid(*_arguments(points, queries), is_new)


def ring_knn(points: Ring, queries: Ring | None, barred: tuple[Tensor, Tensor], state: RingState) -> int:
    """Bring the neighbour lists of all queries up to date, in place; returns how many lists were computed anew.

    Afterwards state.index[v, :, :n] is, bit for bit, the index of
    ops.knn(points[:, :n], k, queries[:, :n], (query_group[v], point_group[v])). queries None: the points ask among
    themselves. barred: query_group [V, Q] and point_group [V, N] int64; pairs of equal group are no neighbours.
    Both rings must be on the grid (ring_to_grid) as they are now.
    """
    asking = points if queries is None else queries
    return torch.ops.clmfast.ring_knn(*_arguments(points, asking), queries is None, *barred, *state)


def _arguments(points: Ring, queries: Ring) -> tuple[Tensor | int, ...]:
    assert points.grid is not None and queries.grid is not None
    return (
        points.points, points.n, points.first, points.count,
        queries.points, queries.n, queries.first, queries.count,
        *points.grid, *queries.grid[5:],
    )  # fmt: skip


@torch.library.register_fake("clmfast::ring_to_grid")
def _(*_arguments: Tensor | int) -> None:
    return None
