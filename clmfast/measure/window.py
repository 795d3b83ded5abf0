"""The window estimator: measures what the last training batches produced anyway, at every step.

A ring holds the states of the last training batches. Partitions and separation are measured on all of them. Neighbours
are asked for once, when states arrive: those of this step's batch, and of a few unseen examples that ride along, among
the states in the ring. Answers are sums and counts, recorded for every task, so that they can be pooled over any steps;
the table holds them pooled over the last ring. The states in a ring come from the model as it was up to
`window / batch` steps ago: that is the price of measuring every step without a further pass.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clmfast import ops
from clmfast.capture import Recorder, from_host
from clmfast.config import LABEL_KINDS, SEARCH_END_ITERATIONS, RunConfig
from clmfast.data.tasks import TaskSet
from clmfast.measure.catalogue import BAND_STEPS, Column
from clmfast.measure.partition import PARTITION_MEASURES, as_partitions, partition_measures

MEASURES_OF_TRAINING = (*PARTITION_MEASURES, "kmeans_is_cold", "neighbour_purity")
MEASURES_OF_UNSEEN = ("knn_accuracy", "cross_grammar_knn_accuracy")
ANSWERS = ("neighbour_purity", *MEASURES_OF_UNSEEN)  # what neighbours say, as sums and counts
SPLIT = "unseen_instruction"


class Window:
    """`train` and `unseen` are the taps of the training batch and of what rides along; after both have advanced,
    `measure` reads them."""

    def __init__(self, tasks: TaskSet, config: RunConfig, n_layers: int) -> None:
        measure, device = config.measure, torch.device(config.device)
        self.tasks, self.config, self.seed = tasks, measure, config.seed
        self.n_layers = n_layers
        width = config.model.width
        self.train = Recorder(n_layers, measure.readouts, measure.window, width, device)
        self.unseen = Recorder(n_layers, measure.readouts, measure.unseen_per_step, width, device)
        self.batch, self.every = config.train.batch, config.measure_every
        # Measured steps that a ring lasts.
        self.n_pooled = max(1, measure.window // (self.batch * self.every))
        self.n_pooled_unseen = max(1, measure.unseen_window // (measure.unseen_per_step * self.every))
        n_sets = n_layers * len(measure.readouts)
        # On a CPU several partitions are kept from step to step, on a GPU the best: their labels of the states in the
        # ring, -1 where a state is new.
        self.has_moves = device.type == "cpu"
        self.n_known = measure.population if self.has_moves else 1
        self.is_first = True
        self.known = torch.full((self.n_known, n_sets, measure.window), -1, dtype=torch.int64, device=device)
        self.memory = ops.search_memory(n_sets, measure.window, width, tasks.n_tasks) if self.has_moves else None
        n_steps = max(self.n_pooled, self.n_pooled_unseen)
        self.answers = torch.zeros(n_steps, len(ANSWERS), 2, n_sets, tasks.n_tasks, dtype=torch.float64, device=device)
        # Lowest and highest ARI of the good partitions of the last steps.
        nothing = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64, device=device)
        self.bands = nothing[:, None].repeat(BAND_STEPS, 1, n_sets)
        self.columns = [  # what `measure` returns, in its order
            Column("window", name, readout, layer, split)
            for measures, split in ((MEASURES_OF_TRAINING, ""), (MEASURES_OF_UNSEEN, SPLIT))
            for name in measures
            for layer in range(n_layers)
            for readout in measure.readouts
        ]

    @property
    def answers_shape(self) -> tuple[int, ...]:
        """Of what neighbours say at a step: measure, (sum, count), layer, readout, task."""
        return (len(ANSWERS), 2, self.n_layers, len(self.config.readouts), self.tasks.n_tasks)

    def is_cold(self, step: int, i_set: int) -> bool:
        """Does a partition of a set begin with k-means++ at this step? Sets take turns, so that steps cost the same."""
        n_sets, every = self.known.shape[1], self.config.cold_every
        return (step // self.every + i_set * every // n_sets) % every == 0

    def measure(self, step: int, labels_of: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(values of `columns` [n_columns] float64, answers of this step's neighbours [answers_shape] float64).

        labels_of: labels of the examples of the training ring and of what rides along, where the caller keeps them on
        the device.
        All NaN while the ring holds no more than k states or fewer than there are clusters.
        """
        n = self.train.n_filled
        if n <= self.config.k or n < self.tasks.n_tasks:
            nothing = torch.tensor(torch.nan, dtype=torch.float64, device=self.known.device)
            return nothing.expand(len(self.columns)), nothing.expand(self.answers_shape)
        if labels_of is None:
            train, unseen = (
                from_host(self.labels_of(ring.example.numpy()), self.train.bank.device)
                for ring in (self.train, self.unseen)
            )
            labels_of = train, unseen
        labels, of_unseen = (dict(zip(LABEL_KINDS, together, strict=True)) for together in labels_of)
        labels = {kind: label[:n] for kind, label in labels.items()}
        points = self.train.points[:, :n]
        answers = self._ask_neighbours(points, labels, of_unseen)
        found, is_cold = self._partitions(points, step)

        self.answers.copy_(self.answers.roll(1, 0))  # where it is: a graph that is replayed reads it there
        self.answers[0] = answers
        of_ring, of_unseen_ring = self.answers[: self.n_pooled, :1], self.answers[: self.n_pooled_unseen, 1:]
        pooled = torch.cat([answered.sum(0) for answered in (of_ring, of_unseen_ring)]).sum(-1)
        purity, *of_queries = (pooled[:, 0] / pooled[:, 1]).unbind(0)
        measured = partition_measures(points, found, labels, self.tasks.label_counts())
        self._widen_band(measured)
        values = [
            *measured,
            is_cold.double(),
            purity,
            *of_queries,
        ]
        return torch.cat(values), answers.view(self.answers_shape)

    def _widen_band(self, measured: Tensor) -> None:
        """A step finds few of the partitions that are as good as its best, and the next steps others of nearly the same
        states: the band is over all that the last steps found."""
        ends = [PARTITION_MEASURES.index(f"ari_task_{end}") for end in ("low", "high")]
        self.bands.copy_(self.bands.roll(1, 0))
        self.bands[0] = measured[ends]
        measured[ends[0]], measured[ends[1]] = self.bands[:, 0].amin(0), self.bands[:, 1].amax(0)

    def labels_of(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[LABEL_KINDS, N] labels of examples [N]; of a row that is empty still (-1), anything."""
        labels = self.tasks.labels(examples)
        return np.stack([labels[kind] for kind in LABEL_KINDS])

    def _written(self, n: int) -> Tensor:
        """The rows of the training ring that were written last [n]."""
        device = self.train.slot.device
        return (self.train.slot - n + torch.arange(n, device=device)) % self.train.n_points

    def _ask_neighbours(self, points: Tensor, labels: dict[str, Tensor], of_unseen: dict[str, Tensor]) -> Tensor:
        """[ANSWERS, (sum, count), S, n_tasks] of the batch that arrived and of what rode along."""
        n_tasks, arrived = self.tasks.n_tasks, self._written(self.batch)
        queries = torch.cat([points[:, arrived], self.unseen.points], 1)
        of_queries = {kind: torch.cat([labels[kind][arrived], of_unseen[kind]]) for kind in ("instruction", "task")}
        near, across = ops.knn(
            points,
            self.config.k,
            queries,
            [(of_queries["instruction"], labels["instruction"]), (of_unseen["grammar"], labels["grammar"])],
        )
        task, task_unseen = labels["task"], of_unseen["task"]
        of_batch = near.index[:, : self.batch].contiguous()
        shares = ops.label_shares(of_batch, task, of_queries["task"][: self.batch], n_tasks)
        is_task = (task_unseen[:, None] == torch.arange(n_tasks, device=task.device)).double()
        rights = [
            (ops.majority_vote(index.contiguous(), task) == task_unseen).double() @ is_task
            for index in (near.index[:, self.batch :], across.index)
        ]
        counts = is_task.sum(0).expand_as(rights[0])
        return torch.stack([shares, *(torch.stack([right, counts]) for right in rights)])

    def _partitions(self, points: Tensor, step: int) -> tuple[ops.Partitions, Tensor]:
        """(partitions of lowest inertia, is the best from a cold start [S]): those of the last step go on, and now and
        then one from k-means++ competes with them."""
        config, n_tasks, n = self.config, self.tasks.n_tasks, points.shape[1]
        n_new = min(self.batch * self.every, self.train.n_points)
        self.known[:, :, self._written(n_new)] = -1
        is_first = self.is_first or n_new == self.train.n_points  # nothing is known of any state
        self.is_first = False
        if not self.has_moves:
            found, is_cold = self._warm(points, is_first or self.is_cold(step, 0))
        else:
            n_known = 0 if is_first else self.n_known
            cold = [self.n_known if is_first else int(self.is_cold(step, s)) for s in range(len(points))]
            n_cold = torch.tensor(cold, device="cpu")
            found = ops.kmeans_search(
                points,
                n_tasks,
                known=None if is_first else self.known[:, :, :n],
                n_cold=n_cold,
                keep=self.n_known + 1,
                moves=config.moves,
                renewals=config.renewals,
                max_iter=SEARCH_END_ITERATIONS,
                seed=(self.seed + step) % 2**63,
                memory=self.memory if n == self.train.n_points else None,
            )
            is_cold = (found.origin >= n_known) & (found.origin < n_known + n_cold)
        self.known[:, :, :n] = found.label[: self.n_known]
        return found, is_cold

    def _warm(self, points: Tensor, has_cold: bool) -> tuple[ops.Partitions, Tensor]:
        """Without moves, which a GPU has not: Lloyd's algorithm goes on from the last partition; every `cold_every`
        measured steps k-means++ competes with that in all sets, so that there are but two kinds of step."""
        config, n_tasks, known = self.config, self.tasks.n_tasks, self.known[0, :, : points.shape[1]]
        is_in = (known[:, None] == torch.arange(n_tasks, device=known.device)[:, None]).float()
        centroid = (is_in @ points) / is_in.sum(2, keepdim=True)  # NaN for a cluster that has lost all: at the mean
        fit = ops.kmeans(points, n_tasks, init=centroid, max_iter=config.warm_iter)
        is_cold = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        if has_cold:
            cold = ops.kmeans(points, n_tasks, max_iter=config.max_iter, seed=self.seed)
            is_cold = cold.inertia < fit.inertia
            fit = ops.KMeans(
                *(torch.where(is_cold.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(cold, fit, strict=True))
            )
        return as_partitions(fit), is_cold

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return {
            **{f"train.{name}": tensor for name, tensor in self.train.state().items()},
            **{f"unseen.{name}": tensor for name, tensor in self.unseen.state().items()},
            "known": self.known,
            "answers": self.answers,
            "bands": self.bands,
            **(self.memory._asdict() if self.memory else {}),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, ring in (("train", self.train), ("unseen", self.unseen)):
            ring.load_state({key: state[f"{name}.{key}"] for key in ring.state()})
        self.known.copy_(state["known"])
        self.is_first = bool((self.known < 0).all())
        self.answers.copy_(state["answers"])
        self.bands.copy_(state["bands"])
        for name, tensor in self.memory._asdict().items() if self.memory else ():
            tensor.copy_(state[name])
