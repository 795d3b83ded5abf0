"""knn: exact nearest neighbours. The contract with its ties, overflows and limits is csrc/knn.h."""

from typing import NamedTuple

import torch
from torch import Tensor


class KNN(NamedTuple):
    dist2: Tensor  # [S, Q, k] float32, ascending; inf where there is no neighbour
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; [S, Q, k] int64, rows of points; -1: no neighbour


def knn(
    points: Tensor,
    k: int,
    queries: Tensor | None = None,
    barred: tuple[Tensor, Tensor] | None = None,
    *,
    within: Tensor | None = None,
) -> KNN:
    """The k nearest points of every query, by squared distance and then by index.

        dist2[s, q, e] = float32( sum_d (queries[s, q, d] - points[s, index[s, q, e], d])^2 )        summed in float64

    points [S, N, D] and queries [S, Q, D]: float32, bfloat16 or float16, of one dtype. Without queries every point
    asks for its neighbours among the others (Q = N, 1 <= k < N); with queries k may exceed N.
    barred (query_group [Q] int64, point_group [N] int64): a query and a point of equal group are no neighbours.
    within [S, Q] float32: only points with dist2 <= within are neighbours; a tight one makes the search cheaper.
    Beware: where a query has fewer than k candidates (points that are not finite are none), index is -1. No gradient
    flows.
    """
    query_group, point_group = barred if barred is not None else (None, None)
    queries = None if queries is None else queries.detach()
    return KNN(*torch.ops.clmfast.knn(points.detach(), k, queries, query_group, point_group, within))


@torch.library.register_fake("clmfast::knn")
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
