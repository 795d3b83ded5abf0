"""ops.ring_to_grid, ops.ring_knn and measure/ring_neighbours.py: after any history of changes, exactly what ops.knn
says of the whole rings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from op_checks import assert_same_bits, assert_threads_do_not_matter

from clmfast import ops
from clmfast.measure.ring_neighbours import RingNeighbours
from clmfast.ops.ring import Ring, RingState, empty_grid

K = 4


class TwoRings:
    """Rings of points and queries that receive a few rows per step, on one grid, with groups of two views."""

    def __init__(self, kind, n=60, n_queries=18, n_sets=3, width=6, seed=5):
        self.generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        self.rings, self.groups, self.grids = [], [], []
        for size in (n, n_queries):
            self.rings.append(torch.zeros(n_sets, size, width))
            self.groups.append(torch.zeros(2, size, dtype=torch.int64))
            self.grids.append(empty_grid(self.rings[-1], self.grids[0] if self.grids else None))
        self.n_written = [0, 0]

    def draw(self, shape, step):
        x = torch.randn(shape, generator=self.generator)
        if self.kind == "ties":
            x = x.sign()  # 64 different points, so most distances tie
        if self.kind == "turning":  # in few directions, which change: grids are turned, and go stale
            directions = torch.randn(5, shape[-1], generator=torch.Generator().manual_seed(step // 6))
            x = x[..., :5] @ directions + 0.01 * x
        if self.kind == "copies":  # of four points that hardly move from step to step, as states of layer 0
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))[:, torch.arange(shape[1]) % 4]
            x = x + 1e-6 * step
        if self.kind == "drifting":
            x = x / (1 + step) + step  # everything old is far away and thinly spread: lists run dry
        if self.kind == "growing":
            x = x * 10.0**step  # past what the grid was chosen for
        if self.kind == "shrinking":
            x = x * 10.0**-step
        if self.kind == "non-finite":
            x[:, ::4] = torch.nan
            x[:, 1::4] = 1e30  # finite, but distances overflow
        return x

    def step(self, step, batches, is_new=None):
        """Write a batch into each ring; returns both as the ops take them."""
        views = []
        for i, batch in enumerate(batches):
            ring, n = self.rings[i], self.rings[i].shape[1]
            rows = (self.n_written[i] + torch.arange(batch)) % n
            ring[:, rows] = self.draw((len(ring), batch, ring.shape[2]), step)
            self.groups[i][:, rows] = torch.randint(6, (2, batch), generator=self.generator)
            first = self.n_written[i] % n
            self.n_written[i] += batch
            views.append(Ring(ring, self.grids[i], min(n, self.n_written[i]), first, batch))
        ops.ring_to_grid(*views, is_new=step % 10 == 0 if is_new is None else is_new)
        return views


KINDS = ["gaussian", "ties", "copies", "turning", "drifting", "growing", "shrinking", "non-finite"]


def assert_equals_knn(index, points, queries, barred):
    p, q = points.points[:, : points.n], queries.points[:, : queries.n]
    for v in range(len(index)):
        groups = (barred[0][v, : queries.n].clone(), barred[1][v, : points.n].clone())
        assert torch.equal(index[v], ops.knn(p, K, q, groups).index)


@pytest.mark.parametrize("kind", KINDS)
def test_points_among_themselves(kind):
    data = TwoRings(kind)
    near = RingNeighbours(K, 1, 3, 60)
    for step in range(25):
        points, _ = data.step(step, (9, 3))
        barred = (data.groups[0][:1], data.groups[0][:1])  # a point's own group holds itself
        index = near.update(points, None, barred)
        assert_equals_knn(index, points, points, barred)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_in_two_views(kind):
    data = TwoRings(kind)
    near = RingNeighbours(K, 2, 3, 18)
    for step in range(25):
        points, queries = data.step(step, (9, 3))
        barred = (data.groups[1], data.groups[0])
        assert_equals_knn(near.update(points, queries, barred), points, queries, barred)


@pytest.mark.parametrize("is_self", [True, False])
def test_wide_rings_on_turned_grids(is_self):
    data = TwoRings("turning", n=400, n_queries=60, n_sets=2, width=100)
    near = RingNeighbours(K, 1 if is_self else 2, 2, 400 if is_self else 60)
    for step in range(24):
        points, queries = data.step(step, (400, 60) if step == 0 else (40, 7), is_new=step == 0)
        barred = (data.groups[0][:1], data.groups[0][:1]) if is_self else (data.groups[1], data.groups[0])
        index = near.update(points, None if is_self else queries, barred)
        assert_equals_knn(index, points, points if is_self else queries, barred)
    assert (data.grids[0].n_turned > 0).all()


def test_a_grid_that_wastes_measurements_is_chosen_anew():
    data = TwoRings("turning", n=400, n_queries=60, n_sets=1, width=100)
    near = RingNeighbours(K, 1, 1, 400)
    turns = []
    for step in range(4):
        points, _ = data.step(0, (400, 60) if step == 0 else (40, 7), is_new=step == 0)
        turns.append(data.grids[0].turn.clone())
        near.update(points, None, (data.groups[0][:1], data.groups[0][:1]))
        if step == 2:
            data.grids[0].wasted[0, 1] = 10**6
    assert torch.equal(turns[0], turns[2])
    assert not torch.equal(turns[2], turns[3])


@pytest.mark.parametrize("batches", [(60, 3), (9, 18), (60, 18), (0, 0), (1, 0), (0, 1)])
def test_any_number_of_rows_may_change(batches):
    data = TwoRings("gaussian")
    of_points, of_queries = RingNeighbours(K, 1, 3, 60), RingNeighbours(K, 2, 3, 18)
    for step in range(6):
        points, queries = data.step(step, (60, 18) if step == 0 else batches)
        barred = (data.groups[1], data.groups[0])
        assert_equals_knn(of_queries.update(points, queries, barred), points, queries, barred)
        barred = (data.groups[0][:1], data.groups[0][:1])
        assert_equals_knn(of_points.update(points, None, barred), points, points, barred)


def test_a_point_is_not_its_own_neighbour():
    points = Ring(torch.randn(1, 8, 2), empty_grid(torch.zeros(1, 8, 2)), 8, 0, 8)
    ops.ring_to_grid(points, points, is_new=True)
    apart = (torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))
    index = RingNeighbours(K, 1, 1, 8).update(points, None, apart)
    assert torch.equal(index[0], ops.knn(points.points, K).index)


def test_most_rows_are_not_computed_anew():
    n, batch = 512, 32
    data = TwoRings("gaussian", n=n, n_sets=2, width=8)
    near = RingNeighbours(10, 1, 2, n)
    group = torch.arange(n)[None]
    for step in range(33):
        points, _ = data.step(step, (n if step == 0 else batch, 1))
        near.update(points, None, (group, group))
    assert near.n_recomputed < 0.01 * 2 * n * 32


def history():
    """The lists after a few steps."""
    data = TwoRings("gaussian", n=333, n_queries=50, width=37)
    near = RingNeighbours(K, 2, 3, 50)
    own = RingNeighbours(K, 1, 3, 333)
    for step in range(9):
        points, queries = data.step(step, (70, 10))
        near.update(points, queries, (data.groups[1], data.groups[0]))
        own.update(points, None, (data.groups[0][:1], data.groups[0][:1]))
    wide = TwoRings("turning", n=400, n_queries=60, width=100)
    turned = RingNeighbours(K, 1, 3, 400)
    for step in range(5):
        points, _ = wide.step(step, (400, 60) if step == 0 else (40, 7))
        turned.update(points, None, (wide.groups[0][:1], wide.groups[0][:1]))
    return [*near._state, *own._state, *turned._state]


def test_threads_do_not_matter():
    assert_threads_do_not_matter(history)


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    script = "import sys, torch, test_ring_neighbours as t; torch.save(t.history(), sys.argv[1])"
    best = history()
    for isa in ("baseline", "avx2", "avx512", "avx512vnni"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / isa)],
            env={**os.environ, "CLMFAST_ISA": isa},
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
        )
        if "this processor does not have it" not in done.stderr:
            assert_same_bits(torch.load(tmp_path / isa), best)


# ---- does it refuse what it should?

POINTS = torch.zeros(2, 40, 3)
GROUP = torch.zeros(1, 40, dtype=torch.int64)


def state(*, n=40, k=2):
    return RingState(
        torch.zeros(1, 2, n, 5, dtype=torch.int64),
        torch.zeros(1, 2, n, dtype=torch.int64),
        torch.zeros(1, 2, n, k, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("ring", "barred", "of", "message"),
    [
        ({"points": POINTS[0]}, (GROUP, GROUP), state(), r"ring_knn: points must be \[S, N, D\]"),
        ({"points": POINTS.half()}, (GROUP, GROUP), state(), "ring_knn: points must be float32 and contiguous"),
        ({"points": POINTS.mT.contiguous().mT}, (GROUP, GROUP), state(), "points must be float32 and contiguous"),
        ({"points": torch.zeros(2, 80, 3)}, (GROUP, GROUP), state(), r"the grid must be made for points \[2, 80, 3\]"),
        ({"n": 41}, (GROUP, GROUP), state(), "0 <= n <= N, 0 <= first < N and 0 <= count <= N, got n=41"),
        ({"first": 40}, (GROUP, GROUP), state(), "got n=40 first=40"),
        ({"count": -1}, (GROUP, GROUP), state(), "got n=40 first=0 count=-1"),
        ({}, (GROUP.int(), GROUP), state(), "ring_knn: query_group must be int64"),
        ({}, (GROUP, GROUP[:, :3]), state(), r"groups must be \[V, Q\] and \[V, N\] with Q=40 and N=40"),
        ({}, (GROUP, GROUP), state(n=39), r"state must be \[V, S, Q, length\], \[V, S, Q\] and \[V, S, Q, k\]"),
        ({}, (GROUP, GROUP), state(k=6), "with 1 <= k <= length"),
    ],
)
def test_refusals(ring, barred, of, message):
    points = Ring(POINTS, empty_grid(POINTS), 40, 0, 40)._replace(**ring)
    with pytest.raises(ValueError, match=message):
        ops.ring_knn(points, None, barred, of)
