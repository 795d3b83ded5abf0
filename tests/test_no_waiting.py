"""The window on a GPU: without moves of k-means it says the same as on the CPU, and nothing waits for the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clmfast.config import MeasureConfig, ModelConfig, RunConfig, TrainConfig
from clmfast.data.tasks import TaskSet
from clmfast.measure.partition import PARTITION_MEASURES
from clmfast.measure.probe import Probe
from clmfast.measure.window import Window
from clmfast.model import Transformer
from clmfast.static_step import StaticStep
from clmfast.train import Training

N_LAYERS, WIDTH, BATCH, N_UNSEEN = 3, 24, 40, 7
CONFIG = MeasureConfig(window=150, unseen_per_step=N_UNSEEN, unseen_window=30, k=4, cold_every=3)
RUN = RunConfig(model=ModelConfig(N_LAYERS - 1, WIDTH, 2), train=TrainConfig(batch=BATCH), measure=CONFIG)
# What asks the device for a value, or for the size of a result.
WAITING = (
    "_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero", "equal", "bincount", "repeat_interleave.Tensor",
)  # fmt: skip


class Refuses(TorchDispatchMode):
    """Raises where an op waits for the device: on the CPU they look as they would on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        is_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for argument in args
            if isinstance(argument, (list, tuple))
            for i in argument
        )
        if name in WAITING or name.split(".")[0] in WAITING or is_mask:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def windows(tasks: TaskSet, device: str = "cpu") -> tuple[Window, Window]:
    """Both without moves of k-means, as on a GPU."""
    found = tuple(Window(tasks, dataclasses.replace(RUN, device=d), N_LAYERS) for d in ("cpu", device))
    for window in found:
        window.has_moves = False
    return found


def write(window: Window, tasks: TaskSet, step: int) -> None:
    """A batch of states that cluster by task, and more so with every step."""
    random = np.random.default_rng(step)
    for ring, split, n in ((window.train, "train", BATCH), (window.unseen, "unseen_instruction", N_UNSEEN)):
        examples = random.choice(tasks.splits[split], n)
        task = tasks.labels(examples)["task"]
        states = random.normal(size=(N_LAYERS, 2, n, WIDTH)) + 5
        states[..., 0] += step * task
        rows = ring.advance(torch.from_numpy(examples))
        ring.bank[:, :, rows.to(ring.bank.device)] = torch.from_numpy(states).float().to(ring.bank.device)


def test_without_moves_only_partitions_differ(small_tasks):
    ours, whole = windows(small_tasks)
    ours.has_moves = True
    for step in range(9):
        for window in (ours, whole):
            write(window, small_tasks, step)
        (a, a_answers), (b, b_answers) = ours.measure(step), whole.measure(step)
        torch.testing.assert_close(b_answers, a_answers, rtol=0, atol=0, equal_nan=True)
        of_partitions = [c.measure in PARTITION_MEASURES or "kmeans" in c.measure for c in ours.columns]
        others = ~torch.tensor(of_partitions)
        torch.testing.assert_close(b[others], a[others], rtol=0, atol=0, equal_nan=True)
        share = torch.tensor([c.measure == "inertia_share" for c in ours.columns])
        assert (a[share] <= 1.02 * b[share] + 1e-9).all()
    assert b[share].isfinite().all()


def test_nothing_waits(small_tasks):
    _, whole = windows(small_tasks)
    for step in range(5):
        write(whole, small_tasks, step)
        with Refuses():
            whole.measure(step)


def test_nothing_in_a_probe_waits(small, small_tasks, monkeypatch):
    monkeypatch.setattr("clmfast.model.FEW_SEQUENCES", 10**9)  # as below
    config = dataclasses.replace(CONFIG, readouts=("instruction_end", "prompt_end", "mean"))
    probe = Probe(small_tasks, config, N_LAYERS, WIDTH, 0)
    model = Transformer(ModelConfig(N_LAYERS - 1, WIDTH, 2), len(small_tasks.vocabulary), small_tasks.max_length, 0)
    expected, _ = probe.measure(model)
    with Refuses():
        found, _ = probe.measure(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_in_a_static_step_waits(small, small_tasks, monkeypatch):
    monkeypatch.setattr("clmfast.model.FEW_SEQUENCES", 10**9)  # what sequences begin with is shared on a CPU alone
    training = Training(dataclasses.replace(small, steps=5), small_tasks)
    assert training.window is not None
    training.window.has_moves = False
    training.static = StaticStep(training)
    compute = training.static._compute

    def watched(*arguments: Any) -> torch.Tensor:
        with Refuses():
            return compute(*arguments)

    monkeypatch.setattr(training.static, "_compute", watched)
    assert len(list(training)) == 6


@pytest.mark.parametrize("waits", [lambda x: x.max().item(), lambda x: x[x > 0], lambda x: x.nonzero(), torch.unique])
def test_what_waits_is_refused(waits):
    with Refuses(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.arange(3.0))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers_and_nothing_waits(small_tasks):
    ours, whole = windows(small_tasks, "cuda")
    for step in range(9):
        for window in (ours, whole):
            write(window, small_tasks, step)
        expected = ours.measure(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = whole.measure(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for mine, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other.cpu(), mine, rtol=1e-6, atol=1e-6, equal_nan=True)
