"""partition_scores: ARI, NMI and V-measure of 2048 labels in 7 layers. The oracle is scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.contest import N_INPUTS, TORCH, Contender, Process
from benchmarks.worker import Call

TOLERANCE = 1e-5
AGREEMENT = (0.9, 0.5)  # share of labels that follow the truth, by input


def shape(S: int = 7, N: int = 2048, K: int = 20) -> dict[str, Any]:
    return {"S": S, "N": N, "K": K}


def inputs(case: dict[str, Any]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The rotated inputs: truth [N], labels [S, N]. In the last one they are exactly independent: where nothing is in
    common, formulas that divide by it show themselves."""
    S, N, K = case["S"], case["N"], case["K"]
    found = []
    for i, agreement in enumerate(AGREEMENT):
        rng = np.random.default_rng(i)
        truth = rng.integers(K, size=N)
        found.append((truth, np.where(rng.random((S, N)) < agreement, truth, rng.integers(K, size=(S, N)))))
    row, column = np.divmod(np.arange(N), 16)  # N a multiple of 16 * 16: every pair comes equally often
    found.append((column, (row + np.arange(S)[:, None]) % 16))
    return found


def clmfast(case: dict[str, Any]) -> Call:
    import torch

    from clmfast import ops

    tensors = [(torch.from_numpy(truth), torch.from_numpy(label)) for truth, label in inputs(case)]

    def call(i: int) -> Any:
        scores = ops.partition_scores(*tensors[i % N_INPUTS], n_truth=case["K"], n_label=case["K"])
        return scores.ari, scores.nmi, scores.v_measure

    return call


def set_by_set(sets: Sequence[tuple[Any, Any]], scores: Callable[[Any, Any], tuple[Any, Any, Any]]) -> Call:
    """A Call for libraries that know one set: scores(truth, label) -> (ari, nmi, v_measure)."""

    def call(i: int) -> Any:
        truth, labels = sets[i % N_INPUTS]
        return tuple(zip(*(scores(truth, label) for label in labels), strict=True))

    return call


def sklearn_scores(truth: Any, label: Any) -> tuple[Any, Any, Any]:
    """(ari, nmi, v_measure): the oracle too."""
    from sklearn import metrics

    return (
        metrics.adjusted_rand_score(truth, label),
        metrics.normalized_mutual_info_score(truth, label),
        metrics.v_measure_score(truth, label),
    )


def scikit_learn(case: dict[str, Any]) -> Call:
    return set_by_set(inputs(case), sklearn_scores)


def torchmetrics(case: dict[str, Any]) -> Call:
    import torch
    from torchmetrics.functional import clustering

    def scores(truth: Any, label: Any) -> tuple[Any, Any, Any]:
        return (
            clustering.adjusted_rand_score(label, truth),
            clustering.normalized_mutual_info_score(label, truth),
            clustering.v_measure_score(label, truth),
        )

    return set_by_set([(torch.from_numpy(truth), torch.from_numpy(label)) for truth, label in inputs(case)], scores)


CONTENDERS = (
    Contender("clmfast", clmfast),
    Contender("scikit-learn", scikit_learn, Process("scikit-learn"), ("sklearn",)),
    Contender("torchmetrics", torchmetrics, TORCH, ("torchmetrics",)),
)


def gate(case: dict[str, Any]) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, str]]:
    def check(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        wrong: dict[str, str] = {}
        for i, (truth, labels) in enumerate(inputs(case)):
            right = np.array([sklearn_scores(truth, label) for label in labels]).T
            for name, result in results.items():
                off = np.abs(np.array(result[i], np.float64) - right).max(1)
                if not off.max() <= TOLERANCE:
                    worst = ("ARI", "NMI", "V-measure")[int(off.argmax())]
                    where = (
                        f"{AGREEMENT[i]:.0%} of the labels agree" if i < len(AGREEMENT) else "labels are independent"
                    )
                    wrong[name] = f"{worst} is off by {off.max():.2g} where {where}"
        return wrong

    return check


def test_partition(compete: Any, claim: Any) -> None:
    pytest.importorskip("sklearn", reason="the oracle of these scores is scikit-learn")
    case, what = shape(), "ARI+NMI+V at N = 2048, 7 layers"
    outcome = compete(what, case, CONTENDERS, gate(case), bytes_moved=8.0 * (case["S"] + 1) * case["N"])
    claim(what, outcome.ratio(["scikit-learn"]), 300.0, 1000.0, detail=outcome.best_text())
