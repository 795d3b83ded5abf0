"""knn: exact nearest neighbours. The contract with its ties, overflows and limits is csrc/knn.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


class KNN(NamedTuple):
    dist2: Tensor  # [S, Q, k] float32, ascending; inf where there is no neighbour
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; [S, Q, k] int64, rows of points; -1: no neighbour


def knn(
    points: Array,
    k: int,
    queries: Array | None = None,
    barred: tuple[Array, Array] | None = None,
    *,
    within: Array | None = None,
) -> KNN:
    """The k nearest points of every query, by squared distance and then by index.

        dist2[s, q, e] = float32( sum_d (queries[s, q, d] - points[s, index[s, q, e], d])^2 )        summed in float64

    points [S, N, D] and queries [S, Q, D]: float32, bfloat16 or float16, of one dtype. Without queries every point
    asks for its neighbours among the others (Q = N, 1 <= k < N); with queries k may exceed N.
    barred (query_group [Q], point_group [N], integers): a query and a point of equal group are no neighbours.
    within [S, Q] float32: only points with dist2 <= within are neighbours; a tight one makes the search cheaper.
    Arrays and lists serve as well as tensors; a list of numbers becomes float32, and no other dtype is rounded.
    Beware: where a query has fewer than k candidates (points that are not finite are none), index is -1. No gradient
    flows.
    """
    op = "knn"
    if barred is not None and len(barred) != 2:
        raise ValueError(f"knn: barred must be the groups of queries and of points, got {len(barred)} of them")
    query_group, point_group = barred if barred is not None else (None, None)
    beside = (points, queries, query_group, point_group, within)
    return KNN(
        *torch.ops.clmfast.knn(
            arguments.points(op, "points", points, beside),
            arguments.integer(op, "k", k),
            None if queries is None else arguments.points(op, "queries", queries, beside),
            None if query_group is None else arguments.labels(op, "query_group", query_group, beside),
            None if point_group is None else arguments.labels(op, "point_group", point_group, beside),
            None if within is None else arguments.floats(op, "within", within, beside),
        )
    )


@arguments.register_fake("knn")
def _(
    points: Tensor,
    k: int,
    queries: Tensor | None,
    query_group: Tensor | None,
    point_group: Tensor | None,
    within: Tensor | None,
) -> tuple[Tensor, Tensor]:
    S, Q, _ = (points if queries is None else queries).shape
    return points.new_empty((S, Q, k), dtype=torch.float32), points.new_empty((S, Q, k), dtype=torch.int64)
