"""kmeans_search against its reference, against restarts of scikit-learn, and against what any partition must be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from clmfast import ops
from clmfast.ops import reference
from tests.op_checks import assert_same_bits, assert_threads_do_not_matter


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(S: int, N: int, D: int, n_blobs: int, spread: float = 0.3, seed: int = 0) -> Tensor:
    centre = normal(S, n_blobs, D, seed=seed)
    return centre[:, torch.arange(N) % n_blobs] + spread * normal(S, N, D, seed=seed + 1)


def drawn_labels(P: int, S: int, N: int, K: int, seed: int = 0) -> Tensor:
    return torch.randint(K, (P, S, N), generator=torch.Generator().manual_seed(seed))


def inertia_of(points: Tensor, label: Tensor) -> float:
    """Of one set [N, D], in float64."""
    is_point = label >= 0
    x, label = points[is_point].double().numpy(), label[is_point].numpy()
    return sum(((x[label == k] - x[label == k].mean(0)) ** 2).sum() for k in np.unique(label))


def assert_same_partition(a: Tensor, b: Tensor) -> None:
    """Whatever the clusters are called: of starts that end in one partition, rounding decides whose names count."""
    for of_a, of_b in zip(a, b, strict=True):
        assert adjusted_rand_score(of_a, of_b) == 1


def assert_right(points: Tensor, K: int, found: ops.Partitions) -> None:
    """Labels fit the points, inertia the labels, and the first partition is one of Lloyd's algorithm."""
    is_finite = points.isfinite().all(dim=2)
    for label, inertia in zip(found.label, found.inertia, strict=True):
        for s in range(len(points)):
            if inertia[s].isinf():
                assert (label[s] == -1).all()
                continue
            assert torch.equal(label[s] >= 0, is_finite[s])
            assert (label[s] < K).all()
    for s in range(len(points)):
        assert inertia_of(points[s], found.label[0, s]) <= found.inertia[0, s] * (1 + 1e-6) + 1e-9
    again = ops.kmeans(points, K, init=found.centroid, max_iter=1)
    assert (again.inertia <= found.inertia[0] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize(("S", "N", "D", "K"), [(1, 40, 1, 3), (2, 63, 7, 5), (3, 130, 33, 20), (1, 300, 3, 30)])
@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("moves", [0, 1, 10])
def test_against_reference(S: int, N: int, D: int, K: int, P: int, moves: int) -> None:
    points, known = blobs(S, N, D, K, spread=0.6), drawn_labels(P, S, N, K)
    found = ops.kmeans_search(points, K, known=known, n_cold=0, keep=P, moves=moves, seed=2)
    right = reference.kmeans_search(points, K, known, moves, seed=2)
    assert_same_partition(found.label[0], right.label)
    torch.testing.assert_close(found.inertia[0], right.inertia, rtol=1e-6, atol=1e-9)


def test_points_without_a_cluster_join_one() -> None:
    points, known = blobs(2, 90, 5, 6), drawn_labels(2, 2, 90, 6)
    known[:, :, 50:] = -1
    known[1, 1] = 99  # as good as nothing
    found = ops.kmeans_search(points, 6, known=known, n_cold=0, keep=2, moves=3)
    right = reference.kmeans_search(points, 6, known, 3)
    assert_same_partition(found.label[0], right.label)


def test_moves_by_hand() -> None:
    """Two clusters share the points at 0, and one has those at 10 and 20: a split and a merge put that right."""
    points = torch.tensor([[[0.0], [0.5], [10.0], [10.5], [20.0], [20.5]]])
    known = torch.tensor([[[0, 1, 2, 2, 2, 2]]])
    stuck = ops.kmeans_search(points, 3, known=known, n_cold=0, moves=0)
    assert stuck.label.tolist() == [[[0, 1, 2, 2, 2, 2]]]
    found = ops.kmeans_search(points, 3, known=known, n_cold=0, moves=1)
    assert found.inertia.tolist() == [[3 * 2 * 0.25**2]]
    assert found.label[0, 0].tolist() == [0, 0, 2, 2, 1, 1]
    assert found.origin.tolist() == [0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("D", "spread"), [(16, 0.5), (128, 1.0)])  # with 128, in a projection
def test_one_start_does_what_many_restarts_do(seed: int, D: int, spread: float) -> None:
    points = blobs(3, 600, D, 24, spread, seed=10 * seed)
    found = ops.kmeans(points, 24, moves=40, n_init=2, seed=seed)
    for s in range(3):
        theirs = KMeans(24, n_init=20, random_state=seed).fit(points[s].double().numpy())
        assert found.inertia[s].item() <= theirs.inertia_ * 1.003
        assert inertia_of(points[s], found.label[s]) == pytest.approx(found.inertia[s].item(), rel=1e-6)


def test_partitions_come_lowest_first_and_are_told_apart() -> None:
    points = normal(4, 400, 8)
    found = ops.kmeans_search(points, 9, n_cold=6, keep=8, moves=2)
    assert (found.inertia.diff(dim=0) >= 0).logical_or(found.inertia[1:].isinf()).all()
    assert found.inertia[:3].isfinite().all() and found.inertia[6:].isinf().all()
    for place in range(8):
        for s in range(4):
            if found.inertia[place, s].isfinite():
                right = inertia_of(points[s], found.label[place, s])
                assert found.inertia[place, s].item() == pytest.approx(right, rel=1e-4)
    best = found.inertia[0]
    assert ((found.inertia[1] - best) / best > 5e-5).all()
    assert_right(points, 9, found)


def test_a_cold_start_that_wins_says_so() -> None:
    points = blobs(1, 300, 6, 5)
    bad = (torch.arange(300) % 7 < 1).long()[None, None].expand(1, 1, 300)
    found = ops.kmeans_search(points, 5, known=bad, n_cold=torch.tensor([3]), keep=4, moves=0)
    assert 1 <= found.origin.item() <= 3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("S", "D"), [(1, 20), (9, 128)])
