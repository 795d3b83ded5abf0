"""k-means partitions of states against the labels. Pure functions, all sets at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clmfast import ops
from clmfast.config import LABEL_KINDS, RESTARTS_PER_START, MeasureConfig
from clmfast.measure.catalogue import BAND_SHARE, RIVAL_ARI
from clmfast.measure.separation import separation

PARTITION_MEASURES = (
    *(f"ari_{kind}" for kind in LABEL_KINDS),
    "ari_task_low",
    "ari_task_high",
    "rival_inertia_gap",
    "nmi_task",
    "homogeneity_task",
    "completeness_task",
    "v_measure_task",
    "purity_task",
    "inertia_share",
    "kmeans_iterations",
    "silhouette_task",
    "scatter_ratio_task",
)


def find_partitions(points: Tensor, n_clusters: int, config: MeasureConfig, seed: int) -> ops.Partitions:
    """Partitions of lowest inertia of points [S, N, D] that nothing is known about: a few starts with moves; on a GPU
    restarts of k-means, of which the best alone comes back."""
    if points.device.type == "cpu":
        return ops.kmeans_search(
            points, n_clusters, n_cold=config.n_init, keep=config.n_init, moves=config.moves,
            max_iter=config.max_iter, seed=seed,
        )  # fmt: skip
    n_init = RESTARTS_PER_START * config.n_init
    return as_partitions(ops.kmeans(points, n_clusters, n_init=n_init, max_iter=config.max_iter, seed=seed))


def as_partitions(fit: ops.KMeans) -> ops.Partitions:
    """One k-means fit as the only partition that was found."""
    return ops.Partitions(fit.label[None], fit.inertia[None], fit.centroid, fit.n_iter, torch.zeros_like(fit.n_iter))


def partition_scores_of(truth: Tensor, n_truth: int, cluster: Tensor, n_clusters: int) -> ops.PartitionScores:
    """ops.partition_scores of k-means labels [S, N], of which -1 (a non-finite point) is a cluster of its own."""
    return ops.partition_scores(truth, cluster + 1, n_truth=n_truth, n_label=n_clusters + 1)


def ari_band(ari: Tensor, inertia: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest and highest ARI of the partitions that are as good as the best, inertia gap of the rival), each [S].

    ari and inertia [P, S] float64 of P partitions, the best first; inertia inf: no such partition. As good: within
    0.5 % of the lowest inertia. Rival: the best partition whose ARI differs from that of the best by more than 0.05;
    its gap is (inertia - lowest) / lowest, NaN where none was found.
    """
    excess = (inertia - inertia[0]) / inertia[0]
    excess = torch.where(inertia == inertia[0], 0.0, excess)  # also where all inertia is 0
    is_good = excess <= BAND_SHARE
    low = torch.where(is_good, ari, torch.inf).amin(0)
    high = torch.where(is_good, ari, -torch.inf).amax(0)
    is_rival = inertia.isfinite() & ((ari - ari[0]).abs() > RIVAL_ARI)
    gap = torch.where(is_rival, excess, torch.inf).amin(0)
    return low, high, torch.where(gap.isinf(), torch.nan, gap)


def partition_measures(
    points: Tensor,
    found: ops.Partitions,
    labels: Mapping[str, Tensor],
    n_labels: Mapping[str, int],
    kinds: tuple[str, ...] = LABEL_KINDS,
) -> Tensor:
    """[len(PARTITION_MEASURES), S] float64 of points [S, N, D], their k-means partitions, and labels [N] by kind.

    Kinds that are not in `kinds` (because the states stand for no single label of that kind) are NaN.
    """
    best_SN, n_clusters = found.label[0], found.centroid.shape[1]
    truth_VN = torch.stack([labels[kind] for kind in kinds])
    ari_VS = ops.adjusted_rand(truth_VN, best_SN, max(n_labels[kind] for kind in kinds), n_clusters)
    others_PS = ops.adjusted_rand(labels["task"][None], found.label[1:].flatten(0, 1), n_labels["task"], n_clusters)
    ari_PS = torch.cat([ari_VS[kinds.index("task")][None], others_PS.view(-1, len(points))])
    low_S, high_S, gap_S = ari_band(ari_PS, found.inertia)
    nan_S = torch.full((len(points),), torch.nan, dtype=torch.float64, device=points.device)
    task = partition_scores_of(labels["task"], n_labels["task"], best_SN, n_clusters)
    silhouette_S, scatter_ratio_S, total_S = separation(points, labels["task"], n_labels["task"])
    return torch.stack(
        [
            *(ari_VS[kinds.index(kind)] if kind in kinds else nan_S for kind in LABEL_KINDS),
            low_S,
            high_S,
            gap_S,
            task.nmi,
            task.homogeneity,
            task.completeness,
            task.v_measure,
            task.purity,
            found.inertia[0] / total_S,
            found.n_iter.double(),
            silhouette_S,
            scatter_ratio_S,
        ]
    )
