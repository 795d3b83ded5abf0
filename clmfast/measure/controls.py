"""How much of every number is trivial: the same measures on letters alone, and with shuffled labels.

The third control, the untrained model, needs nothing of its own: it is the probe before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clmfast import ops
from clmfast.config import MeasureConfig
from clmfast.data.tasks import Ids, TaskSet
from clmfast.measure.neighbours import knn_accuracy, majority_vote, neighbour_purity
from clmfast.measure.partition import find_partitions, partition_scores_of
from clmfast.measure.probe import ProbeSet, columns_of, probe_measures


def letter_counts(tasks: TaskSet, examples: Ids, with_input: bool) -> Tensor:
    """Bag of letters [1, N, letters] float32: how often each letter occurs in the instruction (and the input)."""
    n_letters = tasks.first_output
    counts = torch.zeros(1, len(examples), n_letters, dtype=torch.float32, device="cpu")
    labels = tasks.labels(examples)
    for i, (instruction, i_input) in enumerate(zip(labels["instruction"], labels["input"], strict=True)):
        letters = tasks.letters[tasks.offset[instruction] : tasks.offset[instruction + 1]]
        if with_input:
            letters = np.concatenate([letters, tasks.input_tokens[i_input]])
        counts[0, i] = torch.from_numpy(np.bincount(letters, minlength=n_letters))
    return counts


def raw_string_control(tasks: TaskSet, probe_set: ProbeSet, config: MeasureConfig, seed: int) -> dict[str, float]:
    """Every measure of the probe on letter counts instead of hidden states: what the surface form gives away."""
    with_input = probe_set.readout != "instruction_end"
    queries = {split: letter_counts(tasks, ids, with_input) for split, ids in probe_set.unseen.items()}
    values = probe_measures(
        probe_set, letter_counts(tasks, probe_set.train, with_input), queries, tasks.label_counts(), config, seed
    )
    names = [f"{c.split}/{c.measure}".lstrip("/") for c in columns_of([probe_set], 1)]
    return dict(zip(names, values.tolist(), strict=True))


def shuffled_label_control(
    probe_set: ProbeSet,
    points: Tensor,
    queries: Mapping[str, Tensor],
    n_tasks: int,
    config: MeasureConfig,
    seed: int,
) -> dict[str, Tensor]:
    """What the same states give when task labels of the training states are permuted: [n_shuffles, L] by measure.

    Neighbours and clusters stay as they are; only the labels that they are compared with are shuffled.
    """
    truth, k = probe_set.train_labels, config.k
    label = find_partitions(points, n_tasks, config, seed).label[0]
    near = ops.knn(points, k, barred=(truth["instruction"], truth["instruction"])).index
    of_split = {}
    for split, query in queries.items():
        of_query = probe_set.unseen_labels[split]
        views = [(of_query[kind], truth[kind]) for kind in ("instruction", "grammar")]
        of_split[split] = [near.index for near in ops.knn(points, k, query, views)]
    generator = torch.Generator("cpu").manual_seed(seed)
    rounds: dict[str, list[Tensor]] = {}
    for _ in range(config.n_shuffles):
        task = truth["task"][torch.randperm(len(truth["task"]), generator=generator, device="cpu")]
        one = {
            "ari_task": partition_scores_of(task, n_tasks, label, n_tasks).ari,
            "neighbour_purity": neighbour_purity(near, task, task),
        }
        for split, indices in of_split.items():
            for measure, index in zip(("knn_accuracy", "cross_grammar_knn_accuracy"), indices, strict=True):
                vote = majority_vote(index, task)
                one[f"{split}/{measure}"] = knn_accuracy(vote, probe_set.unseen_labels[split]["task"])
        for name, values in one.items():
            rounds.setdefault(name, []).append(values)
    return {name: torch.stack(values) for name, values in rounds.items()}
