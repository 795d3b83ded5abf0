"""The whole training step on a GPU, the tax of measuring it, and the probe. A part of benchmarks.gpu_check.

The rival is the plain nanoGPT-style model of benchmarks.training under torch.compile(mode="reduce-overhead"): the same
weights, batches, loss and optimizer, padded to one length, as CUDA graphs want it. Steps take turns; a time is that of
a whole step, from the draw of the batch to the loss on the host.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from benchmarks.training import NEVER, PlainTraining, train_batch
from clmfast.config import PRESETS, RunConfig
from clmfast.data.tasks import make_tasks
from clmfast.train import Training

if TYPE_CHECKING:
    from benchmarks.gpu_check import Report

PRESET_NAMES = "tiny", "paper"
N_WARM, N_TIMED = 70, 64  # steps: until all kinds of step are captured; of each contender
N_GATE = 5
LEAST_S = 90.0  # left before a preset begins: the rival is compiled, our graphs are captured
LOSS_TOLERANCE = 1e-3  # relative, over the first steps


def config_of(preset: str, device: str, measure_every: int) -> RunConfig:
    """A preset without validations and end."""
    config = PRESETS[preset]
    return dataclasses.replace(
        config, device=device, steps=100_000, measure_every=measure_every,
        train=dataclasses.replace(config.train, validate_every=NEVER),
        measure=dataclasses.replace(config.measure, probe_every=0),
    )  # fmt: skip


def losses_of(training: Training) -> Iterator[float]:
    at = training.column_at("train/loss")
    for step in training:
        yield float(step.values[at])


def gate(ours: Training, rival: PlainTraining) -> None:
    """Raises ValueError unless both compute the same losses; both are advanced."""
    losses = losses_of(ours)
    for step in range(N_GATE):
        mine, other = next(losses), rival.step()
        if not abs(mine - other) <= LOSS_TOLERANCE * abs(other):
            raise ValueError(f"losses of step {step} differ: {mine} and {other}")


def in_turns(contenders: dict[str, Callable[[], object]], n_warm: int, n_timed: int) -> dict[str, float]:
    """Median seconds of a call of each, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(n_warm + n_timed):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if i >= n_warm:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(of_name) for name, of_name in times.items()}


def tokens_per_step(config: RunConfig, n_steps: int = 8) -> float:
    """Real tokens of a batch, on average."""
    tasks = make_tasks(config.task, config.seed)
    return statistics.fmean(len(train_batch(config, tasks, step).tokens) for step in range(n_steps))


def measure(report: Report) -> None:
    from benchmarks.contest import Claim
    from benchmarks.gpu_check import claim_ratio

    for preset in PRESET_NAMES:
        what = f"training step, preset {preset}"
        if not report.has_time(what, LEAST_S):
            continue
        config = config_of(preset, "cuda", 0)
        tasks = make_tasks(config.task, config.seed)
        plain, measured = Training(config, tasks), Training(config_of(preset, "cuda", 1), tasks)
        rival = PlainTraining(plain, is_compiled=True, mode="reduce-overhead")
        gate(Training(config, tasks), rival)
        steps, measured_steps = iter(plain), iter(measured)
        seconds = in_turns(
            {
                "clmfast": lambda steps=steps: next(steps),
                "compiled rival": rival.step,
                "clmfast, measured": lambda steps=measured_steps: next(steps),
            },
            N_WARM,
            N_TIMED,
        )
        n_tokens = tokens_per_step(config)
        times = {
            name: report.time(what, name, 1e6 * s, tokens_per_s=round(n_tokens / s)) for name, s in seconds.items()
        }
        claim_ratio(report, what, times, "compiled rival", 1.3, 2)
        tax = seconds["clmfast, measured"] / seconds["clmfast"] - 1
        report.claims.append(Claim(f"{what}: tax of the window", 100 * tax, 25, 10, " %", at_most=True))
        report.note(f"{what}: {measured.static.n_graphs if measured.static else 0} graphs captured")
        time_probe(report, preset)


def time_probe(report: Report, preset: str) -> None:
    """The probe's forward pass, and with its measures."""
    config = config_of(preset, "cuda", 1)
    config = dataclasses.replace(config, measure=dataclasses.replace(config.measure, probe_every=NEVER))
    training = Training(config, make_tasks(config.task, config.seed))
    probe = training.probe
    assert probe is not None

    def states() -> None:
        probe.states(training.model)
        torch.cuda.synchronize()

    def whole() -> None:
        probe.measure(training.model)[0].cpu()

    for name, seconds in in_turns({"forward pass": states, "with its measures": whole}, 2, 5).items():
        report.time(f"probe, preset {preset}", name, 1e6 * seconds)