def test_threads_do_not_matter(S: int, D: int) -> None:
    points = blobs(S, 700, D, 12, spread=1.0)
    assert_threads_do_not_matter(lambda: ops.kmeans_search(points, 12, n_cold=2, keep=2, moves=12, renewals=3))


def test_seed() -> None:
    points = normal(2, 300, 9)
    assert_same_bits(*(ops.kmeans_search(points, 12, seed=3) for _ in range(2)))
    assert not torch.equal(ops.kmeans_search(points, 12, seed=3).label, ops.kmeans_search(points, 12, seed=4).label)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_scale_and_offset(factor: float, offset: float) -> None:
    points = blobs(2, 400, 128, 10)
    found = ops.kmeans_search((points + offset) * factor, 10, n_cold=2, keep=2, moves=10)
    plain = ops.kmeans_search(points, 10, n_cold=2, keep=2, moves=10)
    torch.testing.assert_close(found.inertia[0] / factor**2, plain.inertia[0], rtol=1e-2, atol=0)
    memory = ops.search_memory(2, 400, 128, 10)
    kept = [ops.kmeans_search((points + offset) * factor, 10, n_cold=2, keep=2, moves=10, memory=memory)]
    kept += [ops.kmeans_search((points + offset) * factor, 10, known=kept[0].label, n_cold=0, keep=2, memory=memory)]
    for again in kept:
        torch.testing.assert_close(again.inertia[0], found.inertia[0], rtol=1e-2, atol=0)


def test_points_that_are_few_or_equal_or_not_finite() -> None:
    assert ops.kmeans_search(torch.ones(1, 40, 3), 5).inertia.item() == 0
    three = normal(1, 3, 4)[:, torch.arange(60) % 3]
    assert ops.kmeans_search(three, 5, keep=3, n_cold=3).inertia[0].item() == pytest.approx(0, abs=1e-9)
    broken = blobs(1, 100, 4, 5)
    broken[0, ::7, 2] = torch.nan
    broken[0, 3, 1] = torch.inf
    known = drawn_labels(2, 1, 100, 5)
    found = ops.kmeans_search(broken, 5, known=known, n_cold=0, keep=2, moves=5)
    assert_same_partition(found.label[0], reference.kmeans_search(broken, 5, known, 5).label)
    nothing = ops.kmeans_search(torch.full((1, 9, 2), torch.nan), 3, keep=2)
    assert (nothing.label == -1).all()
    assert ops.kmeans_search(torch.empty(2, 9, 0), 3).inertia.tolist() == [[0, 0]]
    assert ops.kmeans_search(torch.empty(0, 9, 2), 3).label.shape == (1, 0, 9)
    one = ops.kmeans_search(normal(1, 1, 3), 1)
    assert one.label.tolist() == [[[0]]]


