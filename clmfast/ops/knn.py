"""knn: exact nearest neighbours. The contract with its ties, overflows and limits is csrc/knn.h."""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


class KNN(NamedTuple):
    dist2: Tensor  # [S, Q, k] float32, ascending; inf where there is no neighbour
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; [S, Q, k] int64, rows of points; -1: no neighbour


Barred = tuple[Array, Array]


@overload
def knn(
    points: Array, k: int, queries: Array | None = None, barred: Barred | None = None, *, within: Array | None = None
) -> KNN: ...
@overload
def knn(
    points: Array, k: int, queries: Array, barred: Sequence[Barred], *, within: Array | None = None
) -> list[KNN]: ...
def knn(
    points: Array,
    k: int,
    queries: Array | None = None,
    barred: Barred | Sequence[Barred] | None = None,
    *,
    within: Array | None = None,
) -> KNN | list[KNN]:
    """The k nearest points of every query, by squared distance and then by index.

        dist2[s, q, e] = float32( sum_d (queries[s, q, d] - points[s, index[s, q, e], d])^2 )        summed in float64

    points [S, N, D] and queries [S, Q, D]: float32, bfloat16 or float16, of one dtype. Without queries every point
    asks for its neighbours among the others (Q = N, 1 <= k < N); with queries k may exceed N.
    barred (query_group [Q], point_group [N], integers): a query and a point of equal group are no neighbours. A list
    of up to 4 such pairs asks several times what is screened once: view v, with query_group [Q_v], is asked by the
    last Q_v queries, and a list of one KNN a view comes back.
    within [S, Q] float32: only points with dist2 <= within are neighbours; a tight one makes the search cheaper.
    Arrays and lists serve as well as tensors; a list of numbers becomes float32, and no other dtype is rounded.
    Beware: where a query has fewer than k candidates (points that are not finite are none), index is -1. No gradient
    flows.
    """
    op = "knn"
    views = barred if isinstance(barred, list) else [] if barred is None else [barred]
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in views) or (barred is not None and not views):
        raise ValueError("knn: barred must be (query_group, point_group), or a list of such pairs")
    if any(group is None for pair in views for group in pair):
        raise ValueError("knn: barred must give the groups of both queries and points")
    beside = (points, queries, *(group for pair in views for group in pair), within)
    query_groups = [arguments.labels(op, "query_group", pair[0], beside) for pair in views]
    dist2, index = torch.ops.clmfast.knn(
        arguments.points(op, "points", points, beside),
        arguments.integer(op, "k", k),
        None if queries is None else arguments.points(op, "queries", queries, beside),
        query_groups,
        [arguments.labels(op, "point_group", pair[1], beside) for pair in views],
        None if within is None else arguments.floats(op, "within", within, beside),
    )
    if not isinstance(barred, list):
        return KNN(dist2, index)
    sizes = [group.numel() for group in query_groups]
    return [KNN(*parts) for parts in zip(dist2.split(sizes, 1), index.split(sizes, 1), strict=True)]


@arguments.register_fake("knn")
def _(
    points: Tensor,
    k: int,
    queries: Tensor | None,
    query_group: list[Tensor],
    point_group: list[Tensor],
    within: Tensor | None,
) -> tuple[Tensor, Tensor]:
    S, Q, _ = (points if queries is None else queries).shape
    A = sum(group.numel() for group in query_group) if query_group else Q
    return points.new_empty((S, A, k), dtype=torch.float32), points.new_empty((S, A, k), dtype=torch.int64)
