"""kmeans_search: the k-means partitions of lowest inertia. The contract is csrc/kmeans_search.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


class Partitions(NamedTuple):
    """Lowest inertia first. centroid, n_iter and origin are those of the first partition."""

    label: Tensor  # [keep, S, N] int64; -1 for points that are not finite, and where fewer were found
    inertia: Tensor  # [keep, S] float64; inf where fewer were found
    centroid: Tensor  # [S, K, D] float32
    n_iter: Tensor  # [S] int64
    origin: Tensor  # [S] int64: the start that it comes from: known, cold, or a renewal (csrc/kmeans_search.h)


class SearchMemory(NamedTuple):
    """The projection that a search works in, to be kept for the next call."""

    directions: Tensor  # [S, 1 + M, D] float32: the centre, and what points about it are projected onto
    projected: Tensor  # [S, N, M] float32


def search_memory(S: int, N: int, D: int, n_clusters: int) -> SearchMemory | None:
    """An empty memory for points [S, N, D]; None where these are too few, or of too few dimensions, to be projected."""
    M = (2 * n_clusters + 8 + 7) // 8 * 8  # of csrc/kmeans_search.h
    if 2 * M > D or 2 * M > N:
        return None
    return SearchMemory(
        *(torch.zeros(shape, device="cpu", dtype=torch.float32) for shape in ((S, 1 + M, D), (S, N, M)))
    )


def kmeans_search(
    points: Array,
    n_clusters: int,
    *,
    known: Array | None = None,
    n_cold: int | Array = 1,
    keep: int = 1,
    moves: int = 10,
    renewals: int = 0,
    max_iter: int = 100,
    seed: int = 0,
    memory: SearchMemory | None = None,
) -> Partitions:
    """The k-means partition of lowest inertia that a search finds, and others that came close to it.

    The search goes on from `known` partitions by Lloyd's algorithm, begins others with k-means++, and leaves optima by
    split-and-merge moves (Ueda et al. 2000; with the merge costs of Ward 1963). It finds in one start what takes a
    hundred restarts without moves. Deterministic; the same bits for any number of threads.

    points [S, N, D] float32, bfloat16 or float16, on the CPU. known [P, S, N] integers: labels in [0, n_clusters); any
    other value is a point without a cluster so far. n_cold: starts by k-means++, for all sets or for each [S].
    keep: partitions that come back, at least P. moves: rounds of moves of a start. renewals: starts from the best
    partition with a fifth of its clusters begun anew, one after the other as long as each finds a better one.
    max_iter: of Lloyd's algorithm on the best partition at the end, in all dimensions; before, the search sees a
    projection. memory: where points are those of the last call, but for points whose first known label is negative,
    that call's memory saves most of the projecting; it is written to.
    """
    op = "kmeans_search"
    beside = (points, known, n_cold)
    of_points = arguments.points(op, "points", points, beside)
    if of_points.device.type not in ("cpu", "meta"):
        raise ValueError(f"{op}: points must be on the CPU, got {of_points.device}")
    if isinstance(n_cold, int):
        cold = torch.full((of_points.shape[0],), n_cold, dtype=torch.int64, device=of_points.device)
    else:
        cold = arguments.labels(op, "n_cold", n_cold, beside)
    return Partitions(
        *torch.ops.clmfast.kmeans_search(
            of_points,
            arguments.integer(op, "n_clusters", n_clusters),
            None if known is None else arguments.labels(op, "known", known, beside),
            cold,
            arguments.integer(op, "keep", keep),
            arguments.integer(op, "moves", moves),
            arguments.integer(op, "renewals", renewals),
            arguments.integer(op, "max_iter", max_iter),
            arguments.integer(op, "seed", seed),
            *(memory or (None, None)),
        )
    )


@arguments.register_fake("kmeans_search")
def _(
    points: Tensor,
    n_clusters: int,
    known: Tensor | None,
    n_cold: Tensor,
    keep: int,
    moves: int,
    renewals: int,
    max_iter: int,
    seed: int,
    directions: Tensor | None,
    projected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    S, N, D = points.shape
    return (
        points.new_empty((keep, S, N), dtype=torch.int64),
        points.new_empty((keep, S), dtype=torch.float64),
        points.new_empty((S, n_clusters, D), dtype=torch.float32),
        points.new_empty((S,), dtype=torch.int64),
        points.new_empty((S,), dtype=torch.int64),
    )
