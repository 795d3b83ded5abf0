"""ops.knn against all pairs in float64: exact to the bit, whatever the data."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import AWKWARD, assert_same_bits, assert_threads_do_not_matter, outputs_full_of_nan

from clmfast import ops
from clmfast.ops import reference

INF, NAN = float("inf"), float("nan")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(points, k, queries=None, barred=None, within=None):
    with outputs_full_of_nan():
        found = ops.knn(points, k, queries, barred, within=within)
    expected = reference.knn(points, k, queries, barred)
    if not isinstance(barred, list):
        found, expected = [found], [expected]
    for view, of_view in zip(found, expected, strict=True):
        if within is not None:
            is_out = of_view.dist2 > within[:, within.shape[1] - of_view.dist2.shape[1] :, None]
            of_view = reference.KNN(of_view.dist2.masked_fill(is_out, INF), of_view.index.masked_fill(is_out, -1))
        assert torch.equal(view.index, of_view.index)
        assert_same_bits([view.dist2], [of_view.dist2])


# ---- is it right?


def test_by_hand():
    points = torch.tensor([[[0.0], [1.0], [3.0], [7.0]]])
    found = ops.knn(points, 2)
    assert found.index.tolist() == [[[1, 2], [0, 2], [1, 0], [2, 1]]]
    assert found.dist2.tolist() == [[[1, 9], [1, 4], [4, 9], [16, 36]]]
    asked = ops.knn(points, 3, torch.tensor([[[2.0]]]))
    assert asked.index.tolist() == [[[1, 2, 0]]]  # 1 and 3 are equally far: the smaller index first
    assert asked.dist2.tolist() == [[[1, 1, 4]]]


@pytest.mark.parametrize(("S", "N", "D"), [(1, 2, 1), (2, 63, 7), (3, 130, 64), (2, 300, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_self_form(S, N, D, dtype):
    for k in {1, min(5, N - 1), N - 1}:
        assert_exact(normal(S, N, D).to(dtype), k)


@pytest.mark.parametrize(("Q", "N", "k"), [(1, 1, 1), (3, 200, 24), (130, 63, 10), (50, 20, 33), (4, 500, 1)])
def test_queries(Q, N, k):
    assert_exact(normal(2, N, 19), k, normal(2, Q, 19, seed=1))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_awkward_data(name, k):
    points = AWKWARD[name](normal(2, 150, 12))
    assert_exact(points, k)
    assert_exact(points, k, points[:, :20] * 1.5)


@pytest.mark.parametrize("k", [1, 6, 60])
def test_rows_that_are_not_finite(k):
    points, queries = normal(2, 70, 5), normal(2, 9, 5, seed=1)
    points[0, 3, 1], points[0, 40, 4], points[1, 0, 0] = NAN, INF, -INF
    queries[1, 4, 2] = NAN
    assert_exact(points, k)
    assert_exact(points, k, queries)
    nothing = ops.knn(torch.full_like(points, NAN), k)
    assert (nothing.index == -1).all() and (nothing.dist2 == INF).all()


def test_a_far_query_does_not_spoil_the_others():
    queries = normal(1, 30, 8, seed=1)
    queries[0, 7] = 1e30
    assert_exact(normal(1, 100, 8), 5, queries)


@pytest.mark.parametrize("k", [1, 8, 80])
def test_barred(k):
    points, queries = normal(2, 90, 6), normal(2, 40, 6, seed=1)
    group = torch.arange(90) % 11
    assert_exact(points, k, barred=(group, group))
    assert_exact(points, k, queries, (torch.arange(40) % 5, group))
    alone = torch.zeros(90, dtype=torch.int64)
    assert (ops.knn(points, k, barred=(alone, alone)).index == -1).all()


@pytest.mark.parametrize("sizes", [(40,), (40, 7), (40, 0), (7, 40, 1, 33), (0, 0)])
@pytest.mark.parametrize("k", [1, 8, 80])
def test_views(sizes, k):
    points, queries, i = normal(2, 90, 6), normal(2, 40, 6, seed=1), torch.arange(90)
    queries[0, 35, 2], points[1, 5, 1] = NAN, INF
    views = [(torch.arange(n) % (3 + v), i % (11 + v)) for v, n in enumerate(sizes)]
    assert_exact(points, k, queries, views)
    assert_exact(points, k, queries, views, within=reference.knn(points, 5, queries).dist2[..., 4].nan_to_num(0))


@pytest.mark.parametrize("N", [70, 700])  # one block of points, and several that meet
def test_a_query_may_bar_a_group_that_is_not_its_own(N):
    points, of_point = normal(2, N, 5), torch.arange(N) % 7
    of_query = torch.arange(N) % 3
    assert_exact(points, 6, barred=(of_query, of_point))
    found = ops.knn(points, 6, barred=(of_query, of_point)).index
    assert (of_point[found] != of_query[:, None]).all()


@pytest.mark.parametrize("k", [1, 8, 80])
def test_within(k):
    points, queries = normal(2, 90, 6), normal(2, 40, 6, seed=1)
    fifth = reference.knn(points, 5, queries).dist2[..., 4]
    just_less = torch.nextafter(fifth, torch.tensor(0.0))
    within = torch.where(torch.arange(40) % 2 == 0, fifth, just_less)
    within[0, 0], within[0, 1], within[1, 1] = INF, 0.0, 3e38
    assert_exact(points, k, queries, within=within)
    closed = ops.knn(points, k, queries, within=torch.tensor([-1.0, NAN])[:, None].expand(2, 40))
    assert (closed.index == -1).all()


@settings(max_examples=40, deadline=None)
@given(
    S=st.integers(0, 3), N=st.integers(0, 80), Q=st.integers(0, 60), D=st.integers(0, 40), k=st.integers(1, 90),
    n_values=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(S, N, Q, D, k, n_values, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(n_values, (S, N, D), generator=generator).float()
    queries = torch.randint(n_values, (S, Q, D), generator=generator).float()
    assert_exact(points, k, queries)
    if k < N:
        assert_exact(points, k)


def few_directions(S, N, D, rank=9, noise=0.02, seed=0):
    """Points that differ in few directions, as a model's states do: the screen turns them and leaves the rest out."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(S, rank, D, generator=generator)
    weights = torch.randn(S, N, rank, generator=generator)
    return weights @ directions + noise * torch.randn(S, N, D, generator=generator)


