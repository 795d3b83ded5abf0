"""The training step of the default run, unmeasured, float32: drawing and packing the batch, forward, backward,
clipping, AdamW. A contender returns the loss of its next step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.contest import TORCH, Contender, Process, anchor
from benchmarks.worker import Call

LOSS_TOLERANCE = 1e-3
N_CHECKS = 5
RUN = Process("clmfast run")  # set up as the command line does, which the ops alone are not

PLAIN = "torch eager"


def clmfast(case: dict[str, Any]) -> Call:
    from benchmarks.training import our_training, run_config

    training = our_training(run_config())
    steps = iter(training)
    at = [column.name for column in training.columns].index("train/loss")
    return lambda i: float(next(steps).values[at])


def plain(case: dict[str, Any]) -> Call:
    """The plain model; case["linear"] and case["compiled"] say how."""
    from torch import nn

    from benchmarks.training import OneDnnLinear, PlainTraining, run_config
    from clmfast.data.tasks import make_tasks
    from clmfast.train import Training

    config = run_config()
    ours = Training(config, make_tasks(config.task, config.seed))
    linear = OneDnnLinear if case["linear"] == "onednn" else nn.Linear
    training = PlainTraining(ours, linear, case["compiled"])
    return lambda i: training.step()


CONTENDERS = (
    Contender("clmfast", clmfast, RUN),
    Contender(PLAIN, plain, TORCH, options={"linear": "torch", "compiled": False}),
    Contender("torch.compile", plain, TORCH, options={"linear": "torch", "compiled": True}),
    Contender("torch eager, oneDNN linear", plain, TORCH, options={"linear": "onednn", "compiled": False}),
)


def gate(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Everybody starts from the same weights and sees the same batches: losses must be those of plain torch."""
    wrong, right = {}, anchor(results, PLAIN)
    for name, losses in results.items():
        off = np.abs(np.subtract(losses, right)).max()
        if not off <= LOSS_TOLERANCE:
            wrong[name] = f"a loss of the first {N_CHECKS} steps is off by {off:.2g}"
    return wrong


def test_step(compete: Any, claim: Any, results: Any) -> None:
    from benchmarks.training import run_config, step_flops
    from clmfast.config import to_dict
    from clmfast.data.tasks import make_tasks

    config = run_config()
    work = step_flops(config, make_tasks(config.task, config.seed))
    case = {"config": to_dict(config), "flops": dataclasses.asdict(work)}
    what = "training step of the default run, unmeasured, float32"
    outcome = compete(what, case, CONTENDERS, gate, flops=work.real, n_checks=N_CHECKS)
    plain, best = outcome.ratio([PLAIN]), outcome.ratio([c.name for c in CONTENDERS[2:]])
    padding, left_out = work.padded / work.real, work.padded / work.needed
    saved = f"at most {left_out:.2f}x of it by work left out, {padding:.2f}x by padding alone"
    claim(f"{what}: plain torch eager", plain, 2.0, 3.0, detail=saved)
    claim(f"{what}: torch.compile, oneDNN linears", best, 1.2, 1.7, detail=outcome.best_text())
    claim(
        f"{what}: real tokens' FLOPs over the fp32 FMA limit, all of the step's time",
        outcome.share_of_limit(outcome.ours, results.limits),
        unit="%",
        detail="a lower bound of the share within the matrix products",
    )
