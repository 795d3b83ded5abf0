"""measure/window.py: what it reports is what a full computation over the same rings gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from clmfast import ops
from clmfast.capture import spans
from clmfast.data.tasks import draw
from clmfast.measure.neighbours import knn_accuracy, majority_vote, neighbour_purity
from clmfast.measure.window import Window
from clmfast.model import Transformer


@pytest.fixture
def run_window(small, small_tasks):
    """steps -> (window, values by column name of each step, models' states are random but different every step)."""

    def run(n_steps):
        window = Window(small_tasks, small.measure, small.model.n_layers + 1, small.model.width, seed=3)
        values = []
        for step in range(n_steps):
            model = Transformer(small.model, len(small_tasks.vocabulary), small_tasks.max_length, seed=step)
            for ring, split, n in ((window.train, "train", 8), (window.unseen, "unseen_instruction", 2)):
                examples = draw(small_tasks.splits[split], n, 0, step, "train")
                batch = small_tasks.pack(examples)
                ring.aim(*spans(batch, ring.readouts))
                model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), tap=ring)
                ring.advance(torch.from_numpy(examples))
            measured, per_task = window.measure(step)
            values.append(dict(zip([c.name for c in window.columns], measured.tolist(), strict=True)))
        return window, values, per_task

    return run


def test_equals_a_full_computation(small, small_tasks, run_window):
    window, values, per_task = run_window(7)  # the ring of 32 has gone round
    labels = small_tasks.labels(window.train.example.numpy())
    unseen = small_tasks.labels(window.unseen.example[: window.unseen.n_filled].numpy())
    task, unseen_task = torch.from_numpy(labels["task"]), torch.from_numpy(unseen["task"])
    points, queries = window.train.points, window.unseen.points[:, : window.unseen.n_filled]
    k = small.measure.k

    def neighbours(kind, of=None):
        groups = torch.from_numpy(labels[kind])
        if of is None:
            return ops.knn(points, k, barred=(groups, groups)).index
        return ops.knn(points, k, queries, (torch.from_numpy(unseen[kind]), groups)).index

    expected = {
        "neighbour_purity": neighbour_purity(neighbours("instruction"), task, task),
        "unseen_instruction/knn_accuracy": knn_accuracy(
            majority_vote(neighbours("instruction", "unseen"), task), unseen_task
        ),
        "unseen_instruction/cross_grammar_knn_accuracy": knn_accuracy(
            majority_vote(neighbours("grammar", "unseen"), task), unseen_task
        ),
    }
    layers_and_readouts = [(l, r) for l in range(window.n_layers) for r in small.measure.readouts]
    for name, by_set in expected.items():
        for s, (layer, readout) in enumerate(layers_and_readouts):
            assert values[-1][f"window/{readout}/layer{layer}/{name}"] == by_set[s].item(), (name, layer, readout)
    purities = [values[-1][f"window/{readout}/layer{layer}/neighbour_purity"] for layer, readout in layers_and_readouts]
    weights = np.bincount(labels["task"], minlength=small_tasks.n_tasks) / len(labels["task"])
    np.testing.assert_allclose(np.nansum(per_task.view(-1, small_tasks.n_tasks).numpy() * weights, 1), purities)


def test_kmeans_is_cold_first_and_warm_from_the_last_centroids_then(small, small_tasks, run_window):
    window, values, _ = run_window(6)
    name = "window/instruction_end/layer2/kmeans_is_cold"
    is_cold = [v[name] for v in values]
    assert is_cold[0] == 1
    assert is_cold[1] == is_cold[2] == is_cold[3] == is_cold[5] == 0  # 4 is a step at which the cold start competes
    fit = ops.kmeans(window.train.points, small_tasks.n_tasks, init=window.centroid, max_iter=1)
    task = small_tasks.labels(window.train.example.numpy())["task"]
    before, _, _ = run_window(5)
    warm = ops.kmeans(window.train.points, small_tasks.n_tasks, init=before.centroid, max_iter=small.measure.warm_iter)
    assert torch.equal(warm.centroid, window.centroid)
    for s, (layer, readout) in enumerate((l, r) for l in range(3) for r in small.measure.readouts):
        expected = adjusted_rand_score(task, warm.label[s].numpy())
        assert values[-1][f"window/{readout}/layer{layer}/ari_task"] == pytest.approx(expected, abs=1e-12)
    assert fit.inertia.shape == (6,)


def test_too_few_states_are_not_measured(small, small_tasks):
    window = Window(small_tasks, small.measure, 3, small.model.width, seed=0)
    values, per_task = window.measure(0)
    assert values.isnan().all()
    assert per_task.isnan().all()


def test_resuming_in_between_changes_no_bit(small, small_tasks, run_window):
    window, _, _ = run_window(6)
    other = Window(small_tasks, small.measure, window.n_layers, small.model.width, seed=3)
    other.load_state({name: tensor.clone() for name, tensor in window.state().items()})
    model = Transformer(small.model, len(small_tasks.vocabulary), small_tasks.max_length, seed=99)
    for one in (window, other):
        for ring, split, n in ((one.train, "train", 8), (one.unseen, "unseen_instruction", 2)):
            examples = draw(small_tasks.splits[split], n, 0, 77, "train")
            batch = small_tasks.pack(examples)
            ring.aim(*spans(batch, ring.readouts))
            model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), tap=ring)
            ring.advance(torch.from_numpy(examples))
    (a, a_task), (b, b_task) = window.measure(6), other.measure(6)
    assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))
    assert torch.equal(a_task.nan_to_num(-9), b_task.nan_to_num(-9))
