"""Is what the window reports at a step what a patient measurement of the same states would say?

    python -m benchmarks.accuracy                          # seeds 20 to 24: some 20 minutes on two cores
    python -m benchmarks.accuracy --seeds 10..11 --every 100 --restarts 20

Trains the default run, and at every 25th step, in layers 3 to 6 and both readouts, gives the states of the window to
scikit-learn's k-means with a hundred restarts. Told are, over all these cases: how far the window's inertia lies above
the lowest known (the window's or that of a restart), how far its ARI lies from that of the lowest inertia where the
band is narrow, and whether the band contains the ARI of restarts that are within 0.5 % of the lowest inertia. Writes
benchmarks/results/<cpu>/accuracy.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import cpu_slug, describe
from benchmarks.results import ACCURACY, FOLDER
from clmfast.config import RunConfig
from clmfast.findings import AMBIGUOUS
from clmfast.measure.catalogue import BAND_SHARE

LAYERS = (3, 4, 5, 6)
TOLERANCES = (0.005, 0.01)  # of ARI: about one state of a thousand, and two


class Case(NamedTuple):
    """A step, layer and readout of a run, and what the window said."""

    seed: int
    step: int
    layer: int
    readout: str
    points: NDArray[np.float32]  # [N, D]
    task: NDArray[np.int64]  # [N]
    label: NDArray[np.int64]  # [N], the window's partition
    n_tasks: int
    ari: float
    low: float
    high: float


def cases(seed: int, every: int) -> Iterator[Case]:
    """Trains the default run of a seed."""
    from benchmarks.training import our_training, run_config

    config = dataclasses.replace(run_config(measure_every=1), seed=seed, steps=RunConfig().steps)
    training = our_training(config)
    window = training.window
    assert window is not None
    readouts = config.measure.readouts
    for step in training:
        if step.step == 0 or step.step % every or step.step == config.steps:
            continue
        n = window.train.n_filled
        task = training.tasks.labels(window.train.example[:n].numpy())["task"]
        for layer in LAYERS:
            for r, readout in enumerate(readouts):
                said = [
                    step.values[training.column_at(f"window/{readout}/layer{layer}/{name}")]
                    for name in ("ari_task", "ari_task_low", "ari_task_high")
                ]
                s = layer * len(readouts) + r
                yield Case(
                    seed, step.step, layer, readout, window.train.points[s, :n].numpy().copy(), task,
                    window.known[0, s, :n].numpy().copy(), training.tasks.n_tasks, *said,
                )  # fmt: skip


def inertia_of(points: NDArray[Any], label: NDArray[np.int64]) -> float:
    points = points.astype(np.float64)
    return float(sum(((points[label == k] - points[label == k].mean(0)) ** 2).sum() for k in np.unique(label)))


def judge(case: Case, n_restarts: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score
    from threadpoolctl import threadpool_limits

    points = case.points.astype(np.float64)
    with threadpool_limits(1):
        fits = [KMeans(case.n_tasks, n_init=1, random_state=r, tol=1e-6).fit(points) for r in range(n_restarts)]
    inertia = np.array([inertia_of(points, fit.labels_) for fit in fits])
    ari = np.array([adjusted_rand_score(case.task, fit.labels_) for fit in fits])
    ours = inertia_of(points, case.label)
    best = int(inertia.argmin())
    lowest = min(ours, inertia[best])
    right = case.ari if ours <= inertia[best] else ari[best]
    close = ari[inertia <= (1 + BAND_SHARE) * lowest]
    outside = np.maximum(case.low - close, close - case.high)
    return {
        "seed": case.seed, "step": case.step, "layer": case.layer, "readout": case.readout,
        "excess": ours / lowest - 1, "ari": case.ari, "low": case.low, "high": case.high, "ari_of_lowest": right,
        "n_close": len(close), "n_inside": int((outside <= TOLERANCES[0]).sum()),
        "farthest_outside": float(outside.max(initial=0)),
    }  # fmt: skip


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of the table, over all cases."""
    of = {name: np.array([case[name] for case in found]) for name in found[0] if name != "readout"}
    error, is_narrow = np.abs(of["ari"] - of["ari_of_lowest"]), of["high"] - of["low"] < AMBIGUOUS
    has_close = of["n_close"] > 0
    return {
        "cases": len(found),
        "inertia at most 0.3 % above the lowest known, share of cases": float((of["excess"] <= 0.003).mean()),
        "inertia at most 0.1 % above, share": float((of["excess"] <= 0.001).mean()),
        "inertia above the lowest known, mean": float(of["excess"].mean()),
        "inertia above, 95th percentile": float(np.quantile(of["excess"], 0.95)),
        "error of ARI where the band is narrower than 0.05, mean": float(error[is_narrow].mean()),
        "error of ARI, all cases, mean": float(error.mean()),
        "band narrower than 0.05, share": float(is_narrow.mean()),
        **{
            f"band has all restarts within 0.5 % of the lowest, give or take {tolerance} of ARI, share of cases": float(
                (of["farthest_outside"][has_close] <= tolerance).mean()
            )
            for tolerance in TOLERANCES
        },
        "restarts within 0.5 % of the lowest that lie in the band, share": float(
            of["n_inside"].sum() / max(1, of["n_close"].sum())
        ),
    }


def seeds_of(text: str) -> list[int]:
    first, _, last = text.partition("..")
    return list(range(int(first), int(last or first) + 1))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="The window against restarts.")
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("20..24"), metavar="A..B")
    parser.add_argument("--every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--restarts", type=int, default=100, metavar="N")
    asked = parser.parse_args(arguments)
    console, found = Console(), list[dict[str, Any]]()
    n_cores = len(os.sched_getaffinity(0))
    n_cases = len(asked.seeds) * ((RunConfig().steps - 1) // asked.every) * len(LAYERS) * 2
    with ProcessPoolExecutor(n_cores, multiprocessing.get_context("spawn")) as pool, Progress(console=console) as bar:
        line = bar.add_task("states against restarts", total=n_cases)
        waiting: list[Future[dict[str, Any]]] = []

        def take(n_left: int) -> None:
            while len(waiting) > n_left:
                found.append(waiting.pop(0).result())
                bar.update(line, advance=1)

        for seed in asked.seeds:
            for case in cases(seed, asked.every):
                waiting.append(pool.submit(judge, case, asked.restarts))
                take(64)
        take(0)
    numbers = summary(found)
    table = Table("", "", title=f"{asked.restarts} restarts, seeds {asked.seeds[0]} to {asked.seeds[-1]}")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    path = FOLDER / cpu_slug() / ACCURACY
    path.parent.mkdir(parents=True, exist_ok=True)
    asked_for = {"seeds": asked.seeds, "every": asked.every, "restarts": asked.restarts, "tolerances": TOLERANCES}
    path.write_text(
        json.dumps({"machine": describe(n_cores), **asked_for, "summary": numbers, "cases": found}, indent=1)
    )
    console.print(path.relative_to(FOLDER.parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
