"""The probe estimator: a fixed set of training and unseen examples, run through the model as it is now.

Exact for its step, at the cost of a forward pass. At `instruction_end` all examples of an instruction have one state,
so a probe holds every chosen instruction once; at the other readouts it holds whole input sets of chosen instructions.
A query's own instruction is always barred from its neighbours.

`examples_of` and `probe_measures` need no model: the controls (letters, an untrained model, shuffled labels) go
through the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clmfast import ops
from clmfast.capture import Recorder, from_host, spans
from clmfast.config import LABEL_KINDS, ConfigError, MeasureConfig
from clmfast.data.tasks import Batch, Ids, PromptTree, TaskSet, choose
from clmfast.measure.catalogue import Column, layer_columns
from clmfast.measure.neighbours import knn_accuracy, macro_f1, majority_vote, purities
from clmfast.measure.partition import PARTITION_MEASURES, find_partitions, partition_measures, partition_scores_of
from clmfast.model import Transformer

MEASURES_OF_TRAINING = (*PARTITION_MEASURES, "neighbour_purity", "n_points")
MEASURES_OF_UNSEEN = (
    "ari_task_assigned",
    "ari_task_refit",
    "knn_accuracy",
    "knn_macro_f1",
    "cross_grammar_knn_accuracy",
    "n_queries",
)
PASS_SIZE = 256  # instructions of a forward pass: few enough for their activations to stay in the cache


@dataclass(frozen=True)
class ProbeSet:
    """Examples of one readout: `train` [N] and, by split, `unseen` [Q]; labels of each as tensors by kind."""

    readout: str
    train: Ids
    unseen: Mapping[str, Ids]
    train_labels: Mapping[str, Tensor]
    unseen_labels: Mapping[str, Mapping[str, Tensor]]

    def to(self, device: torch.device | str) -> ProbeSet:
        """The same with its labels on the device."""

        def moved(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {kind: label.to(device) for kind, label in labels.items()}

        unseen_labels = {split: moved(labels) for split, labels in self.unseen_labels.items()}
        return replace(self, train_labels=moved(self.train_labels), unseen_labels=unseen_labels)

    @property
    def examples(self) -> Ids:
        """All of them: train, then each split of unseen."""
        return np.concatenate([self.train, *self.unseen.values()])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Label kinds that a state of this readout can carry: at instruction_end no input has been read."""
        return LABEL_KINDS[:3] if self.readout == "instruction_end" else LABEL_KINDS


