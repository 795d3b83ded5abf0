"""train.py: measuring changes nothing, the same config gives the same bits, a resumed run goes on bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading

import numpy as np
import pytest
import torch
from conftest import changed

from clmfast.config import PRESETS, rides_inside
from clmfast.data.tasks import make_tasks
from clmfast.measuring_thread import threads_beside
from clmfast.ops import forks
from clmfast.surroundings import Surroundings
from clmfast.train import EarlyStopping, Training, TrainingDiverged, snapshot_steps, train


def losses(steps):
    return [step.values[:4] for step in steps]


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_measuring_does_not_change_training(small, two_threads):
    measured = losses(train(small))
    unmeasured = losses(train(dataclasses.replace(small, measure_every=0)))
    assert np.array_equal(measured, unmeasured, equal_nan=True)
    assert np.isfinite(np.array(measured)[:-1]).all()


def trained(config, tasks, n_steps=5, rides_inside=True):
    """(values of each step, gradients and weights after it)"""
    training, found = Training(config, tasks), []
    training.rides_inside = rides_inside
    if not rides_inside:
        training.timing_columns = (*training.timing_columns, "ride_along_ms")
    for step in itertools.islice(training, n_steps):
        found.append((step.values, [t.clone() for p in training.parameters for t in (p.grad, p.detach())]))
    return found


# Few sequences, that share no rows, and enough of them; more riders than trained ones, as many and one alone.
RIDERS = [(7, 1), (8, 16), (31, 5), (32, 16), (33, 1), (128, 16)]


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("batch", "n_riders"), RIDERS)
@pytest.mark.parametrize("loss_on", ["output", "all"])
def test_riders_change_no_bit_of_training(small, small_tasks, two_threads, batch, n_riders, loss_on, n_threads):
    torch.set_num_threads(n_threads)
    config = changed(changed(small, "train", batch=batch, loss_on=loss_on), "measure", window=4 * batch, probe_every=0)
    config = changed(config, "measure", unseen_per_step=n_riders, unseen_window=4 * n_riders)
    with_riders = trained(config, small_tasks)
    without = trained(dataclasses.replace(config, measure_every=0), small_tasks)
    for (values, tensors), (values_without, tensors_without) in zip(with_riders, without, strict=True):
        assert np.array_equal(values[:4], values_without[:4])
        assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_without, strict=True))
    apart = trained(config, small_tasks, rides_inside=False)
    for (values, _), (values_apart, _) in zip(with_riders, apart, strict=True):  # their states are what they would be
        assert np.array_equal(values, values_apart, equal_nan=True)


def test_riders_change_no_bit_of_the_paper_preset(two_threads):
    config = dataclasses.replace(PRESETS["paper"], steps=20)
    tasks = make_tasks(config.task, config.seed)
    pairs = zip(trained(config, tasks, 2), trained(dataclasses.replace(config, measure_every=0), tasks, 2), strict=True)
    for (values, tensors), (values_without, tensors_without) in pairs:
        assert np.array_equal(values[:4], values_without[:4])
        assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_without, strict=True))


def test_where_riders_ride_is_told_and_timed(small, small_tasks):
    assert rides_inside(small)[0] and not rides_inside(dataclasses.replace(small, device="cuda"))[0]
    with Surroundings() as surroundings:
        told = surroundings.set_up_torch(small)["riders"]
    assert told == {"value": "in the training pass", "reason": rides_inside(small)[1]}
    training = Training(small, small_tasks)
    assert "ride_along_ms" not in training.timing_columns
    assert tuple(next(iter(training)).timing) == training.timing_columns


def test_riders_with_a_gradient_would_be_seen(small, small_tasks, monkeypatch):
    """What the tests above compare differs where riders count among those that are trained, though in no loss."""
    config = changed(changed(small, "train", batch=32), "measure", window=128, unseen_per_step=16, unseen_window=16)
    right, states = trained(config, small_tasks), Training._states
    monkeypatch.setattr(Training, "_states", lambda self, batch, tap, n_trained=None: states(self, batch, tap))
    wrong = trained(config, small_tasks)
    assert any(not torch.equal(a, b) for a, b in zip(right[0][1], wrong[0][1], strict=True))


@pytest.mark.parametrize("other", ["dtype", "device"])
def test_other_defaults_of_torch_change_no_bit(small, other):
    expected = list(train(small))
    try:
        if other == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        found = list(train(small))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for x, y in zip(found, expected, strict=True):
        assert np.array_equal(x.values, y.values, equal_nan=True), x.step
        if x.answers is not None:
            assert np.array_equal(x.answers, y.answers, equal_nan=True)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_measuring_beside_the_backward_pass_changes_no_bit(small, small_tasks, n_threads):
    here = Training(changed(small, "measure", threads=0), small_tasks)
    beside = Training(changed(small, "measure", threads=n_threads), small_tasks)
    assert here.beside is None and beside.beside is not None
    n_threads_before = torch.get_num_threads()
    for x, y in zip(here, beside, strict=True):
        assert np.array_equal(x.values, y.values, equal_nan=True), x.step
        assert (x.answers is None) == (y.answers is None)
        assert x.answers is None or np.array_equal(x.answers, y.answers, equal_nan=True)
    assert torch.get_num_threads() == n_threads_before
    assert all(torch.equal(a, b) for a, b in zip(here.parameters, beside.parameters, strict=True))


def test_measuring_runs_in_its_thread_with_its_threads(small, small_tasks, monkeypatch):
    training = Training(changed(small, "measure", threads=2), small_tasks)
    seen, measure = [], training.window.measure

    def watched(step):
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return measure(step)

    monkeypatch.setattr(training.window, "measure", watched)
    next(iter(training))
    [(thread, n_threads)] = seen
    assert thread is not threading.current_thread() and n_threads == 2


def test_an_error_of_measuring_ends_the_step_wherever_it_is_measured(small, small_tasks, monkeypatch):
    for n_threads in (0, 1):
        training = Training(changed(small, "measure", threads=n_threads), small_tasks)

        def fails(step):
            raise FloatingPointError("of the window")

        monkeypatch.setattr(training.window, "measure", fails)
        with pytest.raises(FloatingPointError, match="of the window"):
            next(iter(training))


def test_who_measures_beside_training(small, monkeypatch, two_threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads_beside(small) == (6, "training leaves so many of 8 cores free")
    assert threads_beside(changed(small, "measure", threads=3)) == (3, "asked for")
    assert threads_beside(changed(small, "measure", threads=0))[0] == 0
    assert threads_beside(dataclasses.replace(small, measure_every=0))[0] == 0
    assert threads_beside(dataclasses.replace(small, device="cuda"))[0] == 0
    torch.set_num_threads(8)
    assert threads_beside(small)[0] == 0
    torch.set_num_threads(1)
    monkeypatch.setattr(forks, "is_late_fork", True)
    assert threads_beside(small)[0] == 0  # its process has no threads to give
    with Surroundings() as surroundings:
        told = surroundings.set_up_torch(changed(dataclasses.replace(small, threads=1), "measure", threads=3))
    assert told["threads"]["value"] == 1 and told["measuring_threads"] == {"value": 3, "reason": "asked for"}


def test_training_leaves_the_cores_that_measuring_asks_for(small, monkeypatch, two_threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with Surroundings() as surroundings:
        told = surroundings.set_up_torch(changed(small, "measure", threads=1))
        assert torch.get_num_threads() == told["threads"]["value"] == 1
    assert told["measuring_threads"]["value"] == 1


def test_same_config_same_bits_other_seed_other_losses(small, two_threads):
    a, b = list(train(small)), list(train(small))
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.values, y.values, equal_nan=True)
        if x.answers is not None:
            assert np.array_equal(x.answers, y.answers, equal_nan=True)
    other = losses(train(dataclasses.replace(small, seed=1)))
    assert not np.array_equal(losses(a)[:-1], other[:-1])


def test_a_resumed_run_goes_on_bit_for_bit(small, small_tasks):
    whole = list(train(small))
    first = Training(small, small_tasks)
    for step in first:
        if step.step == 4:
            break
    tensors, values = first.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    second = Training(small, small_tasks)
    second.load_state(saved, values)
    rest = list(second)
    assert [step.step for step in rest] == list(range(5, small.steps + 1))
    for x, y in zip(rest, whole[5:], strict=True):
        assert np.array_equal(x.values, y.values, equal_nan=True), x.step
        assert x.events == y.events


# Of all tokens most are letters that no model can foresee: less of that loss can be learned away.
@pytest.mark.parametrize(("loss_on", "share_left"), [("output", 0.6), ("all", 0.7)])
def test_it_learns(small, loss_on, share_left):
    config = dataclasses.replace(
        changed(changed(small, "train", lr=3e-3, batch=32, loss_on=loss_on), "task", n_tasks=2),
        steps=60,
        measure_every=0,
    )
    rows = np.array(losses(train(config)))
    assert rows[-6:-1, 0].mean() < share_left * rows[:5, 0].mean()


def test_every_column_is_measured_at_its_cadence(small, small_tasks):
    training = Training(small, small_tasks)
    table = np.array([step.values for step in training])
    assert table.shape == (small.steps + 1, len(training.columns))
    for i, column in enumerate(training.columns):
        at = np.flatnonzero(np.isfinite(table[:, i])).tolist()
        match column.estimator:
            case "train":
                expected = list(range(small.steps))
            case "validation" if column.split == "unseen_instruction":
                expected = [0, 4, 5, 8, 10, 12]
            case "validation" | "probe":
                expected = [0, 5, 10, 12]
            case _:
                expected = list(range(small.steps))
        never = column.readout == "instruction_end" and column.estimator == "probe"
        if never and column.measure in ("ari_input", "ari_output", "ari_task_output"):
            assert at == []
        elif "ratio" in column.measure or "inertia" in column.measure:
            assert set(at) <= set(expected)  # not a number where all states are equal, or where there is no rival
        else:
            assert at == expected, column.name


def test_snapshots_are_taken_at_the_ends_and_between(small):
    assert snapshot_steps(small) == {0, 5, 12} | snapshot_steps(small)
    assert {0, 12} <= snapshot_steps(small) <= {0, 5, 10, 12}
    steps = {step.step for step in train(small) if step.snapshots}
    assert steps == snapshot_steps(small)


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_step(small, small_tasks):
    training = Training(changed(small, "train", lr=1e30, warmup_steps=0, clip_norm=1e30), small_tasks)
    seen = []
    with pytest.raises(TrainingDiverged, match=r"stopped at step \d+: the loss must be finite, got nan") as error:
        iter_into(seen, training)
    assert error.value.step == seen[-1].step
    assert seen[-1].events[-1]["event"] == "anomaly"


def iter_into(seen, training):
    """Collect the steps that came before an error."""
    for step in training:
        seen.append(step)


def test_early_stopping_picks_the_best_step_once():
    stop = EarlyStopping(patience=2)
    picks = [stop.update(step, accuracy) for step, accuracy in enumerate([0.1, 0.5, 0.4, 0.5, 0.9, 0.1, 0.1])]
    assert picks == [False, False, False, True, False, False, False]
    assert stop.picked_step == 1


def test_stop_early_ends_the_run(small):
    config = changed(small, "train", lr=1e-9, validate_every=1, patience=1, stop_early=True)
    steps = [step.step for step in train(config)]
    assert steps[-1] < small.steps


def test_learning_rate(small, small_tasks):
    training = Training(dataclasses.replace(changed(small, "train", warmup_steps=4), steps=20), small_tasks)
    rates = [training.lr(step) for step in range(21)]
    peak = small.train.lr
    assert rates[:4] == pytest.approx([peak / 4, peak / 2, peak * 3 / 4, peak])
    assert rates[20] == pytest.approx(0.1 * peak)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_only_matrices_of_blocks_decay(small, small_tasks):
    training = Training(small, small_tasks)
    decayed, others = training.optimizer.param_groups
    assert decayed["weight_decay"] == small.train.weight_decay
    assert others["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"])
    n_all = sum(1 for _ in training.model.parameters())
    assert len(decayed["params"]) + len(others["params"]) == n_all


def test_mean_readout_runs(small):
    config = changed(small, "measure", readouts=("mean", "instruction_end"))
    rows = [step.values for step in train(dataclasses.replace(config, steps=3))]
    assert len(rows) == 4


def test_tasks_follow_from_the_config(small):
    assert make_tasks(small.task, small.seed).patterns == make_tasks(small.task, small.seed).patterns
