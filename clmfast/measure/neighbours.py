"""What the nearest neighbours of a state say about its label. Pure functions of indices and labels.

Index -1 (no such neighbour) never votes and never counts. All functions take every set (layer x readout) at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def majority_vote(index: Tensor, label: Tensor) -> Tensor:
    """Label that most of each query's neighbours carry; a tie goes to the label of the nearest of the tied.

    index [S, Q, k] int64, nearest first, as ops.knn returns it; label [N] int64 >= 0; returns [S, Q] int64, -1 where a
    query has no neighbour.
    """
    near_SQk = label[index.clamp(min=0)].masked_fill_(index < 0, -1)
    votes_SQk = (near_SQk[..., :, None] == near_SQk[..., None, :]).sum(-1).masked_fill_(near_SQk < 0, -1)
    # argmax may return any of several maxima; counting down with the rank leaves one, the nearest.
    k = index.shape[-1]
    score_SQk = votes_SQk * k - torch.arange(k, device=index.device)
    return near_SQk.gather(-1, score_SQk.argmax(-1, keepdim=True))[..., 0]


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
    of_truth_QC = torch.nn.functional.one_hot(truth, n_labels).double()
    of_vote_SQC = (voted[..., None] == torch.arange(n_labels, device=voted.device)).double()
    hits_SC = (of_vote_SQC * of_truth_QC).sum(1)
    seen_SC = of_vote_SQC.sum(1) + of_truth_QC.sum(0)
    return (2 * hits_SC / seen_SC.clamp(min=1)).sum(-1) / (seen_SC > 0).sum(-1)


def label_purity(index: Tensor, label: Tensor, truth: Tensor, n_labels: int) -> Tensor:
    """Neighbour purity of each label's points on their own: [S, n_labels] float64, NaN for a label without points.

    purity[s, c] = mean over queries q of label c of the share of q's neighbours that carry c; a query without
    neighbours is left out. index [S, Q, k]; label [N] of the points; truth [Q] of the queries.
    """
    share_SQ, has_SQ = _own_share(index, label, truth)
    zero_SC = torch.zeros(len(index), n_labels, dtype=torch.float64, device=index.device)
    where_SQ = truth.expand_as(share_SQ)
    sums_SC = zero_SC.scatter_add(1, where_SQ, share_SQ)
    return sums_SC / zero_SC.scatter_add(1, where_SQ, has_SQ)


def neighbour_purity(index: Tensor, label: Tensor, truth: Tensor) -> Tensor:
    """Share of each query's nearest neighbours that carry the query's own label, averaged over queries.

        purity[s] = mean_q mean_e [ label[index[s, q, e]] == truth[q] ]          in [0, 1]

    index [S, Q, k]; label [N] of the points; truth [Q] of the queries; returns [S] float64, NaN if no query has a
    neighbour. Chance level: sum_c n_c (n_c - 1) / (N (N - 1)) for label counts n_c, where points are each other's
    neighbours; 1 / n_tasks for many balanced tasks.
    """
    share_SQ, has_SQ = _own_share(index, label, truth)
    return share_SQ.sum(-1) / has_SQ.sum(-1)


def _own_share(index: Tensor, label: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """[S, Q] share of the neighbours that carry the query's label; [S, Q] 1.0 where there are any, 0.0 where not."""
    is_near = index >= 0
    same = (label[index.clamp(min=0)] == truth[:, None]) & is_near
    n_near_SQ = is_near.sum(-1)
    return same.sum(-1).double() / n_near_SQ.clamp(min=1), (n_near_SQ > 0).double()