def examples_of(tasks: TaskSet, split: str, readout: str, n: int, seed: int) -> Ids:
    """At most n examples of a split for a probe of `readout`; see the head of this file."""
    instructions = tasks.instructions(split)
    if readout == "instruction_end":
        examples = tasks.splits[split]
        first = np.searchsorted(examples, choose(instructions, n, seed, "probe") * tasks.n_inputs)
        return examples[first]  # the instruction's first example in the split; which one makes no difference
    chosen = choose(instructions, max(1, n // tasks.n_inputs), seed, "probe")
    examples = tasks.splits[split]
    return examples[np.isin(examples // tasks.n_inputs, chosen)]


def make_probe_sets(tasks: TaskSet, config: MeasureConfig, seed: int) -> list[ProbeSet]:
    """One ProbeSet for each readout; ConfigError where one has too few states to be measured."""

    def labels(examples: Ids) -> dict[str, Tensor]:
        return {kind: torch.from_numpy(label) for kind, label in tasks.labels(examples).items()}

    sets = []
    for readout in config.readouts:
        train = examples_of(tasks, "train", readout, config.probe_train, seed)
        unseen = {s: examples_of(tasks, s, readout, config.probe_unseen, seed) for s in config.probe_splits}
        least = max(tasks.n_tasks, config.k + 1)  # for as many clusters as tasks, and for k neighbours
        if len(train) < least:
            raise ConfigError(
                f"measure.probe_train and the task must give a probe of {readout} at least {least} training states "
                f"(task.n_tasks, and more than measure.k), got {len(train)}"
            )
        sets.append(
            ProbeSet(readout, train, unseen, labels(train), {split: labels(ids) for split, ids in unseen.items()})
        )
    return sets


def columns_of(sets: list[ProbeSet], n_layers: int) -> list[Column]:
    """Names of what `probe_measures` returns for each set, concatenated."""
    return [
        column
        for probe_set in sets
        for measures, split in (
            (MEASURES_OF_TRAINING, ""),
            *((MEASURES_OF_UNSEEN, split) for split in probe_set.unseen),
        )
        for column in layer_columns("probe", probe_set.readout, n_layers, measures, split)
    ]


def probe_measures(
    probe_set: ProbeSet,
    points: Tensor,
    queries: Mapping[str, Tensor],
    n_labels: Mapping[str, int],
    config: MeasureConfig,
    seed: int,
) -> Tensor:
    """[n_columns] float64 in the order of `columns_of`, of training states [S, N, D] and unseen states [S, Q, D] by
    split; S is usually the layers."""
    truth, n_tasks, k = probe_set.train_labels, n_labels["task"], config.k
    fit = find_partitions(points, n_tasks, config, seed)
    near = ops.knn(points, k, barred=(truth["instruction"], truth["instruction"]))

    def everywhere(value: float) -> Tensor:
        return torch.full((len(points),), value, dtype=torch.float64, device=points.device)

    values = [
        *partition_measures(points, fit, truth, n_labels, probe_set.kinds),
        purities(near.index, truth["task"], truth["task"], n_tasks)[0],  # neighbour_purity asks for the largest task
        everywhere(points.shape[1]),
    ]
    for split, query in queries.items():
        of_query = probe_set.unseen_labels[split]
        assigned = ops.knn(fit.centroid, 1, query.float()).index[..., 0]
        ari_assigned = partition_scores_of(of_query["task"], n_tasks, assigned, n_tasks).ari
        ari_refit = everywhere(torch.nan)
        if query.shape[1] >= n_tasks:
            refit = find_partitions(query, n_tasks, config, seed)
            ari_refit = partition_scores_of(of_query["task"], n_tasks, refit.label[0], n_tasks).ari
        views = [(of_query[kind], truth[kind]) for kind in ("instruction", "grammar")]
        voted, voted_across = (majority_vote(near.index, truth["task"]) for near in ops.knn(points, k, query, views))
        values += [
            ari_assigned,
            ari_refit,
            knn_accuracy(voted, of_query["task"]),
            macro_f1(voted, of_query["task"], n_tasks),
            knn_accuracy(voted_across, of_query["task"]),
            everywhere(query.shape[1]),
        ]
    return torch.cat(values)


@dataclass(frozen=True)
class Readout:
    """What a forward pass gives to one probe set: examples [B] and their spans, start and stop [1, B] rows."""

    i_set: int
    examples: Ids
    start: Tensor
    stop: Tensor

    def to(self, device: torch.device | str) -> Readout:
        """The same with its spans on the device."""
        return replace(self, start=self.start.to(device), stop=self.stop.to(device))


@dataclass(frozen=True)
class Pass:
    """One forward pass of a probe: arguments of Transformer.states, by name, and what it gives."""

    inputs: Mapping[str, Any]
    readouts: tuple[Readout, ...]

    def to(self, device: torch.device | str) -> Pass:
        """The same on the device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Pass(inputs, tuple(readout.to(device) for readout in self.readouts))


def passes_of(tasks: TaskSet, sets: list[ProbeSet], device_type: str = "cpu") -> list[Pass]:
    """The passes that give every state of the sets, an instruction once, whatever reads it and however many inputs
    follow it. On a CPU the model sees to that, and computes once whatever sequences begin with; elsewhere prompts are
    run as trees. Only a mean needs its sequences whole."""
    ends = [i for i, s in enumerate(sets) if s.readout != "mean"]
    passes = []
    if ends:
        instructions = np.unique(np.concatenate([sets[i].examples for i in ends]) // tasks.n_inputs)
        # In alphabetical order neighbours begin alike.
        parts = _parts(instructions[np.argsort([tasks.instruction_text(i) for i in instructions], kind="stable")])
        passes += [_ends_pass(tasks, sets, ends, np.sort(stems), device_type != "cpu") for stems in parts]
    for i in set(range(len(sets))) - set(ends):
        for examples in _parts(sets[i].examples):
            batch = tasks.pack(examples)
            passes.append(Pass(_inputs(batch), (Readout(i, examples, *spans(batch, ["mean"])),)))
    return passes


def _inputs(batch: Batch | PromptTree) -> dict[str, Tensor]:
    has_prefix = isinstance(batch, PromptTree) and (batch.prefix >= 0).any()
    names = ("tokens", "offset", "position", *(("prefix",) if has_prefix else ()))
    return {name: torch.from_numpy(getattr(batch, name)) for name in names}


def _parts(ids: Ids) -> list[Ids]:
    return np.array_split(ids, -(-len(ids) // PASS_SIZE))


def _ends_pass(tasks: TaskSet, sets: list[ProbeSet], ends: list[int], stems: Ids, is_tree: bool) -> Pass:
    """Everything that the sets want of the instructions `stems`."""
    examples = {i: sets[i].examples[np.isin(sets[i].examples // tasks.n_inputs, stems)] for i in ends}
    leaves = [examples[i] for i in ends if sets[i].readout == "prompt_end"]
    tree = tasks.pack_tree(stems, leaves[0] if leaves else stems[:0], is_tree)
    readouts = []
    for i in ends:
        rows = tree.prompt_end
        if sets[i].readout == "instruction_end":
            rows = tree.instruction_end[np.searchsorted(stems, examples[i] // tasks.n_inputs)]
        start = torch.from_numpy(rows[None])
        readouts.append(Readout(i, examples[i], start, start + 1))
    kept = torch.cat([r.start[0] for r in readouts]).unique()
    return Pass({**_inputs(tree), "kept": kept}, tuple(readouts))


class Probe:
    """Runs the probe sets through a model and measures them."""

    def __init__(
        self, tasks: TaskSet, config: MeasureConfig, n_layers: int, width: int, seed: int, device: str = "cpu"
    ) -> None:
        self.tasks, self.config, self.seed = tasks, config, seed
        self.device = torch.device(device)
        self.sets = make_probe_sets(tasks, config, seed)
        self._on_device = [probe_set.to(self.device) for probe_set in self.sets]
        self.columns = columns_of(self.sets, n_layers)
        self.passes = [forward_pass.to(self.device) for forward_pass in passes_of(tasks, self.sets, self.device.type)]
        self.recorders = [Recorder(n_layers, (s.readout,), len(s.examples), width, device) for s in self.sets]
        # Where in its recorder each example of a set is, as the passes have their own order.
        self.place = []
        for i, probe_set in enumerate(self.sets):
            order = np.concatenate([r.examples for p in self.passes for r in p.readouts if r.i_set == i])
            sorter = np.argsort(order)
            place = sorter[np.searchsorted(order, probe_set.examples, sorter=sorter)]
            self.place.append(from_host(place, self.device))

    @torch.inference_mode()
    def states(self, model: Transformer) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """For each set (training states [L, N, D], unseen states [L, Q, D] by split)."""
        for forward_pass in self.passes:
            self._run(model, forward_pass)
        found = []
        for probe_set, recorder, place in zip(self.sets, self.recorders, self.place, strict=True):
            sizes = [len(probe_set.train), *(len(unseen) for unseen in probe_set.unseen.values())]
            train, *unseen = recorder.points[:, place].split(sizes, dim=1)
            found.append((train, dict(zip(probe_set.unseen, unseen, strict=True))))
        return found

    def _run(self, model: Transformer, forward_pass: Pass) -> None:
        readouts = forward_pass.readouts
        recorders = [self.recorders[r.i_set] for r in readouts]
        for recorder, readout in zip(recorders, readouts, strict=True):
            recorder.aim(readout.start, readout.stop, forward_pass.inputs.get("kept"))

        def tap(layer: int, x: Tensor) -> None:
            for recorder in recorders:
                recorder(layer, x)

        model.states(**forward_pass.inputs, tap=tap)
        for recorder, readout in zip(recorders, readouts, strict=True):
            recorder.advance(torch.from_numpy(readout.examples))

    def measure(self, model: Transformer) -> tuple[Tensor, list[tuple[Tensor, dict[str, Tensor]]]]:
        """(values of `columns` [n_columns] float64, the states that they were measured on)."""
        states = self.states(model)
        values = [
            probe_measures(s, train, unseen, self.tasks.label_counts(), self.config, self.seed)
            for s, (train, unseen) in zip(self._on_device, states, strict=True)
        ]
        return torch.cat(values), states
