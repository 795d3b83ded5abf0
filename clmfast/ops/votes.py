"""majority_vote and label_shares: what the labels of neighbours say. The contract is csrc/votes.h."""

import torch
from torch import Tensor


def majority_vote(index: Tensor, label: Tensor) -> Tensor:
    """Label that most of each query's neighbours carry; a tie goes to the label of the nearest of the tied.

    index [S, Q, k] int64, nearest first, as ops.knn returns it; label [N] int64 >= 0; returns [S, Q] int64, -1 where a
    query has no neighbour.
    """
    return torch.ops.clmfast.majority_vote(index, label)


def label_shares(index: Tensor, label: Tensor, truth: Tensor, n_labels: int) -> Tensor:
    """By label c, over the queries q with truth[q] = c that have a neighbour: [2, S, n_labels] float64,

        the sum of the share of q's neighbours that carry c, and the number of such queries

    index [S, Q, k] int64, -1: no neighbour; label [N] int64 of the points; truth [Q] int64 in [0, n_labels).
    """
    return torch.ops.clmfast.label_shares(index, label, truth, n_labels)


@torch.library.register_fake("clmfast::majority_vote")
def _(index: Tensor, label: Tensor) -> Tensor:
    return index.new_empty(index.shape[:2])


@torch.library.register_fake("clmfast::label_shares")
def _(index: Tensor, label: Tensor, truth: Tensor, n_labels: int) -> Tensor:
    return index.new_empty((2, index.shape[0], n_labels), dtype=torch.float64)
