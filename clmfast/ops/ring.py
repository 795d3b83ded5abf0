"""ring_pack and ring_knn: neighbours in rings of points of which a few rows change at a time. Contract: csrc/ring.h.

The state of both is a few tensors that the caller keeps; the ops write them in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 32  # as in csrc/packed.h


class Packed(NamedTuple):
    """A ring of points [S, N, D] as the ops screen it. What is in it is theirs; no result shows it."""

    centre: Tensor  # [S, D] float32
    scale: Tensor  # [S] float32
    panels: Tensor  # [S, ceil(N / 32), D, 32] float32
    norm2: Tensor  # [S, ceil(N / 32) * 32] float64


class Ring(NamedTuple):
    """Points [S, N, D] float32, contiguous, of which rows 0..n-1 are filled; since the last call the `count` rows from
    `first` on were written, row 0 following row N - 1."""

    points: Tensor
    packed: Packed
    n: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count


class RingState(NamedTuple):
    """Neighbour lists of V views; `index` is the answer."""

    key: Tensor  # [V, S, Q, length] int64
    bound: Tensor  # [V, S, Q] int64
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; [V, S, Q, k] int64, rows of points; -1: no neighbour


def empty_packed(points: Tensor, frame: Packed | None = None) -> Packed:
    """Memory for packing points [S, N, D]; with `frame`, in the frame of another ring."""
    S, N, D = points.shape
    n_panels = -(-N // PANEL)
    return Packed(
        points.new_empty(S, D) if frame is None else frame.centre,
        points.new_empty(S) if frame is None else frame.scale,
        points.new_empty(S, n_panels, D, PANEL),
        points.new_empty(S, n_panels * PANEL, dtype=torch.float64),
    )


def ring_pack(points: Ring, queries: Ring, *, is_new: bool) -> None:
    """Pack what changed in two rings that share a frame (empty_packed); with is_new, everything. In place."""
    torch.ops.clmfast.ring_pack(*_arguments(points, queries), is_new)


def ring_knn(points: Ring, queries: Ring | None, barred: tuple[Tensor, Tensor], state: RingState) -> int:
    """Bring the neighbour lists of all queries up to date, in place; returns how many lists were computed anew.

    Afterwards state.index[v, :, :n] is, bit for bit, the index of
    ops.knn(points[:, :n], k, queries[:, :n], (query_group[v], point_group[v])). queries None: the points ask among
    themselves. barred: query_group [V, Q] and point_group [V, N] int64; pairs of equal group are no neighbours.
    Both rings must be packed (ring_pack) as they are now.
    """
    asking = points if queries is None else queries
    return torch.ops.clmfast.ring_knn(*_arguments(points, asking), queries is None, *barred, *state)


def _arguments(points: Ring, queries: Ring) -> tuple[Tensor | int, ...]:
    return (
        points.points, points.n, points.first, points.count,
        queries.points, queries.n, queries.first, queries.count,
        *points.packed, queries.packed.panels, queries.packed.norm2,
    )  # fmt: skip


@torch.library.register_fake("clmfast::ring_pack")
def _(*_arguments: Tensor | int) -> None:
    return None
