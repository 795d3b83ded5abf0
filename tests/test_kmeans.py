"""ops.kmeans against scikit-learn, against the reference, and on data that other k-means stumble over."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import assert_same_bits, assert_threads_do_not_matter, outputs_full_of_nan
from sklearn.cluster import KMeans

from clmfast import ops
from clmfast.ops import reference


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(S, N, D, K, spread=0.3, seed=0):
    centre = normal(S, K, D, seed=seed)
    which = torch.randint(K, (S, N), generator=torch.Generator().manual_seed(seed + 1))
    return centre.gather(1, which[..., None].expand(S, N, D)) + spread * normal(S, N, D, seed=seed + 2)


def assert_consistent(points, found):
    """label is the nearest of the returned centroids in float64, ties to the smaller, and inertia the sum over that."""
    for s in range(len(points)):
        is_finite = points[s].isfinite().all(dim=1)
        x, centroid = points[s][is_finite].double(), found.centroid[s].double()
        dist2 = (x[:, None] - centroid).square().sum(dim=2)
        assert torch.equal(found.label[s][is_finite], dist2.argmin(dim=1))
        assert (found.label[s][~is_finite] == -1).all()
        torch.testing.assert_close(found.inertia[s], dist2.amin(dim=1).sum(), rtol=1e-12, atol=0)
    assert found.centroid.isfinite().all()


def assert_like_reference(points, init, **options):
    with outputs_full_of_nan():
        found = ops.kmeans(points, init.shape[1], init=init, **options)
    expected = reference.kmeans(points, init, **options)
    assert torch.equal(found.label, expected.label)
    assert torch.equal(found.n_iter, expected.n_iter)
    torch.testing.assert_close(found.centroid, expected.centroid, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(found.inertia, expected.inertia, rtol=1e-9, atol=1e-60)
    assert_consistent(points, found)
    return found


# ---- is it right?


def test_by_hand():
    points = torch.tensor([[[0.0], [2.0], [10.0], [12.0]]])
    found = ops.kmeans(points, 2, init=torch.tensor([[[0.0], [1.0]]]))
    # {0} and {2, 10, 12} -> 0 and 8 -> {0, 2} and {10, 12} -> 1 and 11, after which no label changes
    assert found.label.tolist() == [[0, 0, 1, 1]]
    assert found.centroid.flatten().tolist() == [1, 11]
    assert found.inertia.tolist() == [4]
    assert found.n_iter.tolist() == [3]


def test_ties_go_to_the_smaller_cluster():
    points = torch.tensor([[[-1.0], [0.0], [1.0]]])
    found = ops.kmeans(points, 2, init=torch.tensor([[[1.0], [-1.0]]]), max_iter=1, tol=0)
    # the point in the middle goes to cluster 0, whose mean is then 0.5
    assert found.centroid.flatten().tolist() == [0.5, -1]
    assert found.label.tolist() == [[1, 0, 0]]


def test_ties_that_rounding_would_break():
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(-999, 1000, (64, 9, 5), generator=generator).float()
    step = torch.randint(-999, 1000, (64, 1, 5), generator=generator).float()
    # The first point of every set is as far from one centroid as from the other, which is exact in float64 only.
    assert_like_reference(points, torch.cat([points[:, :1] + step, points[:, :1] - step], dim=1), max_iter=1)


@pytest.mark.parametrize(("S", "N", "D", "K"), [(1, 2, 1, 1), (2, 63, 7, 5), (3, 130, 64, 20), (1, 300, 3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_reference(S, N, D, K, dtype):
    points = normal(S, N, D).to(dtype)
    assert_like_reference(points, points[:, :K])


@pytest.mark.parametrize("max_iter", [1, 2, 100])
@pytest.mark.parametrize("tol", [0.0, 1e-4, 0.1])
def test_stopping(max_iter, tol):
    points = blobs(2, 200, 5, 6, spread=1)
    assert_like_reference(points, points[:, :6], max_iter=max_iter, tol=tol)


DATA = {
    "offset": lambda x: 1e4 + x,
    "tiny": lambda x: x * 1e-20,
    "huge": lambda x: x * 1e18,
    "duplicates": lambda x: x[:, torch.arange(x.shape[1]) % 9],
    "ranges": lambda x: x * torch.logspace(-20, 20, x.shape[2]),
}


@pytest.mark.parametrize("name", DATA)
def test_awkward_data(name):
    points = DATA[name](blobs(2, 200, 6, 5))
    assert_like_reference(points, points[:, :7])


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("N", "D", "K"), [(500, 16, 8), (2048, 32, 20)])
def test_reaches_the_inertia_of_sklearn(N, D, K, offset):
    points = blobs(2, N, D, K, spread=0.7) + offset
    init = points[:, :K]
    found = ops.kmeans(points, K, init=init)
    for s in range(2):
        # in float64, which is what the op's distances are decided in
        x, start = points[s].double().numpy(), init[s].double().numpy()
        theirs = KMeans(K, init=start, n_init=1, algorithm="lloyd", max_iter=100, tol=1e-4).fit(x)
        assert found.inertia[s].item() == pytest.approx(theirs.inertia_, rel=1e-5)
        assert found.n_iter[s].item() == theirs.n_iter_
    assert_consistent(points, found)


def test_drawn_starts_are_as_good_as_those_of_sklearn():
    points = blobs(1, 600, 8, 12, spread=0.1)
    theirs = [KMeans(12, n_init=1, random_state=i).fit(points[0].numpy()).inertia_ for i in range(20)]
    ours = [ops.kmeans(points, 12, seed=i).inertia.item() for i in range(20)]
    plain = [ops.kmeans(points, 12, seed=i, init="random").inertia.item() for i in range(20)]
    assert np.mean(ours) < 1.15 * np.mean(theirs)
    assert np.mean(ours) < 0.7 * np.mean(plain)


def test_random_start_takes_different_points():
    points = torch.arange(30.0).view(1, 30, 1)
    drawn = {tuple(sorted(ops.kmeans(points, 30, init="random", seed=i).label[0].tolist())) for i in range(3)}
    assert drawn == {tuple(range(30))}  # every point is a centroid of its own
    starts = {tuple(ops.kmeans(points, 3, init="random", seed=i, max_iter=1).centroid.flatten()) for i in range(8)}
    assert len(starts) > 4


def test_sets_and_restarts_draw_apart():
    points = blobs(1, 100, 3, 8, spread=0.5)
    alike = ops.kmeans(points.expand(4, -1, -1), 8, init="random", max_iter=1)
    assert len({tuple(row.tolist()) for row in alike.label}) == 4


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_best_of_the_restarts_is_returned(init):
    points = blobs(3, 150, 4, 10, spread=0.5)
    inertias = torch.stack([ops.kmeans(points, 10, init=init, n_init=n, seed=5).inertia for n in range(1, 7)])
    assert (inertias.diff(dim=0) <= 0).all()
    assert (inertias[-1] < inertias[0]).any()
    assert_consistent(points, ops.kmeans(points, 10, init=init, n_init=6, seed=5))


def test_empty_clusters_take_the_farthest_points():
    points = torch.tensor([[[0.0], [1.0], [2.0], [50.0], [100.0]]])
    init = torch.tensor([[[1.0], [1000.0], [2000.0]]])
    found = assert_like_reference(points, init)
    assert sorted(found.centroid.flatten().tolist()) == [1, 50, 100]
    theirs = KMeans(3, init=init[0].numpy(), n_init=1).fit(points[0].numpy())
    assert found.inertia.item() == pytest.approx(theirs.inertia_)


@pytest.mark.parametrize("K", [5, 12])
def test_more_clusters_than_different_points(K):
    points = normal(2, 4, 3)[:, torch.arange(40) % 4]
    for init in ("k-means++", "random", points[:, torch.arange(K) % 3]):
        found = ops.kmeans(points, K, init=init)
        assert_consistent(points, found)
        # means of duplicates in float64, rounded to float32, are the duplicates: nothing is left over
        assert (found.inertia == 0).all() or init == "random"
    assert_like_reference(points, points[:, torch.arange(K) % 3])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e30])
def test_identical_points_are_one_cluster(value):
    points = torch.full((2, 50, 7), value)
    for init in ("k-means++", "random", torch.full((2, 6, 7), value)):
        found = ops.kmeans(points, 6, init=init, n_init=1 if isinstance(init, torch.Tensor) else 3)
        assert (found.label == 0).all()
        assert (found.inertia == 0).all()
        assert (found.centroid == points[0, 0, 0]).all()


def test_rows_that_are_not_finite_have_no_influence():
    points = blobs(2, 120, 5, 4)
    spoilt = torch.cat([points, torch.full((2, 3, 5), torch.nan)], dim=1)
    spoilt[:, -1, 2:] = torch.inf
    order = torch.randperm(123, generator=torch.Generator().manual_seed(0))
    order = torch.cat([order[order < 120].sort().values[:60], torch.tensor([120, 121, 122]), torch.arange(60, 120)])
    spoilt = spoilt[:, order]
    clean = ops.kmeans(points, 4, init=points[:, :4])
    found = ops.kmeans(spoilt, 4, init=points[:, :4])
    is_point = order < 120
    assert_same_bits([found.label[:, is_point].contiguous(), *found[1:]], clean)
    assert (found.label[:, ~is_point] == -1).all()
    for init in ("k-means++", "random"):
        assert_consistent(spoilt, ops.kmeans(spoilt, 4, init=init))


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("n_finite", [0, 1, 3])
def test_fewer_finite_points_than_clusters(init, n_finite):
    points = normal(2, 20, 3)
    points[:, n_finite:] = torch.nan
    found = ops.kmeans(points, 5, init=init)
    assert_consistent(points, found)
    assert (found.label >= 0).sum() == 2 * n_finite
    assert (found.inertia == 0).all() or init == "random"


def test_init_that_is_not_finite_starts_at_the_mean():
    points = blobs(1, 80, 4, 3)
    init = points[:, :3].clone()
    repaired = init.clone()
    init[0, 1, 0] = torch.nan
    repaired[0, 1] = points[0].double().mean(dim=0).float()
    found, expected = ops.kmeans(points, 3, init=init), ops.kmeans(points, 3, init=repaired)
    torch.testing.assert_close(found.centroid, expected.centroid)
    assert torch.equal(found.label, expected.label)


@settings(max_examples=30, deadline=None)
@given(
    S=st.integers(0, 3), N=st.integers(1, 70), D=st.integers(0, 20), K=st.integers(1, 70), n_values=st.integers(1, 5),
    init=st.sampled_from(["k-means++", "random"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(S, N, D, K, n_values, init, seed):
    points = torch.randint(n_values, (S, N, D), generator=torch.Generator().manual_seed(seed)).float()
    with outputs_full_of_nan():
        found = ops.kmeans(points, min(K, N), init=init, n_init=2, seed=seed)
    assert_consistent(points, found)
    assert ((found.n_iter >= 1) & (found.n_iter <= 100)).all()


def test_views_are_read_as_they_are():
    wide = normal(50, 8, 3).permute(2, 0, 1)
    init = normal(3, 8, 4).mT
    dense = ops.kmeans(wide.contiguous(), 4, init=init.contiguous())
    assert_same_bits(ops.kmeans(wide, 4, init=init), dense)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_threads_do_not_matter(init):
    points = blobs(3, 1000, 9, 7, spread=1)
    assert_threads_do_not_matter(lambda: ops.kmeans(points, 7, init=init, n_init=3))


def test_plus_plus_tells_near_points_apart_from_a_far_one():
    """Their squared distances are far below the rounding of their squared norms, seen from the far point."""
    sites = torch.cat([normal(1, 6, 20)[0] * 1e-2, torch.full((1, 20), 1e4)])
    points = sites.repeat(1, 3, 1)
    for seed in range(40):
        assert len(ops.kmeans(points, 7, seed=seed, max_iter=1).label.unique()) == 7


def test_seed():
    points = blobs(2, 300, 9, 12, spread=1)
    assert_same_bits(ops.kmeans(points, 12, seed=3), ops.kmeans(points, 12, seed=3))
    assert not torch.equal(ops.kmeans(points, 12, seed=3).label, ops.kmeans(points, 12, seed=4).label)


# ---- is it registered right?


def test_opcheck():
    points = normal(2, 20, 5)
    op = torch.ops.clmfast.kmeans.default
    torch.library.opcheck(op, (points, 3, None, False, 2, 10, 1e-4, 0))
    torch.library.opcheck(op, (points.half(), 3, points[:, :3], False, 1, 10, 1e-4, 0))


def test_compiled():
    points = normal(2, 20, 5).requires_grad_()
    compiled = torch.compile(lambda p: ops.kmeans(p, 3, n_init=2), fullgraph=True)
    found = compiled(points)
    assert_same_bits(found, ops.kmeans(points, 3, n_init=2))
    assert not found.centroid.requires_grad


# ---- does it refuse what it should?

POINTS = torch.zeros(2, 10, 3)


@pytest.mark.parametrize(
    ("points", "K", "options", "message"),
    [
        (POINTS, 0, {}, "kmeans: n_clusters must be in [1, N], got n_clusters=0 with N=10"),
        (POINTS, 11, {}, "kmeans: n_clusters must be in [1, N], got n_clusters=11 with N=10"),
        (POINTS[:, :0], 1, {}, "kmeans: n_clusters must be in [1, N], got n_clusters=1 with N=0"),
        (POINTS[0], 2, {}, "kmeans: points must be [S, N, D], got [10, 3]"),
        (POINTS.double(), 2, {}, "kmeans: points must be float32, bfloat16 or float16"),
        (POINTS, 2, {"n_init": 0}, "kmeans: n_init must be at least 1, got n_init=0"),
        (POINTS, 2, {"max_iter": 0}, "kmeans: max_iter must be at least 1, got max_iter=0"),
        (POINTS, 2, {"moves": -1}, "kmeans_search: moves must be from 0 to 2^20, got moves=-1"),
        (POINTS, 2, {"moves": 2**21}, "kmeans_search: moves must be from 0 to 2^20, got moves=2097152"),
        (POINTS, 2, {"tol": -1.0}, "kmeans: tol must not be negative, got tol=-1"),
        (POINTS, 2, {"tol": float("nan")}, "kmeans: tol must not be negative, got tol=nan"),
        (POINTS, 2, {"init": "kmeans++"}, 'kmeans: init must be "k-means++", "random" or a tensor, got "kmeans++"'),
        (POINTS, 2, {"init": POINTS}, "kmeans: init must be [S, K, D] = [2, 2, 3], got [2, 10, 3]"),
        (POINTS, 2, {"init": POINTS[:, :2].double()}, "kmeans: init must be float32, bfloat16 or float16"),
        (
            POINTS,
            2,
            {"init": POINTS[:, :2], "n_init": 3},
            "kmeans: n_init must be 1 when init is a tensor, got n_init=3",
        ),
    ],
)
def test_refusals(points, K, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as it is, not as a pattern
        ops.kmeans(points, K, **options)
    assert str(error.value).startswith(message)
