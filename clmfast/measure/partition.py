"""k-means partitions of states against the labels. Pure functions, all sets at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clmfast import ops
from clmfast.config import LABEL_KINDS
from clmfast.measure.separation import separation

PARTITION_MEASURES = (
    *(f"ari_{kind}" for kind in LABEL_KINDS),
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


def partition_scores_of(truth: Tensor, n_truth: int, cluster: Tensor, n_clusters: int) -> ops.PartitionScores:
    """ops.partition_scores of k-means labels [S, N], of which -1 (a non-finite point) is a cluster of its own."""
    return ops.partition_scores(truth, cluster + 1, n_truth=n_truth, n_label=n_clusters + 1)


def partition_measures(
    points: Tensor,
    fit: ops.KMeans,
    labels: Mapping[str, Tensor],
    n_labels: Mapping[str, int],
    kinds: tuple[str, ...] = LABEL_KINDS,
) -> Tensor:
    """[len(PARTITION_MEASURES), S] float64 of points [S, N, D], their k-means fit, and labels [N] by kind.

    Kinds that are not in `kinds` (because the states stand for no single label of that kind) are NaN.
    """
    n_clusters = fit.centroid.shape[1]
    truth_VN = torch.stack([labels[kind] for kind in kinds])
    ari_VS = ops.adjusted_rand(truth_VN, fit.label, max(n_labels[kind] for kind in kinds), n_clusters)
    nan_S = torch.full((len(points),), torch.nan, dtype=torch.float64, device=points.device)
    task = partition_scores_of(labels["task"], n_labels["task"], fit.label, n_clusters)
    silhouette_S, scatter_ratio_S, total_S = separation(points, labels["task"], n_labels["task"])
    return torch.stack(
        [
            *(ari_VS[kinds.index(kind)] if kind in kinds else nan_S for kind in LABEL_KINDS),
            task.nmi,
            task.homogeneity,
            task.completeness,
            task.v_measure,
            task.purity,
            fit.inertia / total_S,
            fit.n_iter.double(),
            silhouette_S,
            scatter_ratio_S,
        ]
    )
