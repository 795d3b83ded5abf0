"""The CUDA kernels of knn on the emulator, and on a GPU where there is one: the bits of the CPU op."""

from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import torch
from op_checks import AWKWARD, assert_same_bits
from torch import Tensor

from clmfast import ops

INF, NAN = float("inf"), float("nan")
SOURCE = """
#include "knn.cu"
using namespace clmfast;
// size: S, N, Q, D, k, is_self, n_views, and Q of each view; groups: pointers, of queries and points, view by view.
static Knn op_of(const float* points, const float* queries, const int64_t* groups, const float* within,
                 const int64_t* size, float* dist2, int64_t* index) {
  Knn op = {};
  op.points = points, op.queries = queries, op.is_self = size[5] != 0, op.within = within;
  op.S = size[0], op.N = size[1], op.Q = size[2], op.D = size[3], op.k = size[4];
  op.dist2 = dist2, op.index = index;
  op.n_views = static_cast<int>(size[6]);
  for (int v = 0; v < op.n_views; ++v) {
    op.view[v].Q = size[7 + v], op.A += size[7 + v];
    if (!groups) continue;
    op.view[v].query_group = reinterpret_cast<const int64_t*>(groups[2 * v]);
    op.view[v].point_group = reinterpret_cast<const int64_t*>(groups[2 * v + 1]);
  }
  return op;
}
extern "C" void scratch(const int64_t* size, int64_t* n) {
  *n = knn_cuda_scratch(op_of(nullptr, nullptr, nullptr, nullptr, size, nullptr, nullptr));
}
extern "C" void knn(const float* points, const float* queries, const int64_t* groups, const float* within,
                    const int64_t* size, int64_t element, float* dist2, int64_t* index, void* scratch) {
  knn_cuda(op_of(points, queries, groups, within, size, dist2, index), static_cast<Element>(element), scratch, nullptr);
}
// How many queries the exact kernel had to answer, and how often a warp of the screen thinned out what it had kept, on
// average.
extern "C" void counted(const int64_t* size, void* scratch, int64_t* n_listed, double* n_thinned) {
  const Knn op = op_of(nullptr, nullptr, nullptr, nullptr, size, nullptr, nullptr);
  Scratch memory{static_cast<unsigned char*>(scratch)};
  const Plan plan = plan_of(op);
  const Prepared prepared = prepared_in(memory, op, plan);
  *n_listed = *prepared.n_listed;
  const int64_t n_warps = op.S * ((op.A + 15) / 16) * plan.n_splits;
  *n_thinned = static_cast<double>(*prepared.n_thinned) / static_cast<double>(n_warps);
}
"""
ELEMENTS = [torch.float32, torch.bfloat16, torch.float16]


