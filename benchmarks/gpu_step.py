"""The whole training step on a GPU, what measuring adds to it, and the probe: sections of benchmarks.gpu_check.

The rival is the plain nanoGPT-style model of benchmarks.training under torch.compile(mode="reduce-overhead"): the same
weights, batches, loss and optimizer, padded to one length, as CUDA graphs want it. Steps take turns; a time is that of
a whole step, from the draw of the batch to the loss on the host. Ours is measured before the rival is compiled, which
takes longest, so that a time limit costs the rival alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from benchmarks.contest import Claim
from benchmarks.gpu_contest import (
    Report,
    WrongResult,
    claim_ratio,
    copies_and_launches,
    in_turns,
    kernel_table,
    median_us,
    synchronize,
)
from benchmarks.training import NEVER, PlainTraining, train_batch
from clmfast.config import PRESETS, RunConfig
from clmfast.data.tasks import TaskSet, make_tasks
from clmfast.static_step import StaticStep
from clmfast.train import Step, Training

N_WARM, N_TIMED = 100, 64  # steps: until every kind of step is captured; of each contender
N_FIRST = 5
N_RIVAL = 8  # steps of the compiled rival that are compared
FIRST_TOLERANCE = 1e-3  # relative, of the loss of each of the first steps
N_MEAN = 40  # later on, rounding makes another training of it: 5 % after 100 steps of the preset paper
MEAN_TOLERANCE = (
    1e-2  # relative, of the losses of the first N_MEAN steps, on average: another batch is 5 % off and more
)


def tiny(report: Report) -> None:
    measure(report, "tiny", PRESETS["tiny"])


def paper(report: Report) -> None:
    measure(report, "paper", PRESETS["paper"])


def config_of(base: RunConfig, device: str, measure_every: int, probe_every: int = 0) -> RunConfig:
    """A configuration without validations and end."""
    return dataclasses.replace(
        base, device=device, steps=100_000, measure_every=measure_every,
        train=dataclasses.replace(base.train, validate_every=NEVER),
        measure=dataclasses.replace(base.measure, probe_every=probe_every),
    )  # fmt: skip


def static_training(config: RunConfig, tasks: TaskSet) -> Training:
    """A training with the step that a GPU captures, on a CPU too."""
    training = Training(config, tasks)
    if training.static is None:
        training.static = StaticStep(training)
    return training


@dataclass
class Contender:
    """A training of ours, the host's part of whose steps is timed."""

    training: Training

    def __post_init__(self) -> None:
        self.before_ms: list[float] = []  # from the begin of a step until its graph is replayed
        self.beside_ms: list[float] = []  # preparing the next step, while it is
        self.begin_s = 0.0
        run, prepare = self.static._run, self.static.prepare

        def timed_run(*arguments: Any) -> Tensor:
            self.before_ms.append(1e3 * (time.perf_counter() - self.begin_s))
            return run(*arguments)

        def timed_prepare(step: int) -> None:
            begin_s = time.perf_counter()
            prepare(step)
            self.beside_ms.append(1e3 * (time.perf_counter() - begin_s))

        self.static._run = timed_run  # type: ignore[method-assign]
        self.static.prepare = timed_prepare  # type: ignore[method-assign]

    @property
    def static(self) -> StaticStep:
        assert self.training.static is not None
        return self.training.static

    @cached_property
    def _steps(self) -> Iterator[Step]:
        return iter(self.training)

    def step(self) -> float:
        """One whole step; returns the loss."""
        self.begin_s = time.perf_counter()
        return float(next(self._steps).values[self.training.column_at("train/loss")])

    def step_before(self, is_cold: bool) -> None:
        """Go on until the next step is of this kind: with a cold start of the window's k-means, or without."""
        every = self.training.config.measure.cold_every
        while (self.training.next_step % every == 0) != is_cold:
            self.step()


def losses_differ(found: list[list[float]], expected: list[float]) -> str:
    """How losses of the first steps, by contender, differ from the plain model's, in words; empty: they do not."""
    for losses in found:
        apart = [abs(x - y) / abs(y) for x, y in zip(losses, expected, strict=True)]
        for step, share in enumerate(apart[:N_FIRST]):
            if not share <= FIRST_TOLERANCE:
                return f"the loss of step {step} is {losses[step]}, must be {expected[step]}"
        if not (mean := statistics.fmean(apart[:N_MEAN])) <= MEAN_TOLERANCE:
            return f"losses are off by {100 * mean:.2g} % on average, the last ones {losses[-3:]}"
    return ""


def tokens_per_step(config: RunConfig, tasks: TaskSet, n_steps: int = 8) -> float:
    """Real tokens of a batch, on average."""
    return statistics.fmean(len(train_batch(config, tasks, step).tokens) for step in range(n_steps))


