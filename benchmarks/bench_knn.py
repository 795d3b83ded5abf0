"""knn: exact nearest neighbours of every set, against every library that finds them exactly.

Points look like the residual stream's: clusters of unequal spread around a large common mean. A contender returns the
rows of each query's k nearest points, nearest first, and their distances in whatever form it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.contest import N_INPUTS, TORCH, Contender, Process
from benchmarks.worker import Call

Sets = list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]

N_CLUSTERS = 20
N_CHECKED = 64  # queries of every set that the gate computes anew
TOLERANCE = 1e-3  # of a distance: what |x|^2 - 2 x.y + |y|^2 loses in float32 at this common mean
QUERIES_PER_CHUNK = 2048  # a torch rival's distance matrix should not leave the cache for good


def shape(S: int = 7, N: int = 2048, D: int = 256, k: int = 10, Q: int = 0) -> dict[str, Any]:
    """A case; Q = 0: every point asks among the others."""
    return {"S": S, "N": N, "D": D, "k": k, "Q": Q}


def states(rng: np.random.Generator, S: int, N: int, D: int) -> NDArray[np.float32]:
    """[S, N, D] points in overlapping clusters around a common mean."""
    centre = rng.normal(size=(S, N_CLUSTERS, D))
    spread = rng.uniform(0.5, 1.5, size=(S, N_CLUSTERS, 1))
    cluster = rng.integers(N_CLUSTERS, size=N)
    points = 3.0 + 0.4 * centre[:, cluster] + spread[:, cluster] * rng.normal(size=(S, N, D))
    return points.astype(np.float32)


def inputs(case: dict[str, Any]) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """The rotated inputs: points [S, N, D] and queries [S, Q, D] or None."""
    found = []
    for i in range(N_INPUTS):
        rng = np.random.default_rng(i)
        points = states(rng, case["S"], case["N"] + case["Q"], case["D"])
        queries = np.ascontiguousarray(points[:, case["N"] :]) if case["Q"] else None
        found.append((np.ascontiguousarray(points[:, : case["N"]]), queries))
    return found


def clmfast(case: dict[str, Any]) -> Call:
    import torch

    from clmfast import ops

    tensors = [[None if x is None else torch.from_numpy(x) for x in pair] for pair in inputs(case)]

    def call(i: int) -> Any:
        points, queries = tensors[i % N_INPUTS]
        found = ops.knn(points, case["k"], queries)
        return found.index, found.dist2

    return call


def set_by_set(case: dict[str, Any], sets: Sequence[Any], nearest: Callable[[Any, Any, int], tuple[Any, Any]]) -> Call:
    """A Call for libraries that know one set: nearest(points, queries, k) -> (index, distance). In the self form it is
    asked for one neighbour more, and the first, which is the point itself, is left out."""
    k = case["k"]

    def call(i: int) -> Any:
        points, queries = sets[i % N_INPUTS]
        if queries is None:
            found = [nearest(x, x, k + 1) for x in points]
            return [index[:, 1:] for index, _ in found], [distance[:, 1:] for _, distance in found]
        return tuple(zip(*(nearest(x, q, k) for x, q in zip(points, queries, strict=True)), strict=True))

    return call


def faiss(case: dict[str, Any]) -> Call:
    import faiss as library

    def nearest(points: Any, queries: Any, k: int) -> tuple[Any, Any]:
        distance, index = library.knn(queries, points, k)
        return index, distance

    return set_by_set(case, inputs(case), nearest)


def scikit_learn(case: dict[str, Any]) -> Call:
    from sklearn.neighbors import NearestNeighbors

    return _estimator(case, NearestNeighbors)


def scikit_learn_intelex(case: dict[str, Any]) -> Call:
    from sklearnex.neighbors import NearestNeighbors

    return _estimator(case, NearestNeighbors)


def _estimator(case: dict[str, Any], neighbours: Any) -> Call:
    def nearest(points: Any, queries: Any, k: int) -> tuple[Any, Any]:
        distance, index = neighbours(n_neighbors=k, algorithm="brute").fit(points).kneighbors(queries)
        return index, distance

    return set_by_set(case, inputs(case), nearest)


def torch_matmul(case: dict[str, Any]) -> Call:
    """One matrix product and topk for each chunk of queries; case["linear"] says how."""
    import torch
    from torch.nn import functional as F

    linear = F.linear
    if case["linear"] == "onednn":

        def linear(x: Any, weight: Any, bias: Any) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    def chunk_nearest(points: Any, queries: Any, k: int) -> tuple[Any, Any]:
        # q.p - |p|^2 / 2 falls as the distance grows, and |q|^2 is the same for all points.
        score = linear(queries, points, -0.5 * points.square().sum(1))
        value, index = score.topk(k)
        return index, queries.square().sum(1, keepdim=True) - 2 * value

    if case["linear"] == "compiled":
        chunk_nearest = torch.compile(chunk_nearest, dynamic=False)

    def nearest(points: Any, queries: Any, k: int) -> tuple[Any, Any]:
        found = [chunk_nearest(points, chunk, k) for chunk in queries.split(QUERIES_PER_CHUNK)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    sets = [[None if x is None else torch.from_numpy(x) for x in pair] for pair in inputs(case)]
    return set_by_set(case, sets, nearest)


def pykeops(case: dict[str, Any]) -> Call:
    import torch
    from pykeops.torch import LazyTensor

    def nearest(points: Any, queries: Any, k: int) -> tuple[Any, Any]:
        dist2 = ((LazyTensor(queries[:, None]) - LazyTensor(points[None])) ** 2).sum(-1)
        distance, index = dist2.Kmin_argKmin(k, dim=1)
        return index, distance

    sets = [[None if x is None else torch.from_numpy(x) for x in pair] for pair in inputs(case)]
    return set_by_set(case, sets, nearest)


OURS = Contender("clmfast", clmfast)
FAISS = Contender("faiss", faiss, Process("faiss"), ("faiss",))
RIVALS = (
    FAISS,
    Contender("scikit-learn", scikit_learn, Process("scikit-learn"), ("sklearn",)),
    Contender("scikit-learn-intelex", scikit_learn_intelex, Process("scikit-learn-intelex"), ("sklearnex",)),
    Contender("torch eager", torch_matmul, TORCH, options={"linear": "eager"}),
    Contender("torch.compile", torch_matmul, TORCH, options={"linear": "compiled"}),
    Contender("torch oneDNN", torch_matmul, TORCH, options={"linear": "onednn"}),
)
PYKEOPS = Contender("pykeops", pykeops, Process("pykeops"), ("pykeops",))


def gate(case: dict[str, Any]) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, str]]:
    """Neighbours are right if their true distances are the k smallest, to TOLERANCE: a tie may go either way."""

    def check(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        n_queries = case["Q"] or case["N"]
        rows = np.linspace(0, n_queries - 1, min(N_CHECKED, n_queries)).astype(int)
        wrong: dict[str, str] = {}
        for i, (points, queries) in enumerate(inputs(case)):
            for s in range(case["S"]):
                asked = (points if queries is None else queries)[s, rows].astype(np.float64)
                dist2 = _dist2(points[s].astype(np.float64), asked)
                if queries is None:
                    dist2[np.arange(len(rows)), rows] = np.inf
                least = np.sort(np.partition(dist2, case["k"] - 1)[:, : case["k"]])
                for name, result in results.items():
                    index = np.asarray(result[i][0][s])[rows]
                    excess = np.take_along_axis(dist2, index, 1) / least - 1
                    has_twice = (np.diff(np.sort(index)) == 0).any()
                    if has_twice or not np.abs(excess).max() <= TOLERANCE:
                        wrong[name] = "neighbours repeat" if has_twice else f"a distance is off by {excess.max():.2g}"
        return wrong

    return check


def _dist2(points: NDArray[np.float64], queries: NDArray[np.float64]) -> NDArray[np.float64]:
    """[Q, N]; the common mean is taken out first, so float64 loses nothing that matters."""
    mean = points.mean(0)
    points, queries = points - mean, queries - mean
    return (queries**2).sum(1)[:, None] + (points**2).sum(1) - 2 * queries @ points.T


def flops(case: dict[str, Any]) -> float:
    """Multiply-adds of the distances as a matrix product; the self form needs each pair once."""
    n_pairs = case["N"] * case["Q"] if case["Q"] else case["N"] * (case["N"] - 1) / 2
    return 2.0 * case["S"] * n_pairs * case["D"]


@pytest.mark.parametrize(
    ("what", "case", "must", "aim"),
    [
        ("exact kNN at S, self", shape(), 2.0, 4.0),
        ("exact kNN, 512 queries against 4096 points, D = 128", shape(N=4096, D=128, Q=512), 1.5, 3.0),
        ("exact kNN, 144 queries against 1024 points, D = 128", shape(S=14, N=1024, D=128, Q=144), 1.5, 3.0),
        ("exact kNN, N = 8192, D = 768", shape(S=1, N=8192, D=768), 1.5, 2.5),
    ],
    ids=["self", "queries", "window", "wide"],
)
def test_knn(compete: Any, claim: Any, what: str, case: dict[str, Any], must: float, aim: float) -> None:
    rivals = (*RIVALS, PYKEOPS) if case["Q"] else RIVALS  # many times slower: the larger cases would wait for it alone
    outcome = compete(what, case, [OURS, *rivals], gate(case), flops=flops(case))
    claim(what, outcome.ratio(), must, aim, detail=outcome.best_text())


def test_layers(compete: Any, claim: Any, arena: Any) -> None:
    """Twice the layers must take twice the time: 14 sets against 7 in one contest."""
    case = shape(S=14, N=1024, D=128)
    half = Contender("clmfast, half the sets", clmfast, options={"S": 7})
    outcome = compete("14 sets of N = 1024, D = 128, and half of them", case, [OURS, half], lambda results: {})
    twice = outcome.times[OURS.name].median_s / (2 * outcome.times[half.name].median_s)
    detail = "time of 14 layers over twice the time of 7"
    claim("growth in layers", twice, 1.2, 1.05, at_most=True, detail=detail)


def peak_memory(case: dict[str, Any]) -> Call:
    """call(0) only makes the input, call(1) searches; both return the most memory that the process has held, in MiB."""
    import resource

    import torch

    from clmfast import ops

    points = torch.from_numpy(states(np.random.default_rng(0), case["S"], case["N"], case["D"]))
    ops.knn(points[:, :1024], case["k"])  # what the first call sets up is there before the peak is read

    def call(i: int) -> Any:
        if i:
            ops.knn(points, case["k"])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return call


def test_memory(compete: Any, claim: Any) -> None:
    """Beyond the points the search may hold a copy of them and the result, never a table of distances."""
    case = shape(S=1, N=16384, D=64)
    fresh = Contender("clmfast", peak_memory, Process("clmfast, memory"))
    outcome = compete(
        "memory of N = 16384, D = 64", case, [fresh], lambda results: {}, n_checks=2, rounds={"clmfast": 3}
    )
    before, after = outcome.checked["clmfast"]
    needed_mib = case["N"] * (4 * case["D"] + 12 * case["k"]) / 2**20
    detail = f"{after - before:.0f} MiB; a table of distances would be {4 * case['N'] ** 2 / 2**20:.0f} MiB"
    claim(
        "kNN memory over that of points and result",
        (after - before) / needed_mib,
        10.0,
        4.0,
        at_most=True,
        detail=detail,
    )


CURVES = {
    "N": [shape(S=1, N=n, D=128) for n in (1024, 2048, 4096, 8192, 16384, 32768)],
    "D": [shape(S=1, D=d) for d in (32, 64, 128, 256, 512, 1024)],
    "layers": [shape(S=s, N=1024, D=128) for s in (1, 2, 4, 8, 16, 32)],
}
AXES = {"N": "N", "D": "D", "layers": "S"}


@pytest.mark.full
@pytest.mark.parametrize(("axis", "case"), [(axis, case) for axis, cases in CURVES.items() for case in cases])
def test_curve(compete: Any, axis: str, case: dict[str, Any]) -> None:
    value = case[AXES[axis]]
    compete(
        f"self, {axis} = {value}", case, [OURS, FAISS], gate(case), flops=flops(case), curve=(axis, value), n_checks=3
    )


@pytest.mark.full
def test_growth(claim: Any, results: Any) -> None:
    """After the curve in N: time over N^2 D must stay within a fifth of its median."""
    curve = [o for o in results.outcomes if o.suite == "knn" and o.curve and o.curve[0] == "N"]
    if not curve:
        pytest.skip("the curve in N was not measured")
    cost = np.array([o.times[o.ours].median_s / o.case["N"] ** 2 for o in curve])
    detail = ", ".join(f"N {o.case['N']}: {c / np.median(cost):.2f}" for o, c in zip(curve, cost, strict=True))
    claim(
        "growth in N: time over N^2 D, furthest from its median",
        np.abs(cost / np.median(cost) - 1).max(),
        0.2,
        unit="%",
        at_most=True,
        detail=detail,
    )


@pytest.mark.full
def test_threads(compete: Any, arena: Any) -> None:
    """The same search with 1, 2, 4, ... threads, each in a process of its own."""
    counts = [2**i for i in range(arena.threads.bit_length()) if 2**i <= arena.threads]
    contenders = [Contender(f"clmfast, {n} threads", clmfast, Process("clmfast", threads=n)) for n in reversed(counts)]
    case = shape()
    compete("at S, self, by threads", case, contenders, gate(case), flops=flops(case))


@pytest.mark.full
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_instruction_sets(compete: Any, isa: str) -> None:
    """What a machine with less than this one would get from our code."""
    case = shape()
    less = Contender("clmfast", clmfast, Process(f"clmfast {isa}", (("CLMFAST_ISA", isa),)))
    compete(f"at S, self, restricted to {isa}", case, [less, FAISS], gate(case), flops=flops(case))
