"""kmeans: k-means++ with 8 iterations, and one Lloyd iteration from given centroids, on the points of bench_knn.

A contender returns labels and centroids of every set, and labels fit the centroids: libraries that do not see to that
label once more within their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.bench_knn import states
from benchmarks.contest import N_INPUTS, TORCH, Contender, Process
from benchmarks.worker import Call

INERTIA_TOLERANCE = 1.1  # starts are random: an inertia may exceed the least of all contenders by this factor
LABEL_TOLERANCE = 1e-3  # share of labels that rounding may decide
CENTROID_TOLERANCE = 1e-3

Fit = Callable[[Any, Any], tuple[Any, Any]]
"""fit(points [N, D], init [K, D] or None) -> (label [N], centroid [K, D])"""


def shape(S: int = 7, N: int = 2048, D: int = 256, K: int = 20, n_iter: int = 8, starts: bool = True) -> dict[str, Any]:
    """A case; `starts`: from k-means++, else from given centroids."""
    return {"S": S, "N": N, "D": D, "K": K, "n_iter": n_iter, "starts": starts}


def inputs(case: dict[str, Any]) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """The rotated inputs: points [S, N, D], and centroids [S, K, D] where the case gives them."""
    found = []
    for i in range(N_INPUTS):
        # The layout that every contender works in: else some would copy within their time.
        points = np.ascontiguousarray(states(np.random.default_rng(i), case["S"], case["N"], case["D"]))
        found.append((points, None if case["starts"] else np.ascontiguousarray(points[:, : case["K"]])))
    return found


def clmfast(case: dict[str, Any]) -> Call:
    import torch

    from clmfast import ops

    tensors = [(torch.from_numpy(x), "k-means++" if c is None else torch.from_numpy(c)) for x, c in inputs(case)]

    def call(i: int) -> Any:
        points, init = tensors[i % N_INPUTS]
        found = ops.kmeans(points, case["K"], init=init, max_iter=case["n_iter"], tol=0.0, seed=i)
        return found.label, found.centroid, found.n_iter

    return call


def set_by_set(sets: Sequence[tuple[Any, Any]], fit: Fit) -> Call:
    """A Call for libraries that know one set."""

    def call(i: int) -> Any:
        points, init = sets[i % N_INPUTS]
        starts: Iterable[Any] = [None] * len(points) if init is None else init
        return tuple(zip(*(fit(x, c) for x, c in zip(points, starts, strict=True)), strict=True))

    return call


def scikit_learn(case: dict[str, Any]) -> Call:
    from sklearn.cluster import KMeans

    return _estimator(case, KMeans)


def scikit_learn_intelex(case: dict[str, Any]) -> Call:
    from sklearnex.cluster import KMeans

    return _estimator(case, KMeans)


def _estimator(case: dict[str, Any], kmeans: Any) -> Call:
    def fit(points: Any, init: Any) -> tuple[Any, Any]:
        found = kmeans(
            case["K"], init="k-means++" if init is None else init, n_init=1, max_iter=case["n_iter"], tol=0.0
        ).fit(points)
        return found.labels_, found.cluster_centers_

    return set_by_set(inputs(case), fit)


def faiss(case: dict[str, Any]) -> Call:
    import faiss as library

    def fit(points: Any, init: Any) -> tuple[Any, Any]:
        found = library.Kmeans(
            case["D"],
            case["K"],
            niter=case["n_iter"],
            init_method=library.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            max_points_per_centroid=case["N"],  # else it works on a sample
        )
        found.train(points, init_centroids=init)
        return found.index.search(points, 1)[1][:, 0], found.centroids

    return set_by_set(inputs(case), fit)


def torch_matmul(case: dict[str, Any]) -> Call:
    """All sets at once; distances and sums as matrix products. case["compiled"]: iterations through torch.compile."""
    import torch
    from torch.nn import functional as F

    K = case["K"]

    def nearest(points: Any, centroid: Any) -> Any:
        return torch.baddbmm(0.5 * centroid.square().sum(-1)[:, None], points, centroid.mT, alpha=-1).argmin(-1)

    def iteration(points: Any, centroid: Any) -> Any:
        member = F.one_hot(nearest(points, centroid), K).to(points.dtype)
        return (member.mT @ points) / member.sum(1).clamp(min=1)[..., None]

    if case["compiled"]:
        nearest, iteration = (torch.compile(function, dynamic=False) for function in (nearest, iteration))

    def plus_plus(points: Any) -> Any:
        S, N, _ = points.shape
        sets = torch.arange(S)
        chosen = [points[sets, torch.randint(N, (S,))]]
        dist2 = torch.full((S, N), torch.inf)
        norm2 = points.square().sum(-1)
        for _ in range(K - 1):
            last = chosen[-1]
            product = torch.bmm(points, last[..., None])[..., 0]
            dist2 = torch.minimum(dist2, norm2 - 2 * product + last.square().sum(-1, keepdim=True)).clamp_(min=0)
            chosen.append(points[sets, torch.multinomial(dist2, 1)[:, 0]])
        return torch.stack(chosen, 1)

    tensors = [(torch.from_numpy(x), None if c is None else torch.from_numpy(c)) for x, c in inputs(case)]

    def call(i: int) -> Any:
        points, init = tensors[i % N_INPUTS]
        centroid = plus_plus(points) if init is None else init
        for _ in range(case["n_iter"]):
            centroid = iteration(points, centroid)
        return nearest(points, centroid), centroid

    return call


OURS = Contender("clmfast", clmfast)
RIVALS = (
    Contender("scikit-learn", scikit_learn, Process("scikit-learn"), ("sklearn",)),
    Contender("scikit-learn-intelex", scikit_learn_intelex, Process("scikit-learn-intelex"), ("sklearnex",)),
    Contender("faiss", faiss, Process("faiss"), ("faiss",)),
    Contender("torch eager", torch_matmul, TORCH, options={"compiled": False}),
    Contender("torch.compile", torch_matmul, TORCH, options={"compiled": True}),
)


def gate(case: dict[str, Any]) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, str]]:
    """Labels must be those of the nearest centroids. From k-means++: an inertia like the others'. From given centroids:
    the centroids of float64 arithmetic."""

    def check(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        wrong: dict[str, str] = {}
        inertia = dict.fromkeys(results, 0.0)
        for i, (points, init) in enumerate(inputs(case)):
            for s in range(case["S"]):
                x = points[s].astype(np.float64)
                right = None if init is None else _iterations(x, init[s].astype(np.float64), case["n_iter"])
                for name, result in results.items():
                    label, centroid = np.asarray(result[i][0][s]), np.asarray(result[i][1][s], np.float64)
                    dist2 = _dist2(x, centroid)
                    inertia[name] += dist2[np.arange(len(x)), label].sum()
                    n_off = (dist2.argmin(1) != label).sum()
                    if n_off > LABEL_TOLERANCE * len(x):
                        wrong[name] = f"{n_off} of {len(x)} labels are not the nearest centroid's"
                    if right is not None and not np.abs(centroid - right).max() <= CENTROID_TOLERANCE:
                        wrong[name] = f"a centroid is off by {np.abs(centroid - right).max():.2g}"
        least = min(inertia[name] for name in inertia if name not in wrong)
        return wrong | {
            name: f"inertia {value / least:.3f} times the least"
            for name, value in inertia.items()
            if not value <= INERTIA_TOLERANCE * least
        }

    return check


def _dist2(x: NDArray[np.float64], centroid: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x**2).sum(1)[:, None] + (centroid**2).sum(1) - 2 * x @ centroid.T


def _iterations(x: NDArray[np.float64], centroid: NDArray[np.float64], n_iter: int) -> NDArray[np.float64]:
    for _ in range(n_iter):
        label = _dist2(x, centroid).argmin(1)
        centroid = np.stack([x[label == k].mean(0) for k in range(len(centroid))])
    return centroid


def flops(case: dict[str, Any]) -> float:
    """Multiply-adds: every iteration and the last labels compare all points with all centroids; greedy k-means++ tries
    2 + floor(ln K) points for each centroid."""
    n_compared = (case["n_iter"] + 1) * case["K"]
    if case["starts"]:
        n_compared += (case["K"] - 1) * (2 + int(math.log(case["K"])))
    return 2.0 * case["S"] * case["N"] * case["D"] * n_compared


@pytest.mark.parametrize(
    ("what", "case", "must", "aim"),
    [
        ("k-means at S, k-means++ and 8 iterations", shape(), 2.0, 4.0),
        ("one Lloyd iteration at S", shape(n_iter=1, starts=False), 1.5, 3.0),
    ],
    ids=["plus_plus", "lloyd"],
)
def test_kmeans(compete: Any, claim: Any, what: str, case: dict[str, Any], must: float, aim: float) -> None:
    outcome = compete(what, case, [OURS, *RIVALS], gate(case), flops=flops(case))
    claim(what, outcome.ratio(), must, aim, detail=outcome.best_text())
