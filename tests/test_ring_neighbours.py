"""measure/ring_neighbours.py: after any history of changes, exactly what ops.knn says of the whole ring."""

from __future__ import annotations

import pytest
import torch

from clmfast import ops
from clmfast.measure.ring_neighbours import NO_KEY, RingNeighbours, sort_key


def test_key_orders_as_knn_does():
    dist2 = torch.tensor([0.0, 0.0, 1e-40, 1.0, 1.0, torch.inf, torch.inf])
    index = torch.tensor([3, 7, 0, 1, 2**31, 5, -1])
    key = sort_key(dist2, index)
    assert torch.equal(key.sort().values, key)
    assert key[-1] == NO_KEY


@pytest.mark.parametrize("kind", ["gaussian", "ties", "drifting", "non-finite"])
@pytest.mark.parametrize("is_self", [True, False])
def test_equals_a_full_recomputation(kind, is_self):
    generator = torch.Generator().manual_seed(5)
    n, n_queries, k, n_sets, width = 60, 18, 4, 3, 6
    batch, batch_queries = 9, 3

    def draw_rows(n_rows, step):
        x = torch.randn(n_sets, n_rows, width, generator=generator)
        if kind == "ties":
            x = x.sign()  # 64 different points, so most distances tie
        if kind == "drifting":
            x = x / (1 + step) + step  # everything old is far away and thinly spread: lists run dry
        if kind == "non-finite":
            x[:, ::4] = torch.nan
            x[:, 1::4] = 1e30  # finite, but distances overflow
        return x

    points, queries = torch.zeros(n_sets, n, width), torch.zeros(n_sets, n_queries, width)
    point_group = torch.zeros(n, dtype=torch.int64)
    query_group = torch.zeros(n_queries, dtype=torch.int64)
    near = RingNeighbours(k)
    n_filled = n_filled_queries = 0
    for step in range(25):
        rows = (torch.arange(batch) + batch * step) % n
        points[:, rows] = draw_rows(batch, step)
        point_group[rows] = torch.randint(6, (batch,), generator=generator)
        n_filled = min(n, n_filled + batch)
        query_rows = (torch.arange(batch_queries) + batch_queries * step) % n_queries
        queries[:, query_rows] = draw_rows(batch_queries, step)
        query_group[query_rows] = torch.randint(6, (batch_queries,), generator=generator)
        n_filled_queries = min(n_queries, n_filled_queries + batch_queries)
        p, pg = points[:, :n_filled], point_group[:n_filled]
        if is_self:
            near.update(p, rows.sort().values, p, rows.sort().values, pg, pg)
            expected = ops.knn(p, k, barred=(pg, pg))
        else:
            q, qg = queries[:, :n_filled_queries], query_group[:n_filled_queries]
            near.update(p, rows.sort().values, q, query_rows.sort().values, qg, pg)
            expected = ops.knn(p, k, q, (qg, pg))
        assert torch.equal(near.index, expected.index), step
        assert torch.equal(near.dist2, expected.dist2), step


def test_most_rows_are_not_computed_anew():
    generator = torch.Generator().manual_seed(0)
    n, batch = 512, 32
    points = torch.randn(2, n, 8, generator=generator)
    group = torch.arange(n)
    near = RingNeighbours(10)
    near.update(points, group, points, group, group, group)
    for step in range(32):
        rows = (torch.arange(batch) + batch * step) % n
        points[:, rows] = torch.randn(2, batch, 8, generator=generator)
        near.update(points, rows, points, rows, group, group)
    assert near.n_recomputed < 0.01 * 2 * n * 32