class Emulated:
    """ops.knn, by the kernels on the emulator; and what became of the call."""

    def __init__(self, library: emulator.Library, capability: int) -> None:
        self.library, self.capability, self.seed, self.n_listed, self.n_thinned = library, capability, 0, -1, -1.0

    def __call__(
        self, points: Tensor, k: int, queries: Tensor | None = None, barred: Any = None, *, within: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.seed += 1
        self.library.reset(self.seed, capability=self.capability)
        S, N, D = points.shape
        Q = N if queries is None else queries.shape[1]
        points = points.contiguous()
        queries = None if queries is None else queries.contiguous()
        views = [] if barred is None else barred if isinstance(barred, list) else [barred]
        groups = [x.contiguous() for pair in views for x in pair]
        sizes = [len(x) for x in groups[::2]] or [Q]
        size = torch.tensor([S, N, Q, D, k, queries is None, len(sizes), *sizes])
        pointers = torch.tensor([x.data_ptr() for x in groups]) if groups else None
        within = None if within is None else within.contiguous()
        dist2, index = torch.full((S, sum(sizes), k), NAN), torch.full((S, sum(sizes), k), -7)
        n = torch.zeros(1, dtype=torch.int64)
        self.library.scratch(size, n)
        scratch = torch.full((int(n) + 256,), 0xCD, dtype=torch.uint8)
        scratch = scratch[-scratch.data_ptr() % 256 :]
        self.library.knn(points, queries, pointers, within, size, ELEMENTS.index(points.dtype), dist2, index, scratch)
        if S * sum(sizes) and int(n):
            n_thinned = torch.zeros(1, dtype=torch.float64)
            self.library.counted(size, scratch, n, n_thinned)
            self.n_listed, self.n_thinned = int(n), float(n_thinned)
        return dist2, index


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.build(SOURCE)


@pytest.fixture(params=["mma", "wgmma", pytest.param("gpu", marks=pytest.mark.gpu)])
def knn(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")

        def on_gpu(points: Tensor, k: int, queries: Any = None, barred: Any = None, *, within: Any = None) -> Any:
            def move(x: Any) -> Any:
                return None if x is None else x.cuda()

            is_list = isinstance(barred, list)
            views = [] if barred is None else [tuple(map(move, pair)) for pair in (barred if is_list else [barred])]
            given = views if is_list else views[0] if views else None
            found = ops.knn(move(points), k, move(queries), given, within=move(within))
            return [
                x.cpu() for x in ((torch.cat(parts, 1) for parts in zip(*found, strict=True)) if is_list else found)
            ]

        yield on_gpu
    else:
        if not emulator.is_available():
            pytest.skip("the emulator needs an x86-64 processor")
        yield Emulated(request.getfixturevalue("library"), 80 if request.param == "mma" else 90)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(knn: Any, *arguments: Any, **options: Any) -> None:
    found, expected = knn(*arguments, **options), ops.knn(*arguments, **options)
    if isinstance(expected, list):
        expected = ops.KNN(*(torch.cat(parts, 1) for parts in zip(*expected, strict=True)))
    assert torch.equal(found[1], expected.index)
    assert_same_bits([found[0]], [expected.dist2])


def assert_screened(knn: Any, n_listed: int = 0) -> None:
    """The exact kernel answered no more queries than that: the screen did its work."""
    if isinstance(knn, Emulated):
        assert 0 <= knn.n_listed <= n_listed


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(("S", "N", "D", "k"), [(1, 2, 1, 1), (2, 63, 7, 5), (1, 300, 130, 10), (3, 129, 64, 16)])
def test_self_form(knn: Any, S: int, N: int, D: int, k: int, dtype: torch.dtype) -> None:
    assert_exact(knn, normal(S, N, D).to(dtype), k)
    assert_screened(knn)


@pytest.mark.parametrize(
    ("Q", "N", "k"), [(1, 1, 1), (3, 200, 24), (150, 63, 10), (50, 20, 33), (4, 700, 1), (2, 0, 3)]
)
def test_queries(knn: Any, Q: int, N: int, k: int) -> None:
    assert_exact(knn, normal(2, N, 19), k, normal(2, Q, 19, seed=1))
    assert_screened(knn)


@pytest.mark.parametrize("k", [20, 21, 48, 49, 64, 104])
def test_lists_of_every_length(knn: Any, k: int) -> None:
    assert_exact(knn, normal(1, 400, 70), k)
    assert_screened(knn)


@pytest.mark.parametrize("k", [105, 256, 257, 600])
def test_larger_k(knn: Any, k: int) -> None:
    assert_exact(knn, normal(1, 700, 5), k, normal(1, 3, 5, seed=1))


DATA = AWKWARD | {
    "an outlier": lambda x: torch.where(torch.arange(x.shape[1])[:, None] == 71, x * 1e30, x),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("k", [1, 10])
def test_awkward_data(knn: Any, name: str, k: int) -> None:
    points = DATA[name](normal(1, 150, 12))
    assert_exact(knn, points, k)
    assert_exact(knn, points, k, points[:, :8] * 1.5)


@pytest.mark.parametrize(("name", "n_listed"), [("offset", 0), ("tiny", 0), ("huge", 0), ("an outlier", 1)])
def test_size_and_offset_do_not_defeat_the_screen(knn: Any, name: str, n_listed: int) -> None:
    assert_exact(knn, DATA[name](normal(1, 400, 12)), 10)
    assert_screened(knn, n_listed)


@pytest.mark.parametrize("k", [1, 6, 60])
def test_rows_that_are_not_finite(knn: Any, k: int) -> None:
    points, queries = normal(2, 70, 5), normal(2, 9, 5, seed=1)
    points[0, 3, 1], points[0, 40, 4], points[1, 0, 0] = NAN, INF, -INF
    queries[1, 4, 2] = NAN
    assert_exact(knn, points, k)
    assert_exact(knn, points, k, queries)
    assert_exact(knn, torch.full_like(points, NAN), k)


@pytest.mark.parametrize("k", [1, 8, 80])
def test_barred(knn: Any, k: int) -> None:
    points, queries = normal(2, 90, 6), normal(2, 40, 6, seed=1)
    group = torch.arange(90) % 11
    assert_exact(knn, points, k, barred=(group, group))
    assert_exact(knn, points, k, queries, (torch.arange(40) % 5, group))
    alone = torch.zeros(90, dtype=torch.int64)
    assert_exact(knn, points, k, barred=(alone, alone))


@pytest.mark.parametrize(
    ("sizes", "k"), [((150, 16), 10), ((40,), 1), ((40, 0, 30), 10), ((3, 40, 1, 33), 10), ((9, 4), 110)]
)
def test_views(knn: Any, sizes: tuple[int, ...], k: int) -> None:
    points, queries, i = normal(2, 300, 6), normal(2, max(sizes), 6, seed=1), torch.arange(300)
    queries[0, -1, 2], points[1, 5, 1] = NAN, INF
    views = [(torch.arange(n) % (3 + v), i % (11 + v)) for v, n in enumerate(sizes)]
    views[0][0][0] = 2**40  # the exact kernel's
    assert_exact(knn, points, k, queries, views)
    if k < 100:
        assert_screened(knn, 2)
    within = ops.knn(points, 5, queries).dist2[..., 4]
    assert_exact(knn, points, k, queries, views, within=within)
    points[:] = points[:, i % 7]
    assert_exact(knn, points, k, queries, views)


@pytest.mark.parametrize("k", [1, 8, 80])
@pytest.mark.parametrize("scale", [1, 1e-22, 1e-41, 1e18])
def test_within(knn: Any, k: int, scale: float) -> None:
    points, queries = normal(2, 90, 6) * scale, normal(2, 40, 6, seed=1) * scale
    fifth = ops.knn(points, 5, queries).dist2[..., 4]
    just_less = torch.nextafter(fifth, torch.tensor(0.0))
    within = torch.where(torch.arange(40) % 2 == 0, fifth, just_less)
    within[0, 0], within[0, 1], within[1, 1] = INF, 0.0, 3e38
    assert_exact(knn, points, k, queries, within=within)
    closed = torch.tensor([-1.0, NAN])[:, None].repeat(1, 40)
    assert_exact(knn, points, k, queries, within=closed)
    if scale == 1:
        assert_screened(knn)


def test_thresholds_of_the_step_before(knn: Any) -> None:
    points = normal(2, 200, 40)
    within = ops.knn(points, 7).dist2[..., 6]
    assert_exact(knn, points, 7, within=within)
    assert_screened(knn)


@pytest.mark.parametrize("N", [1100, 1792])
def test_parts_of_the_points(knn: Any, N: int) -> None:
    assert_exact(knn, normal(1, N, 9), 10, normal(1, 5, 9, seed=1))
    assert_screened(knn)


def test_queries_too_deep_to_stay(knn: Any) -> None:
    assert_exact(knn, normal(1, 140, 1300), 3, normal(1, 70, 1300, seed=1))
    assert_screened(knn)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_rows_are_thinned_out_a_few_times(knn: Any, is_sorted: bool) -> None:
    """Of 2048 points a query keeps some tens, and its warp sorts out what it keeps a few times; if the nearest come
    last, again and again, as everything is kept at first."""
    points, queries = normal(1, 2048, 32), normal(1, 16, 32, seed=1)
    if is_sorted:
        points = points[:, points[0].norm(dim=1).argsort(descending=True)]
    assert_exact(knn, points, 10, queries)
    assert_screened(knn)
    if isinstance(knn, Emulated):
        assert 0 < knn.n_thinned <= (12 if is_sorted else 6)


def few_rows(n: int, n_different: int, D: int = 24) -> Tensor:
    """[1, n, D] of which n_different rows are different, in random order."""
    row = torch.randint(n_different, (n,), generator=torch.Generator().manual_seed(2))
    return normal(1, n_different, D)[:, row]


@pytest.mark.parametrize("n_different", [1, 7, 40])
def test_equal_rows_do_not_defeat_the_screen(knn: Any, n_different: int) -> None:
    points = few_rows(700, n_different)
    assert_exact(knn, points, 10)
    assert_screened(knn)
    assert_exact(knn, points, 10, few_rows(60, 9)[:, :40] + points[:, :1])
    assert_screened(knn)


def test_states_of_a_first_layer_do_not_defeat_the_screen(knn: Any) -> None:
    """Seven different ones in each of 16 steps, which move by less than float16 can tell: every query would fall to the
    exact kernel."""
    position, step = torch.arange(1008) % 7, torch.arange(1008) // 63
    points = (normal(7, 40)[position] + 1e-3 * step[:, None] * normal(7, 40, seed=1)[position])[None]
    group = torch.randint(300, (1008,), generator=torch.Generator().manual_seed(4))
    assert_exact(knn, points, 10, points[:, :20] + 1e-4, (group[:20], group))
    assert_screened(knn)


def test_equal_rows_of_a_set_that_is_looked_through_in_parts(knn: Any) -> None:
    points = few_rows(2100, 5)
    points[0, 2060, 3] = NAN
    assert_exact(knn, points, 10, points[:, ::300] + 0.1)
    assert_screened(knn)


@pytest.mark.parametrize("n_groups", [1, 2, 90])
def test_equal_rows_in_groups(knn: Any, n_groups: int) -> None:
    """A query bars its group, the nearest equal rows among them."""
    points, group = few_rows(500, 5), torch.randint(n_groups, (500,), generator=torch.Generator().manual_seed(3))
    assert_exact(knn, points, 6, barred=(group, group))
    assert_screened(knn)
    of_query = torch.arange(16) % n_groups
    assert_exact(knn, points, 6, points[:, :16], (of_query, group))
    assert_exact(knn, points, 6, barred=(group.flip(0), group))  # a query bars a group that is not its own


def test_rows_that_are_nearly_equal(knn: Any) -> None:
    """Their last bits differ: none may be left out."""
    points = few_rows(300, 3)
    points = torch.where(torch.arange(300)[:, None] % 2 == 0, points, points.nextafter(torch.tensor(9.0)))
    assert_exact(knn, points, 10)


def test_groups_of_any_number(knn: Any) -> None:
    """The screen compares 32 bits."""
    points, i = normal(1, 60, 8), torch.arange(60)
    for group in (i % 3 * 2**32 + 5 + i % 2, torch.where(i % 2 == 0, -(2**31), i % 5), i % 4 - 2**63, i % 3 - 1):
        assert_exact(knn, points, 10, barred=(group, group))


def test_many_equal_rows_among_others(knn: Any) -> None:
    """Half of the points are of a few kinds: too many different ones to measure each, and some queries find more equal
    points than they can keep."""
    points = torch.cat([few_rows(300, 2), normal(1, 330, 24, seed=5)], dim=1)
    assert_exact(knn, points, 10, points[:, 280:320])


def test_no_coordinates_and_no_queries(knn: Any) -> None:
    points = torch.zeros(2, 5, 0)
    assert_exact(knn, points, 3)
    assert_exact(knn, torch.zeros(2, 5, 3), 3, torch.zeros(2, 0, 3))
    assert_exact(knn, torch.zeros(0, 5, 3), 3)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_rows_that_lie_anywhere(knn: Any, dtype: torch.dtype) -> None:
    """Behind an odd number of elements no row can be read four coordinates at a time."""
    memory = normal(1 + 80 * 8).to(dtype)
    assert_exact(knn, memory[1:].view(1, 80, 8), 4)


def test_pairs_that_float16_does_not_tell_apart(knn: Any) -> None:
    """Sixty tight clusters far from each other: within one, float16 sees nothing but rounding."""
    centre, member = normal(60, 1, 20) * 50, normal(60, 20, 20, seed=1) * 1e-4
    assert_exact(knn, (centre + member).view(1, 1200, 20)[:, ::7], 2)
    if isinstance(knn, Emulated):
        assert knn.n_listed < 200


@pytest.mark.parametrize("offset", [0, 3, 30])
def test_order_that_float16_does_not_see(knn: Any, offset: float) -> None:
    """On a shell round a query, distances differ by less than its rounding: what the lists leave out may be nearer."""
    direction = torch.nn.functional.normalize(normal(1, 500, 8), dim=2)
    shell = direction * (1 + 1e-5 * normal(1, 500, 1, seed=1)) + offset
    points = torch.cat([shell, -shell], dim=1)[:, ::2]
    assert_exact(knn, points, 3, torch.full((1, 2, 8), float(offset)))