def measure(
    report: Report,
    preset: str,
    base: RunConfig,
    tasks: TaskSet | None = None,
    n_warm: int = N_WARM,
    n_timed: int = N_TIMED,
) -> None:
    what = f"training step, {preset}"
    config = config_of(base, report.device, 0)
    tasks = tasks or make_tasks(config.task, config.seed)
    plain = Contender(static_training(config, tasks))
    measured = Contender(static_training(config_of(base, report.device, 1), tasks))
    times: dict[str, float] = {}
    with report.shape(what):
        rival = PlainTraining(Training(config, tasks))
        rival.n_longest = plain.training.model.max_length
        losses = [[contender.step() for contender in (plain, measured, rival)] for _ in range(n_warm)]
        by_plain, by_measured, expected = map(list, zip(*losses, strict=True))
        report.check(what, losses_differ([by_plain, by_measured], expected))
        n_tokens = tokens_per_step(config, tasks)
        times = time_ours(report, what, plain, measured, n_timed, n_tokens)
        report.note(f"{what}: {plain.static.n_graphs} and {measured.static.n_graphs} graphs captured")
    if not times:
        return
    with report.shape(f"{what}, profiles"):
        profile_step(report, f"{what}, unmeasured", plain)
        profile_step(report, f"{what}, measured", measured, is_cold=False)
        profile_step(report, f"{what}, measured, cold start", measured, is_cold=True)
    with report.shape(f"{what}, probe"):
        time_probe(report, preset, base, tasks)
    with report.shape(f"{what}, compiled rival"):
        race(report, what, base, tasks, n_warm, n_timed, n_tokens, expected[:N_RIVAL])


def time_ours(
    report: Report, what: str, plain: Contender, measured: Contender, n_timed: int, n_tokens: float
) -> dict[str, float]:
    for contender in (plain, measured):
        contender.before_ms.clear()
        contender.beside_ms.clear()
    seconds = in_turns({"clmfast": plain.step, "clmfast, measured": measured.step}, 0, n_timed)
    times = {
        name: report.time(what, name, 1e6 * s, tokens_per_s=round(n_tokens / s), how="in turns")
        for name, s in seconds.items()
    }
    tax = times["clmfast, measured"] / times["clmfast"] - 1
    report.claim(Claim(f"{what}: tax of the window", 100 * tax, 25, 10, " %", at_most=True))
    for name, contender in (("unmeasured", plain), ("measured", measured)):
        report.count(
            f"{what}, {name}",
            host_ms_before_replay=statistics.median(contender.before_ms),
            host_ms_beside_replay=statistics.median(contender.beside_ms),
        )
    return times


def profile_step(report: Report, what: str, contender: Contender, is_cold: bool | None = None) -> None:
    """What a whole step copies and launches; the kernels of its graph, and how long that takes alone."""
    if is_cold is not None:
        contender.step_before(is_cold)
    whole = kernel_table(contender.step, report.device)
    counters = {"kernel_us": sum(row["us"] for row in whole), **copies_and_launches(whole)}
    kind = is_cold is not None, bool(is_cold)
    if report.device == "cpu":
        report.count(what, **counters)
        report.profile(f"{what}, whole step", whole)
        return
    graphs = contender.static._graphs
    if kind not in graphs:
        raise WrongResult(f"no graph was captured for this kind of step, only {sorted(graphs)}")
    replay = graphs[kind][0].replay
    report.count(what, **counters, replay_ms=median_us(replay, report.device) / 1e3)
    report.profile(f"{what}, one replay", kernel_table(replay, report.device))


def time_probe(report: Report, preset: str, base: RunConfig, tasks: TaskSet) -> None:
    """The probe's forward pass, and with its measures."""
    training = Training(config_of(base, report.device, 1, probe_every=NEVER), tasks)
    probe = training.probe
    assert probe is not None

    def states() -> None:
        probe.states(training.model)
        synchronize(report.device)

    def whole() -> None:
        probe.measure(training.model)[0].cpu()

    for name, seconds in in_turns({"forward pass": states, "with its measures": whole}, 2, 5).items():
        report.time(f"probe, {preset}", name, 1e6 * seconds)


def race(
    report: Report, what: str, base: RunConfig, tasks: TaskSet, n_warm: int, n_timed: int, n_tokens: float,
    expected: list[float],
) -> None:  # fmt: skip
    """All in turns, once the rival is compiled and its losses are as expected; the claim is from these times."""
    is_cpu = report.device == "cpu"  # where compiling takes long and makes no graphs
    config = config_of(base, report.device, 0)
    rival = PlainTraining(Training(config, tasks), is_compiled=not is_cpu, mode=None if is_cpu else "reduce-overhead")
    begin_s = time.perf_counter()
    losses = [rival.step() for _ in expected]  # the fourth step or so is the first one that is replayed
    report.note(f"{what}: the rival was compiled in {time.perf_counter() - begin_s:.0f} s")
    if wrong := losses_differ([losses], expected):
        report.note(f"{what}: the compiled rival left out: {wrong}")
        return
    plain, measured = (
        Contender(static_training(config_of(base, report.device, measure_every), tasks)) for measure_every in (0, 1)
    )
    for _ in range(n_warm):  # until every kind of step is captured
        plain.step()
        measured.step()
    contenders = {"clmfast": plain.step, "compiled rival": rival.step, "clmfast, measured": measured.step}
    times = {
        name: report.time(f"{what}, all in turns", name, 1e6 * s, tokens_per_s=round(n_tokens / s))
        for name, s in in_turns(contenders, 5, n_timed).items()
    }
    claim_ratio(report, what, times, "compiled rival", 1.3, 2)