@given(
    S=st.integers(0, 2), N=st.integers(1, 70), D=st.integers(0, 20), K=st.integers(1, 70), n_values=st.integers(1, 5),
    P=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(S: int, N: int, D: int, K: int, n_values: int, P: int, seed: int) -> None:
    points = torch.randint(n_values, (S, N, D), generator=torch.Generator().manual_seed(seed)).float()
    K = min(K, N)
    known = drawn_labels(P, S, N, K + 1, seed) - 1 if P else None
    assert_right(points, K, ops.kmeans_search(points, K, known=known, n_cold=1, keep=3, moves=2, renewals=2, seed=seed))


def test_renewals_lead_out_of_an_optimum() -> None:
    points = blobs(4, 400, 8, 40, spread=1.5, seed=5)
    known = ops.kmeans_search(points, 20, n_cold=1, moves=0).label
    again = {"known": known, "n_cold": 0, "moves": 0}
    without = ops.kmeans_search(points, 20, **again)
    renewed = ops.kmeans_search(points, 20, renewals=100, keep=3, **again)
    assert_right(points, 20, renewed)
    is_better = renewed.inertia[0] < without.inertia[0]
    assert (renewed.inertia[0] <= without.inertia[0]).all() and is_better.any()
    assert torch.equal(renewed.origin > 0, is_better) and (without.origin == 0).all()


def test_renewals_end_where_nothing_is_gained() -> None:
    """At a perfect partition none begins, elsewhere the first that gains nothing is the last."""
    few_values = torch.arange(3.0).repeat(20)[None, :, None]
    found = ops.kmeans_search(few_values, 3, n_cold=1, renewals=2**20)
    assert found.origin.item() == 0 and found.inertia[0].item() == pytest.approx(0, abs=1e-9)
    ops.kmeans_search(blobs(2, 200, 6, 9), 9, n_cold=1, renewals=2**20)  # would not end


def test_known_partitions_without_labels_are_left_out() -> None:
    points = blobs(1, 200, 6, 9)
    known = ops.kmeans_search(points, 9, n_cold=2, keep=2, seed=1).label
    known[1] = -1
    found = ops.kmeans_search(points, 9, known=known, n_cold=0, keep=2, moves=0)
    assert found.inertia[1].isinf().all() and (found.label[1] == -1).all()


def a_window(n_steps: int, seed: int = 0) -> list[tuple[Tensor, slice]]:
    """Points of 2 sets of which a quarter is replaced at every step, and which."""
    arriving = blobs(2, 240 + 60 * n_steps, 80, 6, spread=1.0, seed=seed)
    points, steps = arriving[:, :240], list[tuple[Tensor, slice]]()
    for step in range(n_steps):
        new = slice(step % 4 * 60, step % 4 * 60 + 60)
        points = points.clone()
        points[:, new] = arriving[:, 240 + 60 * step :][:, :60]
        steps.append((points, new))
    return steps


def test_memory_saves_work_and_changes_little() -> None:
    """With a memory, directions are those of earlier points: another projection, but as good a search."""
    memory = ops.search_memory(2, 240, 80, 6)
    assert memory is not None
    known = None
    for step, (points, new) in enumerate(a_window(9)):
        if known is not None:
            known[:, :, new] = -1
        n_cold = 2 if known is None else torch.tensor([0, int(step == 5)])
        kept = memory.directions.clone()
        found = ops.kmeans_search(points, 6, known=known, n_cold=n_cold, keep=2, moves=4, seed=step, memory=memory)
        fresh = ops.kmeans_search(points, 6, n_cold=4, keep=2, moves=4, seed=step)
        assert (found.inertia[0] <= fresh.inertia[0] * 1.02).all()
        assert_right(points, 6, found)
        right = (points - memory.directions[:, :1]) @ memory.directions[:, 1:].mT
        torch.testing.assert_close(memory.projected, right, rtol=1e-4, atol=1e-4)
        if step > 0:
            assert torch.equal(memory.directions[0], kept[0])  # without a cold start they stay
            assert torch.equal(memory.directions[1], kept[1]) == (step != 5)
        known = found.label[:2].clone()


def test_points_that_a_memory_knows_are_not_projected_again() -> None:
    (points, _), (later, new) = a_window(2)
    memory = ops.search_memory(2, 240, 80, 6)
    assert memory is not None
    first = ops.kmeans_search(points, 6, n_cold=1, keep=1, memory=memory)
    before = memory.projected.clone()
    known = first.label.clone()
    known[:, :, new] = -1
    ops.kmeans_search(later, 6, known=known, n_cold=0, keep=1, memory=memory)
    is_old = torch.ones(240, dtype=torch.bool)
    is_old[new] = False
    assert torch.equal(memory.projected[:, is_old], before[:, is_old])
    assert not torch.equal(memory.projected[:, new], before[:, new])


@pytest.mark.parametrize(
    ("N", "D", "K"), [(240, 80, 6), (97, 48, 8), (64, 200, 3), (31, 80, 6), (240, 39, 6), (5, 4, 2)]
)
def test_a_memory_has_the_size_that_the_search_asks_for(N: int, D: int, K: int) -> None:
    memory = ops.search_memory(1, N, D, K)
    if memory is not None:
        ops.kmeans_search(normal(1, N, D), K, memory=memory)
        assert memory.projected.any()
    else:
        wrong = ops.SearchMemory(torch.zeros(1), torch.zeros(1))
        with pytest.raises(ValueError, match="not projected"):
            ops.kmeans_search(normal(1, N, D), K, memory=wrong)


def test_memory_may_lie_anyhow() -> None:
    points, memory, apart = blobs(2, 240, 80, 6), ops.search_memory(2, 240, 80, 6), ops.search_memory(2, 240, 80, 6)
    assert memory is not None and apart is not None
    apart = ops.SearchMemory(*(torch.zeros(*x.shape, 2)[..., 0] for x in apart))
    found = [ops.kmeans_search(points, 6, memory=kept) for kept in (memory, apart)]
    assert_same_bits(*found)
    assert_same_bits(memory, apart)


def test_memory_of_another_shape() -> None:
    memory = ops.search_memory(2, 240, 80, 6)
    assert memory is not None
    with pytest.raises(ValueError, match=r"projected must be \[S, N, M\]"):
        ops.kmeans_search(normal(2, 200, 80), 6, memory=memory)
    with pytest.raises(ValueError, match="directions must be float32"):
        ops.kmeans_search(normal(2, 240, 80), 6, memory=memory._replace(directions=memory.directions.double()))


POINTS = normal(2, 9, 3)


@pytest.mark.parametrize(
    ("K", "more", "message"),
    [
        (0, {}, "n_clusters must be in"),
        (10, {}, "n_clusters must be in"),
        (2, {"keep": 0}, "keep must be from 1"),
        (2, {"known": torch.zeros(2, 2, 9, dtype=torch.int64)}, "keep must be from 1 to 2^20 and at least P"),
        (2, {"known": torch.zeros(2, 9, dtype=torch.int64)}, "known must be"),
        (2, {"known": torch.zeros(1, 2, 8, dtype=torch.int64)}, "known must be"),
        (2, {"known": torch.zeros(1, 2, 9)}, "known must be"),
        (2, {"n_cold": 0}, "every set needs a partition to begin with"),
        (2, {"n_cold": torch.tensor([1])}, "n_cold must be"),
        (2, {"n_cold": torch.tensor([1, -1])}, "every set needs a partition to begin with"),
        (2, {"moves": -1}, "moves must be from 0"),
        (2, {"renewals": -1}, "renewals must be from 0"),
        (2, {"max_iter": -1}, "max_iter must be from 0"),
        (
            2,
            {"memory": (torch.zeros(1), torch.zeros(1))},
            "a projection cannot be kept of points that are not projected",
        ),
    ],
)
def test_bad_input(K: int, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        ops.kmeans_search(POINTS, K, **more)


def test_opcheck() -> None:
    op = torch.ops.clmfast.kmeans_search.default
    cold = torch.ones(2, dtype=torch.int64)
    torch.library.opcheck(op, (POINTS, 3, None, cold, 2, 1, 2, 10, 0, None, None))
    torch.library.opcheck(op, (POINTS, 3, torch.zeros(1, 2, 9, dtype=torch.int64), cold, 2, 1, 2, 10, 0, None, None))
    wide = normal(2, 60, 64)
    memory = ops.search_memory(2, 60, 64, 3)
    assert memory is not None
    torch.library.opcheck(op, (wide, 3, torch.zeros(1, 2, 60, dtype=torch.int64), cold, 2, 1, 2, 10, 0, *memory))
