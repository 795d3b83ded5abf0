"""measure/probe.py and measure/controls.py: the right examples, and numbers that scikit-learn agrees with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from clmfast.measure.controls import letter_counts, raw_string_control, shuffled_label_control
from clmfast.measure.probe import Probe, make_probe_sets, probe_measures
from clmfast.model import Transformer


@pytest.fixture
def probe(small, small_tasks):
    return Probe(small_tasks, small.measure, small.model.n_layers + 1, small.model.width, seed=1)


@pytest.fixture
def model(small, small_tasks):
    return Transformer(small.model, len(small_tasks.vocabulary), small_tasks.max_length, seed=5)


def test_examples_of_the_probe(small, small_tasks, probe):
    at_instruction, at_prompt = probe.sets
    instructions = at_instruction.train // small_tasks.n_inputs
    assert len(set(instructions)) == len(instructions) == 48  # every one of 4 x 2 x 6 instructions, once
    assert at_instruction.kinds == ("task", "grammar", "instruction")
    n_inputs = small_tasks.n_inputs
    assert len(set(at_prompt.train // n_inputs)) == small.measure.probe_train // n_inputs
    # whole input sets, but for the pairs that were kept from training
    in_training = set(small_tasks.splits["train"])
    expected = {i * n_inputs + j for i in at_prompt.train // n_inputs for j in range(n_inputs)} & in_training
    assert set(at_prompt.train) == expected
    for probe_set in probe.sets:
        assert set(probe_set.train) <= in_training
        for split, examples in probe_set.unseen.items():
            assert set(examples) <= set(small_tasks.splits[split])


@pytest.mark.parametrize("readouts", [("instruction_end", "prompt_end"), ("mean", "prompt_end"), ("mean",)])
def test_states_are_those_of_the_whole_prompts(small, small_tasks, model, readouts):
    """The cheap probe, trees and all, equals running every example by itself, bit for bit."""
    config = dataclasses.replace(small.measure, readouts=readouts)
    probe = Probe(small_tasks, config, small.model.n_layers + 1, small.model.width, seed=1)
    for probe_set, (train, unseen) in zip(probe.sets, probe.states(model), strict=True):
        for examples, states in (
            (probe_set.train, train),
            (probe_set.unseen["unseen_grammar"], unseen["unseen_grammar"]),
        ):
            assert states.shape[1] == len(examples)
            end = "instruction_end" if probe_set.readout == "instruction_end" else "prompt_end"
            for i in range(0, len(examples), 5):
                batch = small_tasks.pack(examples[i : i + 1], end)
                seen = {}
                model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), tap=seen.__setitem__)
                for layer, x in seen.items():
                    expected = x.double().mean(0).float() if probe_set.readout == "mean" else x[-1]
                    assert torch.equal(states[layer, i], expected)


def test_measures_are_those_of_scikit_learn(small, small_tasks, probe, model):
    """Plain kNN at unseen grammars, where no query shares an instruction with a training state, needs no barring."""
    values, states = probe.measure(model)
    named = dict(zip([c.name for c in probe.columns], values.tolist(), strict=True))
    for probe_set, (train, unseen) in zip(probe.sets, states, strict=True):
        truth = probe_set.train_labels["task"].numpy()
        queries, wanted = unseen["unseen_grammar"], probe_set.unseen_labels["unseen_grammar"]["task"].numpy()
        for layer in range(1, 3):  # layer 0 is full of ties, which scikit-learn breaks at will
            classifier = KNeighborsClassifier(1).fit(train[layer].double(), truth)
            one = small_measure_with_k1(small)
            single = probe_measures(probe_set, train, unseen, small_tasks.label_counts(), one, seed=1)
            single_named = dict(zip(column_names(probe, probe_set), single.tolist(), strict=True))
            voted = classifier.predict(queries[layer].double())
            at = f"probe/{probe_set.readout}/layer{layer}"
            assert single_named[f"{at}/unseen_grammar/knn_accuracy"] == pytest.approx((voted == wanted).mean())
            expected_f1 = f1_score(wanted, voted, average="macro")
            assert single_named[f"{at}/unseen_grammar/knn_macro_f1"] == pytest.approx(expected_f1)
            # With an unseen grammar nothing is barred by grammar either.
            assert (
                named[f"{at}/unseen_grammar/cross_grammar_knn_accuracy"] == named[f"{at}/unseen_grammar/knn_accuracy"]
            )
            assert named[f"{at}/n_points"] == len(truth)


def small_measure_with_k1(small):
    return dataclasses.replace(small.measure, k=1)


def column_names(probe, probe_set):
    return [c.name for c in probe.columns if c.readout == probe_set.readout]


def perfect_states(probe_set, tasks, spread):
    """States in which the task is all there is: one point per task, plus noise."""
    generator = torch.Generator().manual_seed(0)
    corner = 10 * torch.eye(tasks.n_tasks)

    def of(labels):
        return (corner[labels["task"]] + spread * torch.randn(len(labels["task"]), tasks.n_tasks, generator=generator))[
            None
        ]

    return of(probe_set.train_labels), {s: of(labels) for s, labels in probe_set.unseen_labels.items()}


def test_perfect_clusters_score_one_and_shuffled_labels_score_chance(small, small_tasks):
    probe_set = make_probe_sets(small_tasks, small.measure, seed=1)[0]
    points, queries = perfect_states(probe_set, small_tasks, 0.1)
    values = probe_measures(probe_set, points, queries, small_tasks.label_counts(), small.measure, seed=0)
    names = [c.name for c in Probe(small_tasks, small.measure, 1, 4, seed=1).columns if c.readout == probe_set.readout]
    named = {name.split("layer0/")[1]: value for name, value in zip(names, values.tolist(), strict=True)}
    for name in ("ari_task", "nmi_task", "v_measure_task", "purity_task", "neighbour_purity"):
        assert named[name] == pytest.approx(1)
    for split in queries:
        names = ["knn_accuracy", "knn_macro_f1", "cross_grammar_knn_accuracy", "ari_task_assigned"]
        if len(probe_set.unseen_labels[split]["task"].unique()) == small_tasks.n_tasks:
            names.append("ari_task_refit")  # k-means finds as many clusters as there are tasks, so all must be there
        assert split != "unseen_instruction" or "ari_task_refit" in names
        for name in names:
            assert named[f"{split}/{name}"] == pytest.approx(1), (split, name)
    assert named["silhouette_task"] > 0.9
    assert np.isnan(named["ari_input"])  # nothing before the input can have this label
    expected = adjusted_rand_score(probe_set.train_labels["grammar"], probe_set.train_labels["task"])
    assert named["ari_grammar"] == pytest.approx(expected)

    shuffled = shuffled_label_control(probe_set, points, queries, small_tasks.n_tasks, small.measure, seed=0)
    assert abs(shuffled["ari_task"].mean()) < 0.1
    assert shuffled["unseen_instruction/knn_accuracy"].mean() < 0.6
    assert shuffled["neighbour_purity"].shape == (small.measure.n_shuffles, 1)


def test_letters(small, small_tasks):
    examples = small_tasks.splits["train"][:5]
    for with_input in (False, True):
        counts = letter_counts(small_tasks, examples, with_input)[0]
        for row, example in zip(counts, examples, strict=True):
            text = small_tasks.instruction_text(example // small_tasks.n_inputs)
            if with_input:
                text += "".join(
                    small_tasks.vocabulary[t] for t in small_tasks.input_tokens[example % small_tasks.n_inputs]
                )
            for token, letter in enumerate(small_tasks.vocabulary[: small_tasks.first_output]):
                assert row[token] == text.count(letter)
    control = raw_string_control(small_tasks, make_probe_sets(small_tasks, small.measure, 0)[0], small.measure, 0)
    assert 0 <= control["unseen_instruction/knn_accuracy"] <= 1
    assert control["n_points"] == 48
