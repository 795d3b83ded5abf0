"""The window estimator: measures what the last training batches produced anyway, at every step.

Two rings of states: of the training batches, whose forward pass happens in any case, and of a few unseen examples that
ride along. The states in a ring come from the model as it was up to `window / batch`
steps ago: that is the price of measuring every step without a further pass.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clmfast import ops
from clmfast.capture import Recorder, from_host
from clmfast.config import LABEL_KINDS, MeasureConfig
from clmfast.data.tasks import TaskSet
from clmfast.measure.catalogue import Column
from clmfast.measure.neighbours import knn_accuracy, purities
from clmfast.measure.partition import PARTITION_MEASURES, partition_measures
from clmfast.measure.ring_neighbours import RingNeighbours
from clmfast.ops.ring import Grid, Ring, empty_grid

MEASURES_OF_TRAINING = (*PARTITION_MEASURES, "kmeans_is_cold", "neighbour_purity")
MEASURES_OF_UNSEEN = ("knn_accuracy", "cross_grammar_knn_accuracy")
SPLIT = "unseen_instruction"


class Window:
    """`train` and `unseen` are taps; after both have seen their states and advanced, `measure` reads them."""

    def __init__(
        self, tasks: TaskSet, config: MeasureConfig, n_layers: int, width: int, seed: int, device: str = "cpu"
    ) -> None:
        self.tasks, self.config, self.seed = tasks, config, seed
        self.n_layers = n_layers
        self.train = Recorder(n_layers, config.readouts, config.window, width, device)
        self.unseen = Recorder(n_layers, config.readouts, config.unseen_window, width, device)
        n_sets = n_layers * len(config.readouts)
        self.near = RingNeighbours(config.k, 1, n_sets, config.window)  # of training states, own instruction barred
        # Of unseen states among training states: own instruction barred, own grammar barred.
        self.near_unseen = RingNeighbours(config.k, 2, n_sets, config.unseen_window)
        # A GPU searches the whole rings.
        self.is_incremental = torch.device(device).type == "cpu"
        if self.is_incremental:
            self._grid = empty_grid(self.train.points)
            self._grid_unseen = empty_grid(self.unseen.points, self._grid)
        self.centroid = torch.empty(0, device=device, dtype=torch.float32)
        self.columns = [  # what `measure` returns, in its order
            Column("window", measure, readout, layer, split)
            for measures, split in ((MEASURES_OF_TRAINING, ""), (MEASURES_OF_UNSEEN, SPLIT))
            for measure in measures
            for layer in range(n_layers)
            for readout in config.readouts
        ]
        self._n_seen = {self.train: 0, self.unseen: 0}

    @property
    def per_task_shape(self) -> tuple[int, ...]:
        return (self.n_layers, len(self.config.readouts), self.tasks.n_tasks)

    def measure(self, step: int, labels_of: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(values of `columns` [n_columns] float64, neighbour purity of each task [L, R, n_tasks] float64).

        labels_of: labels of the examples of the training and of the unseen ring, where the caller keeps them on the
        device.
        All NaN while the ring holds no more than k states or fewer than there are clusters.
        """
        n, n_unseen = self.train.n_filled, self.unseen.n_filled
        if n <= self.config.k or n < self.tasks.n_tasks:
            nothing = torch.tensor(torch.nan, dtype=torch.float64, device=self.train.bank.device)
            return nothing.expand(len(self.columns)), nothing.expand(self.per_task_shape)
        if labels_of is None:
            train, unseen = (
                from_host(self.labels_of(ring.example.numpy()), self.train.bank.device)
                for ring in (self.train, self.unseen)
            )
            labels_of = train, unseen
        labels, of_unseen = (dict(zip(LABEL_KINDS, together, strict=True)) for together in labels_of)
        near, near_unseen = self._neighbours(labels, of_unseen)
        points = self.train.points[:, :n]
        fit, is_cold = self._kmeans(points, step)

        labels = {kind: label[:n] for kind, label in labels.items()}
        task, task_unseen, n_tasks = labels["task"], of_unseen["task"][:n_unseen], self.tasks.n_tasks
        purity, task_purity = purities(near, task, task, n_tasks)
        of_training = [
            *partition_measures(points, fit, labels, self.tasks.label_counts()),
            is_cold.double(),
            purity,
        ]
        of_queries = [knn_accuracy(ops.majority_vote(index, task), task_unseen) for index in near_unseen]
        per_task = task_purity.view(self.per_task_shape)
        return torch.cat([*of_training, *of_queries]), per_task

    def labels_of(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[LABEL_KINDS, N] labels of examples [N]; of a row that is empty still (-1), anything."""
        labels = self.tasks.labels(examples)
        return np.stack([labels[kind] for kind in LABEL_KINDS])

    def _neighbours(self, labels: dict[str, Tensor], of_unseen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Neighbours among the training states: (of those themselves [S, n, k], of the unseen ones in two views)."""
        instruction, grammar = labels["instruction"], labels["grammar"]
        barred = instruction[None], instruction[None]
        barred_unseen = (
            torch.stack([of_unseen["instruction"], of_unseen["grammar"]]),
            torch.stack([instruction, grammar]),
        )
        if not self.is_incremental:
            train, unseen = self._ring(self.train, None), self._ring(self.unseen, None)
            return self.near.search(train, None, barred)[0], self.near_unseen.search(train, unseen, barred_unseen)
        is_new = self._n_seen[self.train] == 0
        train, unseen = self._ring(self.train, self._grid), self._ring(self.unseen, self._grid_unseen)
        ops.ring_to_grid(train, unseen, is_new=is_new)
        return self.near.update(train, None, barred)[0], self.near_unseen.update(train, unseen, barred_unseen)

    def _ring(self, recorder: Recorder, grid: Grid | None) -> Ring:
        """The recorder's ring, and which rows were written since the last measurement."""
        n_new = min(recorder.n_written - self._n_seen[recorder], recorder.n_points)
        self._n_seen[recorder] = recorder.n_written
        first = (recorder.n_written - n_new) % recorder.n_points
        return Ring(recorder.points, grid, recorder.n_filled, first, n_new)

    def _kmeans(self, points: Tensor, step: int) -> tuple[ops.KMeans, Tensor]:
        """(fit, is_cold [S]): warm from the last centroids; every `cold_every` steps k-means++ competes with that, and
        the lower inertia wins, so that a run cannot stay for ever in an optimum that it fell into early."""
        config, n_tasks = self.config, self.tasks.n_tasks
        is_first = self.centroid.numel() == 0
        if is_first or step % config.cold_every == 0:
            cold = ops.kmeans(points, n_tasks, max_iter=config.max_iter, seed=self.seed)
        if is_first:
            fit, is_cold = cold, torch.ones(len(points), dtype=torch.bool, device=points.device)
        else:
            fit = ops.kmeans(points, n_tasks, init=self.centroid, max_iter=config.warm_iter)
            is_cold = torch.zeros(len(points), dtype=torch.bool, device=points.device)
            if step % config.cold_every == 0:
                is_cold = cold.inertia < fit.inertia
                fit = ops.KMeans(
                    *(torch.where(is_cold.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(cold, fit, strict=True))
                )
        if self.is_incremental or is_first:
            self.centroid = fit.centroid
        else:
            self.centroid.copy_(fit.centroid)  # where it is: a graph that is replayed reads it there
        return fit, is_cold

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs; neighbour lists are not in it, as they follow from the rings."""
        return {
            **{f"train.{name}": tensor for name, tensor in self.train.state().items()},
            **{f"unseen.{name}": tensor for name, tensor in self.unseen.state().items()},
            "centroid": self.centroid,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, ring in (("train", self.train), ("unseen", self.unseen)):
            ring.load_state({key: state[f"{name}.{key}"] for key in ring.state()})
            self._n_seen[ring] = 0  # so that all rows count as changed
        self.centroid = state["centroid"].to(self.centroid.device, copy=True)
