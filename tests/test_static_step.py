"""clmfast.static_step: a step of fixed shape trains as the ordinary one does, and measuring changes no bit of it."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from clmfast.config import ConfigError, check, replays_graph
from clmfast.static_step import StaticBatch, StaticStep
from clmfast.study.base import changed
from clmfast.train import Training

STEPS = 12


def rows(training: Training) -> np.ndarray:
    return np.array([step.values for step in training])


def static(config, tasks) -> Training:
    training = Training(config, tasks)
    training.static = StaticStep(training)
    return training


@pytest.fixture
def config(small):
    return dataclasses.replace(small, steps=STEPS)


def test_a_batch_is_padded_by_sequences_behind_it(small_tasks):
    packed = small_tasks.pack(small_tasks.splits["train"][:5])
    static_batch = StaticBatch(5, small_tasks.max_length, ("instruction_end", "prompt_end"))
    batch = {name: torch.full(shape, -7) for name, shape in static_batch.shapes.items()}
    static_batch.fill(batch, packed)
    assert not any((tensor == -7).any() for tensor in batch.values())
    n, offset = len(packed.tokens), batch["offset"].numpy()
    assert (batch["tokens"][:n].numpy() == packed.tokens).all() and (batch["tokens"][n:] == 0).all()
    assert (offset[:6] == packed.offset).all() and offset[-1] == len(batch["tokens"]) == 5 * small_tasks.max_length
    assert (np.diff(offset) >= 0).all() and np.diff(offset).max() <= small_tasks.max_length
    assert batch["position"].max() < small_tasks.max_length
    assert (batch["start"][1].numpy() == packed.prompt_end).all()


def test_it_trains_as_the_ordinary_step(config, small_tasks):
    ordinary, ours = Training(config, small_tasks), static(config, small_tasks)
    expected, found = rows(ordinary), rows(ours)
    at = [ordinary.column_at(f"train/{name}") for name in ("loss", "accuracy", "lr", "grad_norm")]
    np.testing.assert_allclose(found[:, at], expected[:, at], rtol=1e-4)
    # What the window measured differs where rounding decides, as between two processors: not in what it is.
    purity = [i for i in ordinary.window_at if ordinary.columns[i].measure == "neighbour_purity"]
    np.testing.assert_allclose(found[:, purity], expected[:, purity], atol=0.05)
    rivals = [c.measure == "rival_inertia_gap" for c in ordinary.columns]  # where there is one
    assert (np.isfinite(found) == np.isfinite(expected))[:, ~np.array(rivals)].all()


def test_measuring_changes_no_bit_of_it(config, small_tasks):
    measured = static(config, small_tasks)
    plain = static(dataclasses.replace(config, measure_every=0), small_tasks)
    at, plain_at = (t.column_at("train/loss") for t in (measured, plain))
    assert (rows(measured)[:-1, at] == rows(plain)[:-1, plain_at]).all()
    for mine, other in zip(measured.parameters, plain.parameters, strict=True):
        assert torch.equal(mine, other)


class Stream:
    """Stands in for torch.cuda.Stream and notes who waits for whom."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.mark.parametrize("measure_every", [0, 1])
def test_a_step_joins_what_it_forked_and_nothing_else(config, small_tasks, monkeypatch, measure_every):
    """A captured stream may not wait for work from outside the capture, such as that of a stream never forked."""
    log: list[str] = []
    main, side = Stream(log, "main"), Stream(log, "side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    training = static(dataclasses.replace(config, steps=2, measure_every=measure_every), small_tasks)
    training.static.side = side
    rows(training)
    of_a_step = ["side waits for main", "main waits for event of side", "main waits for side"]
    assert log == (of_a_step * 2 if measure_every else [])


@pytest.mark.parametrize("measure_every", [0, 1])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(config, small_tasks, measure_every):
    config = dataclasses.replace(config, measure_every=measure_every)
    whole = static(config, small_tasks)
    expected = rows(whole)
    first, second = static(config, small_tasks), static(config, small_tasks)
    for step in first:
        if step.step == 6:
            break
    tensors, values = first.state()
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, values)
    np.testing.assert_array_equal(rows(second), expected[7:])
    for mine, other in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, other)


def test_labels_are_those_of_the_rows_that_are_measured(config, small_tasks, monkeypatch):
    """Only the rows of the new batches are written, a step ahead; after a resume, all."""
    training = static(config, small_tasks)
    window, compute = training.window, training.static._compute

    def watched(*arguments):
        for ring in ("train", "unseen"):
            examples = getattr(window, ring).example
            found = training.static.inputs.on_device[f"labels/{ring}"][:, examples >= 0]
            assert (found.numpy() == window.labels_of(examples[examples >= 0].numpy())).all()
        return compute(*arguments)

    monkeypatch.setattr(training.static, "_compute", watched)
    steps = iter(training)
    for _ in range(6):
        next(steps)
    window.train.note(torch.from_numpy(small_tasks.splits["train"][:3]))  # as a state that was loaded
    training.static.prepare(training.next_step)
    assert len(list(steps)) == STEPS + 1 - 6


def test_who_replays_a_graph_and_why(small):
    assert replays_graph(small) == (False, "a CPU has no graphs")
    on_gpu = dataclasses.replace(small, device="cuda")
    assert replays_graph(on_gpu)[0]
    assert replays_graph(changed(on_gpu, "train", graph="off")) == (False, "asked for")
    is_graph, reason = replays_graph(changed(on_gpu, "train", loss_on="all"))
    assert not is_graph and "all tokens" in reason
    with pytest.raises(ConfigError, match=r"train\.graph must be auto or off where device is cpu, got on"):
        check(changed(small, "train", graph="on"))
    with pytest.raises(ConfigError, match=r"train\.graph must be auto or off where the loss is on all tokens"):
        check(changed(changed(on_gpu, "train", loss_on="all"), "train", graph="on"))


@pytest.mark.gpu
def test_a_replayed_graph_trains_as_the_eager_step(config, small_tasks):
    config = dataclasses.replace(config, steps=60, device="cuda")
    eager, graph = Training(changed(config, "train", graph="off"), small_tasks), Training(config, small_tasks)
    expected, found = rows(eager), rows(graph)
    assert graph.static is not None and graph.static.n_graphs > 0
    at = eager.column_at("train/loss")
    np.testing.assert_allclose(found[:-1, at], expected[:-1, at], rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["on", "off"])
def test_measuring_changes_no_bit_on_a_gpu(config, small_tasks, graph):
    config = changed(dataclasses.replace(config, steps=60, device="cuda"), "train", graph=graph)
    torch.use_deterministic_algorithms(True)
    try:
        measured, plain = (Training(dataclasses.replace(config, measure_every=e), small_tasks) for e in (1, 0))
        losses = [rows(t)[:-1, t.column_at("train/loss")] for t in (measured, plain)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert (losses[0] == losses[1]).all()