TURNED = {
    "as they are": lambda x: x,
    "offset": lambda x: x + 300,
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e18,
    "exactly so few": lambda x: x.round(),
    "duplicates": lambda x: x[:, torch.arange(x.shape[1]) % 190],
    "outliers": lambda x: torch.where(torch.arange(x.shape[1])[:, None] % 50 == 7, x * 1e4, x),
    "another direction later": lambda x: (
        x + (torch.arange(x.shape[1]) % 8 == 3)[:, None] * 50 * normal(1, 1, x.shape[2])
    ),
    "not finite": lambda x: x.masked_fill(torch.arange(x.shape[1])[:, None] % 40 == 3, NAN),
}


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_points_of_few_directions(name, k):
    points = TURNED[name](few_directions(2, 330, 130))
    assert_exact(points, k)
    assert_exact(points, k, points[:, :20] * 1.5)


@pytest.mark.parametrize("n_kinds", [1, 7, 56, 130])
@pytest.mark.parametrize("k", [1, 10, 400])
def test_points_of_few_kinds(n_kinds, k):
    """As the states of a first layer: equal points are measured once, and come by index."""
    generator = torch.Generator().manual_seed(1)
    kinds = normal(2, n_kinds, 24)
    kinds[:, n_kinds // 2] = -kinds[:, 0]  # as far from the origin
    kinds[1, n_kinds // 3, 2] = NAN
    points = kinds[:, torch.randint(n_kinds, (1040,), generator=generator)]
    queries = torch.cat([points[:, :70], torch.zeros(2, 2, 24), normal(2, 3, 24, seed=2)], dim=1)
    views = [
        (torch.randint(v, (n,), generator=generator), torch.randint(v, (1040,), generator=generator))
        for v, n in ((30, 75), (4, 9))
    ]
    within = reference.knn(points, min(k, 5), queries).dist2[..., -1].nan_to_num(0)
    assert_exact(points, k, queries)
    assert_exact(points, k, queries, views)
    assert_exact(points, k, queries, views, within=within)
    assert_exact(points[:, :300], k if k < 300 else 10, barred=(views[0][1][:300], views[1][1][:300]))


@pytest.mark.parametrize("N", [256, 257, 512, 700, 1100])
def test_blocks_meet_once(N):
    group = torch.arange(N) % 5
    for points in (normal(1, N, 6), normal(1, N, 6).sign(), few_directions(1, N, 100)):
        assert_exact(points, 10)
        assert_exact(points, 10, barred=(group, group))


@pytest.mark.parametrize("N", [1024, 1025, 1100, 1600])
def test_many_sets_answer_as_each_alone(N):
    """Many sets make larger blocks of points, which are the tasks of threads, than one set does."""
    group = torch.arange(N) % 5
    for points in (normal(13, N, 6), normal(13, N, 6).sign(), few_directions(13, N, 100)):
        for barred in (None, (group, group)):
            alone = [ops.knn(one[None], 10, barred=barred) for one in points]
            together = ops.knn(points, 10, barred=barred)
            assert_same_bits(together, [torch.cat(parts) for parts in zip(*alone, strict=True)])


def test_cells_as_far_apart_as_can_be():
    points = torch.ones(1, 300, 128)
    points[:, ::2] = -1
    assert_exact(points, 5)
    assert_exact(points, 200)


def test_no_coordinates():
    points = torch.zeros(2, 5, 0)
    assert_exact(points, 3)
    assert_exact(points, 3, points)


def test_views_are_read_as_they_are():
    wide = normal(40, 12, 2, 3).permute(3, 0, 2, 1)[:, :, 1]  # [3, 40, 12]
    assert not wide.is_contiguous()
    group = torch.arange(80)[::2]
    assert_exact(wide, 5, wide[:, ::3], (group[::3] // 9, group // 9))


@pytest.mark.parametrize("S", [3, 13])  # threads share queries out, and sets
def test_threads_do_not_matter(S):
    points, queries = normal(S, 333, 40), normal(S, 100, 40, seed=1)
    points[1] = points[1, torch.arange(333) % 8]
    group = torch.arange(333) % 9
    assert_threads_do_not_matter(lambda: ops.knn(points, 7))
    assert_threads_do_not_matter(
        lambda: [x for view in ops.knn(points, 7, queries, [(group[:100], group), (group[:9], group)]) for x in view]
    )


@pytest.mark.parametrize("Q", [144, 700])  # the latter are worth turning points for
def test_queries_among_points_of_few_directions(Q):
    for make in TURNED.values():
        x = make(few_directions(1, 1300, 130))
        assert_exact(x[:, Q:], 10, x[:, :Q])


def answers():
    """Of knn and kmeans on awkward data and odd shapes."""
    found = [x for make in AWKWARD.values() for x in ops.knn(make(normal(2, 150, 12)), 10)]
    for D in (1, 2, 3, 31, 64, 129):
        points = normal(2, 301, D) + 3
        found += [
            *ops.knn(points, 9),
            *ops.knn(points, 9, normal(2, 14, D)),
            *ops.kmeans(points, 6, init=points[:, :6]),
        ]
    for make in TURNED.values():
        found += ops.knn(make(few_directions(1, 330, 130)), 10)
    few = few_directions(13, 1500, 200)
    found += [*ops.knn(few[:, 150:], 10, few[:, :150]), *ops.knn(few[:2, 700:], 10, few[:2, :700])]
    found += ops.knn(normal(2, 600, 30)[:, torch.arange(600) % 20], 9, normal(2, 14, 30))
    found += ops.knn(normal(12, 1050, 30), 9)  # blocks of the larger kind
    return found


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni"])
def test_every_instruction_set_gives_the_same_bits(tmp_path, isa):
    script = "import sys, torch, test_knn as t; torch.save(t.answers(), sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "x"],
        env={**os.environ, "CLMFAST_ISA": isa}, cwd=os.path.dirname(__file__), capture_output=True, text=True,
    )  # fmt: skip
    if "this processor does not have it" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert_same_bits(torch.load(tmp_path / "x"), answers())


# ---- is it registered right?


def test_opcheck():
    points, queries = normal(2, 20, 5), normal(2, 6, 5, seed=1)
    group = torch.arange(20)
    op = torch.ops.clmfast.knn.default
    torch.library.opcheck(op, (points, 3, None, [], [], None))
    torch.library.opcheck(
        op, (points.bfloat16(), 3, queries.bfloat16(), [group[:6], group[:2]], [group, group], torch.ones(2, 6))
    )


def test_compiled():
    points, queries = normal(2, 20, 5), normal(2, 6, 5, seed=1).requires_grad_()
    compiled = torch.compile(lambda p, q: ops.knn(p, 3, q), fullgraph=True)
    found = compiled(points, queries)
    assert_same_bits(found, ops.knn(points, 3, queries))
    assert not found.dist2.requires_grad


def test_compiled_views():
    points, queries, group = normal(2, 20, 5), normal(2, 6, 5, seed=1), torch.arange(20) % 4
    compiled = torch.compile(lambda p, q, g: ops.knn(p, 3, q, [(g[:6], g), (g[:2], g // 2)]), fullgraph=True)
    found = compiled(points, queries, group)
    expected = ops.knn(points, 3, queries, [(group[:6], group), (group[:2], group // 2)])
    for view, of_view in zip(found, expected, strict=True):
        assert_same_bits(view, of_view)


def test_compiled_refusals_arrive_as_they_are():
    compiled = torch.compile(lambda p: ops.knn(p, p.shape[1]), fullgraph=True)
    with pytest.raises(ValueError, match=r"^knn: k must be in \[1, N\), got k=4 with N=4$"):
        compiled(normal(1, 4, 2))


# ---- does it refuse what it should?

POINTS = torch.zeros(2, 64, 3)
GROUP = torch.zeros(64, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((POINTS, 64), r"knn: k must be in [1, N), got k=64 with N=64"),
        ((POINTS, 0), r"knn: k must be in [1, N), got k=0 with N=64"),
        ((POINTS, 0, POINTS), r"knn: k must be at least 1, got k=0"),
        ((POINTS[0], 1), r"knn: points must be [S, N, D], got [64, 3]"),
        ((POINTS.double(), 1), r"knn: points must be float32, bfloat16 or float16"),
        ((torch.empty(1, 2, 2**20), 1), r"knn: D must be below 2^20, got D=1048576"),
        ((torch.empty(1, 2**31, 0), 1), r"knn: N must be below 2^31, got N=2147483648"),
        ((POINTS, 1, POINTS[0]), r"knn: queries must be [S, N, D], got [64, 3]"),
        ((POINTS, 1, POINTS[..., :2]), r"knn: queries must be [S, Q, D] with the S and D of points [2, 64, 3], got"),
        ((POINTS, 1, POINTS.half()), r"knn: queries must have the dtype of points"),
        (
            (POINTS, 1, None, (GROUP, GROUP[:3])),
            r"knn: barred must be [Q] and [N] with Q=64 and N=64, got [64] and [3]",
        ),
        (
            (POINTS, 1, POINTS[:, :5], (GROUP, GROUP)),
            r"knn: barred must be [Q] and [N] with Q=5 and N=64, got [64] and",
        ),
        ((POINTS, 1, None, (GROUP, None)), r"knn: barred must give the groups of both queries and points"),
        ((POINTS, 1, POINTS, (GROUP,)), r"knn: barred must be (query_group, point_group), or a list of such pairs"),
        ((POINTS, 1, POINTS, []), r"knn: barred must be (query_group, point_group), or a list of such pairs"),
        ((POINTS, 1, POINTS, [(GROUP, GROUP)] * 5), r"knn: barred must be at most 4 pairs of groups, got 5"),
        (
            (POINTS, 1, None, [(GROUP, GROUP)] * 2),
            r"knn: barred must be at most 1 pair of groups where points ask, got",
        ),
        (
            (POINTS, 1, POINTS[:, :5], [(GROUP[:5], GROUP), (GROUP[:6], GROUP)]),
            r"knn: barred must be [Q] and [N] with Q=5 and N=64, got [6] and [64]",
        ),
        ((POINTS, 1, None, (GROUP, GROUP.float())), r"knn: point_group must be integers, got float32"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as it is, not as a pattern
        ops.knn(*arguments)
    assert str(error.value).startswith(message)


def test_refusals_of_within():
    with pytest.raises(ValueError, match="knn: within must be float32"):
        ops.knn(POINTS, 1, within=torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"knn: within must be \[S, Q\] with S=2 and Q=64, got \[64\]"):
        ops.knn(POINTS, 1, within=torch.zeros(64))
