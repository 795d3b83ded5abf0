"""measure/window.py: what it reports is what a full computation over the same states gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from clmfast import ops
from clmfast.capture import spans
from clmfast.data.tasks import draw
from clmfast.measure.catalogue import BAND_STEPS
from clmfast.measure.partition import ari_band
from clmfast.measure.window import ANSWERS, Window
from clmfast.model import Transformer


def advance(window, config, tasks, step):
    """States of a model that is another one at every step."""
    model = Transformer(config.model, len(tasks.vocabulary), tasks.max_length, seed=step)
    n_riders = config.measure.unseen_per_step
    for ring, split, n in ((window.train, "train", config.train.batch), (window.unseen, window_split, n_riders)):
        examples = draw(tasks.splits[split], n, 0, step, "train")
        batch = tasks.pack(examples)
        ring.aim(*spans(batch, ring.readouts))
        model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), tap=ring)
        ring.advance(torch.from_numpy(examples))


window_split = "unseen_instruction"


@pytest.fixture
def run_window(small, small_tasks):
    """(steps, config) -> (window, values by column name of each step, answers of each step)."""

    def run(n_steps, config=small):
        window = Window(small_tasks, config, config.model.n_layers + 1)
        values, answers = [], []
        for step in range(n_steps):
            advance(window, config, small_tasks, step)
            if step % config.measure_every == 0:
                measured, answered = window.measure(step)
                values.append(dict(zip([c.name for c in window.columns], measured.tolist(), strict=True)))
                answers.append(answered.numpy().copy())
        return window, values, np.stack(answers)

    return run


def sets_of(window):
    return [(layer, readout) for layer in range(window.n_layers) for readout in window.config.readouts]


def test_answers_are_those_of_a_full_computation(small, small_tasks, run_window):
    window, _, answers = run_window(7)  # the ring of 32 has gone round
    batch = small.train.batch
    ring = small_tasks.labels(window.train.example.numpy())
    rows = window.train.next_rows(batch)  # behind those written last
    rows = (rows - batch) % window.train.n_points
    unseen = small_tasks.labels(window.unseen.example.numpy())
    for s, (layer, readout) in enumerate(sets_of(window)):
        points = window.train.points[s].double().numpy()
        r = small.measure.readouts.index(readout)
        asked = [(points[i], {kind: ring[kind][i] for kind in ring}) for i in rows.tolist()]
        ridden = [
            (x, {kind: unseen[kind][i] for kind in unseen})
            for i, x in enumerate(window.unseen.points[s].double().numpy())
        ]
        expected = np.zeros((3, 2, small_tasks.n_tasks))
        for i_measure, queries, kind in ((0, asked, "instruction"), (1, ridden, "instruction"), (2, ridden, "grammar")):
            for x, label in queries:
                dist2 = ((points - x) ** 2).sum(1).astype(np.float32)
                dist2[ring[kind] == label[kind]] = np.inf
                near = np.argsort(dist2, kind="stable")[: small.measure.k]
                votes = ring["task"][near[np.isfinite(dist2[near])]]
                if i_measure == 0:
                    expected[0, :, label["task"]] += (votes == label["task"]).mean(), 1
                else:
                    count = np.bincount(votes, minlength=small_tasks.n_tasks)
                    vote = next(v for v in votes if count[v] == count.max())
                    expected[i_measure, :, label["task"]] += vote == label["task"], 1
        np.testing.assert_allclose(answers[-1][:, :, layer, r], expected, atol=1e-12)


def test_the_table_pools_answers_over_the_last_ring(small, run_window):
    window, values, answers = run_window(11)
    n_of = {"neighbour_purity": small.measure.window // small.train.batch}
    n_unseen = small.measure.unseen_window // small.measure.unseen_per_step
    for i_measure, name in enumerate(ANSWERS):
        n, prefix = n_of.get(name, n_unseen), "" if name in n_of else f"{window_split}/"
        for step in (1, 3, 10):
            sums, counts = answers[max(0, step + 1 - n) : step + 1, i_measure].sum(0).sum(-1)
            for layer, readout in sets_of(window):
                r = small.measure.readouts.index(readout)
                got = values[step][f"window/{readout}/layer{layer}/{prefix}{name}"]
                assert got == pytest.approx(sums[layer, r] / counts[layer, r], abs=1e-12)
    assert n_of["neighbour_purity"] == window.n_pooled == 4


def test_the_best_partition_is_reported_with_its_band(small, small_tasks, run_window):
    window, values, _ = run_window(6)
    truth = small_tasks.labels(window.train.example.numpy())["task"]
    for s, (layer, readout) in enumerate(sets_of(window)):
        of_set = {name: values[-1][f"window/{readout}/layer{layer}/{name}"] for name in
                  ("ari_task", "ari_task_low", "ari_task_high", "inertia_share")}  # fmt: skip
        ari = adjusted_rand_score(truth, window.known[0, s].numpy())
        assert of_set["ari_task"] == pytest.approx(ari, abs=1e-12)
        assert of_set["ari_task_low"] <= of_set["ari_task"] <= of_set["ari_task_high"]
        points = window.train.points[s].double().numpy()
        label = window.known[0, s].numpy()
        within = sum(((points[label == k] - points[label == k].mean(0)) ** 2).sum() for k in np.unique(label))
        total = ((points - points.mean(0)) ** 2).sum()
        assert of_set["inertia_share"] == pytest.approx(within / total, rel=1e-5, abs=1e-9)
    assert any(v["window/instruction_end/layer2/kmeans_is_cold"] == 0 for v in values[1:])
    assert values[0]["window/instruction_end/layer2/kmeans_is_cold"] == 1


def test_the_band_is_over_what_the_last_steps_found(small, small_tasks):
    window = Window(small_tasks, small, small.model.n_layers + 1)
    names = [c.name for c in window.columns]
    found, widened = [], 0
    for step in range(BAND_STEPS + 8):
        advance(window, small, small_tasks, step)
        values = dict(zip(names, window.measure(step)[0].tolist(), strict=True))
        found.append(window.bands[0].clone())  # of this step alone
        last = torch.stack(found[-BAND_STEPS:])
        for s, (layer, readout) in enumerate(sets_of(window)):
            low, high = (values[f"window/{readout}/layer{layer}/ari_task_{end}"] for end in ("low", "high"))
            assert (low, high) == (last[:, 0, s].min(), last[:, 1, s].max())
            assert found[-1][0, s] <= values[f"window/{readout}/layer{layer}/ari_task"] <= found[-1][1, s]
            widened += low < found[-1][0, s]
    assert widened


def test_the_window_is_as_good_as_a_patient_search(small, small_tasks, run_window):
    window, values, _ = run_window(12)
    patient = ops.kmeans(window.train.points, small_tasks.n_tasks, n_init=100, seed=1)
    for s, (layer, readout) in enumerate(sets_of(window)):
        share = values[-1][f"window/{readout}/layer{layer}/inertia_share"]
        points = window.train.points[s].double()
        total = (points - points.mean(0)).square().sum().item()
        assert share * total <= patient.inertia[s].item() * 1.02 + 1e-9


def test_every_set_gets_its_cold_starts_in_turn(small, small_tasks):
    window = Window(small_tasks, small, 3)
    every = small.measure.cold_every
    for s in range(window.known.shape[1]):
        assert sum(window.is_cold(step, s) for step in range(every)) == 1
    n_cold = [sum(window.is_cold(step, s) for s in range(window.known.shape[1])) for step in range(every)]
    assert max(n_cold) <= -(-window.known.shape[1] // every)
    sparse = Window(small_tasks, dataclasses.replace(small, measure_every=5), 3)
    assert any(sparse.is_cold(step, 1) for step in range(0, 5 * every, 5))


@pytest.mark.parametrize("every", [1, 2, 4, 9])
def test_measured_now_and_then(small, run_window, every):
    config = dataclasses.replace(small, measure_every=every)
    window, values, answers = run_window(20, config)
    assert all(np.isfinite(v["window/instruction_end/layer2/ari_task"]) for v in values[1:])
    assert (answers[-1][0, 1].sum(-1) == small.train.batch).all()
    assert ((window.known[0] >= 0).sum(1) == window.train.n_points).all()


def test_too_few_states_are_not_measured(small, small_tasks):
    window = Window(small_tasks, small, 3)
    values, answers = window.measure(0)
    assert values.isnan().all()
    assert answers.isnan().all()


@pytest.mark.parametrize("kind", ["nan", "equal"])
def test_states_that_collapsed(small, small_tasks, run_window, kind):
    """NaN states are in no cluster and ask nobody, equal ones are one cluster; values are defined."""
    window, _, _ = run_window(6)
    window.train.bank[1] = torch.nan if kind == "nan" else 0.5
    window.unseen.bank[1] = torch.nan if kind == "nan" else 0.5
    values, _ = window.measure(6)
    of = dict(zip([c.name for c in window.columns], values.tolist(), strict=True))
    ari = of["window/instruction_end/layer1/ari_task"]
    assert ari == pytest.approx(0, abs=1e-12)
    assert np.isfinite(of["window/instruction_end/layer2/ari_task"])
    advance(window, small, small_tasks, 7)
    window.train.bank[1] = torch.randn_like(window.train.bank[1])
    values, _ = window.measure(7)
    of = dict(zip([c.name for c in window.columns], values.tolist(), strict=True))
    assert of["window/instruction_end/layer1/inertia_share"] < 0.9


def test_resuming_in_between_changes_no_bit(small, small_tasks, run_window):
    window, _, _ = run_window(6)
    other = Window(small_tasks, small, window.n_layers)
    other.load_state({name: tensor.clone() for name, tensor in window.state().items()})
    for step in (6, 7):
        found = []
        for one in (window, other):
            advance(one, small, small_tasks, step)
            found.append(one.measure(step))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


def test_band_by_hand():
    ari = torch.tensor([[0.9, 0.2, 0.5], [0.97, 0.9, 0.1], [0.3, 0.22, 0.6], [0.1, 0.2, 0.0]], dtype=torch.float64)
    inertia = torch.tensor(
        [[100.0, 100.0, 0.0], [100.4, 100.6, 0.0], [100.49, 102.0, 0.0], [200.0, torch.inf, torch.inf]],
        dtype=torch.float64,
    )
    low, high, gap = ari_band(ari, inertia)
    torch.testing.assert_close(low, torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64))
    torch.testing.assert_close(high, torch.tensor([0.97, 0.2, 0.6], dtype=torch.float64))
    torch.testing.assert_close(gap, torch.tensor([0.004, 0.006, 0.0], dtype=torch.float64))
    _, _, alone = ari_band(ari[:1], inertia[:1])
    assert alone.isnan().all()
