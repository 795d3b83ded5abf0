"""The rival of the measurement tax: what the window estimator measures, by forward hooks, `.cpu()` and scikit-learn.

The same ring, the same unseen examples in a forward pass of their own, neighbours of the states that arrived with the
same ones barred, k-means continued from the last centroids and, every `cold_every` measurements, from k-means++ too:
less than the window's search, which goes on from several partitions and tries moves. One layer and readout at a time,
as the library works.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks.training import PlainTraining, padded, train_examples
from clmfast.config import LABEL_KINDS
from clmfast.data.tasks import draw

SPLIT = "unseen_instruction"
# scikit-learn cannot bar points from being neighbours, so more are asked for: in a ring of 1024 an instruction comes at
# most a few times, a grammar (80 of them) some 13 times.
MORE_FOR_INSTRUCTION, MORE_FOR_GRAMMAR = 10, 40


class Ring:
    """[S, N, D] states and [N] examples; S is layer by readout, readout fastest."""

    def __init__(self, n_layers: int, n_readouts: int, n_points: int, width: int) -> None:
        self.points = np.zeros((n_layers, n_readouts, n_points, width), np.float32)
        self.example = np.full(n_points, -1)
        self.n_written = 0

    def rows(self, n: int) -> NDArray[np.int64]:
        return (self.n_written + np.arange(n)) % len(self.example)

    def advance(self, examples: NDArray[np.int64]) -> None:
        self.example[self.rows(len(examples))] = examples
        self.n_written += len(examples)


class SklearnWindow:
    """Trains `training` with `step()`; `measure()` returns the values that can be compared, by column name."""

    def __init__(self, training: PlainTraining) -> None:
        self.training = training
        config, tasks = training.config, training.tasks
        self.config, self.tasks = config.measure, tasks
        n_layers, width = config.model.n_layers + 1, config.model.width
        self.train = Ring(n_layers, len(self.config.readouts), self.config.window, width)
        self.unseen = Ring(n_layers, len(self.config.readouts), self.config.unseen_per_step, width)
        self.ring, self.batch = self.train, padded(tasks.pack(train_examples(config, tasks, 0)))
        self.centroid: dict[tuple[int, int], NDArray[np.float32]] = {}
        self.n_measured = 0
        training.model.on_states(self.see)

    @property
    def is_full(self) -> bool:
        return self.train.n_written >= len(self.train.example)

    def see(self, layer: int, x: Tensor) -> None:
        """The hook: x [B, T, D]."""
        states = x.cpu().numpy()
        for r, readout in enumerate(self.config.readouts):
            rows = states[np.arange(len(states)), getattr(self.batch, readout)]
            self.ring.points[layer, r, self.ring.rows(len(rows))] = rows

    def step(self) -> float:
        """One update with its states kept; returns the loss."""
        config, step = self.training.config, self.training.n_steps
        examples = train_examples(config, self.tasks, step)
        # The unseen examples see the weights before the update, as in clmfast.
        unseen = draw(self.tasks.splits[SPLIT], self.config.unseen_per_step, config.seed, step, "unseen")
        self.ring, self.batch = self.unseen, padded(self.tasks.pack(unseen))
        with torch.no_grad():
            self.training.model(torch.from_numpy(self.batch.tokens), torch.from_numpy(self.batch.prompt_end))
        self.unseen.advance(unseen)
        self.ring, self.batch = self.train, padded(self.tasks.pack(examples))
        loss = self.training.step()
        self.train.advance(examples)
        return loss

    def measure(self) -> dict[str, float]:
        """All measures of all layers and readouts; of these, what the neighbours of this step's states say is returned,
        as the others depend on how k-means started."""
        labels, of_unseen = (self.tasks.labels(ring.example) for ring in (self.train, self.unseen))
        n, n_batch = len(self.train.example), self.training.config.train.batch
        arrived = (self.train.n_written - n_batch + np.arange(n_batch)) % n
        of_arrived = {kind: label[arrived] for kind, label in labels.items()}
        found = {}
        for layer, by_readout in enumerate(self.train.points):
            for r, readout in enumerate(self.config.readouts):
                points, queries = by_readout[r], self.unseen.points[layer, r]
                self.partition((layer, r), points, labels)
                where = f"window/{readout}/layer{layer}"
                asked = (points[arrived], of_arrived), (queries, of_unseen)
                for name, value in self.neighbours(points, labels, *asked).items():
                    found[f"{where}/{name}"] = value
        self.n_measured += 1
        return found

    def partition(self, key: tuple[int, int], points: NDArray[np.float32], labels: dict[str, Any]) -> dict[str, float]:
        """k-means and its scores, silhouette and scatter ratio."""
        label, inertia = self.kmeans(key, points)
        truth = labels["task"]
        table = contingency_matrix(truth, label)
        homogeneity, completeness, v_measure = metrics.homogeneity_completeness_v_measure(truth, label)
        means = np.stack([points[truth == task].mean(0) for task in np.unique(truth)])
        total = ((points - points.mean(0)) ** 2).sum()
        distance = np.sort(metrics.pairwise_distances(points, means), axis=1)
        own = np.linalg.norm(points - means[np.searchsorted(np.unique(truth), truth)], axis=1)
        other = np.where(own == distance[:, 0], distance[:, 1], distance[:, 0])
        return {
            **{f"ari_{kind}": metrics.adjusted_rand_score(labels[kind], label) for kind in LABEL_KINDS},
            "nmi_task": metrics.normalized_mutual_info_score(truth, label),
            "homogeneity_task": homogeneity,
            "completeness_task": completeness,
            "v_measure_task": v_measure,
            "purity_task": table.max(0).sum() / len(label),
            "inertia_share": inertia / total,
            "silhouette_task": ((other - own) / np.maximum(np.maximum(own, other), 1e-30)).mean(),
            "scatter_ratio_task": total / (own**2).sum() - 1,
        }

    def kmeans(self, key: tuple[int, int], points: NDArray[np.float32]) -> tuple[NDArray[np.int32], float]:
        """(labels, inertia), warm or, if that is better when it is its turn, cold."""
        K, config, fits = self.tasks.n_tasks, self.config, []
        if key in self.centroid:
            fits.append(KMeans(K, init=self.centroid[key], n_init=1, max_iter=config.warm_iter).fit(points))
        if not fits or self.n_measured % config.cold_every == 0:
            fits.append(KMeans(K, n_init=1, max_iter=config.max_iter).fit(points))
        best = min(fits, key=lambda fit: fit.inertia_)
        self.centroid[key] = best.cluster_centers_
        return best.labels_, best.inertia_

    def neighbours(
        self, points: NDArray[np.float32], labels: Any, arrived: tuple[Any, Any], unseen: tuple[Any, Any]
    ) -> dict[str, float]:
        """Of what arrived and of what is unseen: (states, labels)."""
        k, task = self.config.k, labels["task"]
        (of_batch, batch_labels), (queries, of_unseen) = arrived, unseen
        library = NearestNeighbors(algorithm="brute").fit(points)
        near = library.kneighbors(of_batch, k + MORE_FOR_INSTRUCTION, return_distance=False)
        near = _allowed(near, labels["instruction"], batch_labels["instruction"], k)
        near_unseen = library.kneighbors(queries, k + MORE_FOR_GRAMMAR, return_distance=False)
        accuracy = [
            (_vote(task[_allowed(near_unseen, labels[kind], of_unseen[kind], k)]) == of_unseen["task"]).mean()
            for kind in ("instruction", "grammar")
        ]
        return {
            "neighbour_purity": float((task[near] == batch_labels["task"][:, None]).mean()),
            f"{SPLIT}/knn_accuracy": float(accuracy[0]),
            f"{SPLIT}/cross_grammar_knn_accuracy": float(accuracy[1]),
        }


def _allowed(near: NDArray[np.int64], of_point: Any, of_query: Any, k: int) -> NDArray[np.int64]:
    """The first k of each row of `near` [Q, more] whose label is not the query's own."""
    is_barred = of_point[near] == of_query[:, None]
    return np.take_along_axis(near, np.argsort(is_barred, axis=1, kind="stable")[:, :k], 1)


def _vote(label: NDArray[np.int64]) -> NDArray[np.int64]:
    """The commonest label of each row of [Q, k]; of equals the nearest's."""
    votes = (label[:, :, None] == label[:, None, :]).sum(-1)
    return np.take_along_axis(label, votes.argmax(1)[:, None], 1)[:, 0]
