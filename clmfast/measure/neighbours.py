"""What the nearest neighbours of a state say about its label. Pure functions of indices and labels.

Index -1 (no such neighbour) never votes and never counts. All functions take every set (layer x readout) at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clmfast import ops

majority_vote = ops.majority_vote


def knn_accuracy(voted: Tensor, truth: Tensor) -> Tensor:
    """Share of queries whose neighbours vote for the right label.

        accuracy[s] = mean_q [ voted[s, q] == truth[q] ]          in [0, 1]

    voted [S, Q] from majority_vote; truth [Q]; returns [S] float64. Chance: share of the commonest label, 1 / n_tasks
    for balanced tasks; with the query's own grammar barred (M - 1) / (n_tasks M - 1) for M grammars per task.
    """
    return (voted == truth).double().mean(-1)


def macro_f1(voted: Tensor, truth: Tensor, n_labels: int) -> Tensor:
    """F1 of each label, averaged over the labels that occur in truth or vote: every label counts the same.

        F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c);   in [0, 1]

    voted [S, Q], truth [Q]; returns [S] float64. As sklearn.metrics.f1_score(average="macro").
    """
    label = torch.arange(n_labels, device=voted.device)
    of_truth_QC, of_vote_SQC = ((one[..., None] == label).double() for one in (truth, voted))
    hits_SC = (of_vote_SQC * of_truth_QC).sum(1)
    seen_SC = of_vote_SQC.sum(1) + of_truth_QC.sum(0)
    return (2 * hits_SC / seen_SC.clamp(min=1)).sum(-1) / (seen_SC > 0).sum(-1)


def neighbour_purity(index: Tensor, label: Tensor, truth: Tensor) -> Tensor:
    """Share of each query's nearest neighbours that carry the query's own label, averaged over queries.

        purity[s] = mean_q mean_e [ label[index[s, q, e]] == truth[q] ]          in [0, 1]

    index [S, Q, k]; label [N] of the points; truth [Q] int64 >= 0 of the queries; returns [S] float64, NaN if no query
    has a neighbour. Chance level: sum_c n_c (n_c - 1) / (N (N - 1)) for label counts n_c, where points are each other's
    neighbours; 1 / n_tasks for many balanced tasks.
    """
    return purities(index, label, truth, int(truth.max()) + 1 if len(truth) else 1)[0]


def purities(index: Tensor, label: Tensor, truth: Tensor, n_labels: int) -> tuple[Tensor, Tensor]:
    """(neighbour purity [S], that of each label's queries on their own [S, n_labels]), float64; arguments as for
    neighbour_purity, with truth < n_labels. NaN for a label without queries; a query without neighbours is left out.
    """
    share_SC, n_SC = ops.label_shares(index, label, truth, n_labels)
    return share_SC.sum(-1) / n_SC.sum(-1), share_SC / n_SC
