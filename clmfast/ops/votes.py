"""majority_vote and label_shares: what the labels of neighbours say. The contract is csrc/votes.h."""

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


def majority_vote(index: Array, label: Array) -> Tensor:
    """Label that most of each query's neighbours carry; a tie goes to the label of the nearest of the tied.

    index [S, Q, k], nearest first, as ops.knn returns it; label [N] >= 0; both integers, as tensors, arrays or lists.
    Returns [S, Q] int64, -1 where a query has no neighbour.
    """
    op = "majority_vote"
    beside = (index, label)
    return torch.ops.clmfast.majority_vote(
        arguments.labels(op, "index", index, beside), arguments.labels(op, "label", label, beside)
    )


def label_shares(index: Array, label: Array, truth: Array, n_labels: int) -> Tensor:
    """By label c, over the queries q with truth[q] = c that have a neighbour: [2, S, n_labels] float64,

        the sum of the share of q's neighbours that carry c, and the number of such queries

    index [S, Q, k], -1: no neighbour; label [N] of the points; truth [Q] in [0, n_labels): integers, as tensors, arrays
    or lists.
    """
    op = "label_shares"
    beside = (index, label, truth)
    return torch.ops.clmfast.label_shares(
        arguments.labels(op, "index", index, beside),
        arguments.labels(op, "label", label, beside),
        arguments.labels(op, "truth", truth, beside),
        arguments.integer(op, "n_labels", n_labels),
    )


@arguments.register_fake("majority_vote")
def _(index: Tensor, label: Tensor) -> Tensor:
    return index.new_empty(index.shape[:2])


@arguments.register_fake("label_shares")
def _(index: Tensor, label: Tensor, truth: Tensor, n_labels: int) -> Tensor:
    return index.new_empty((2, index.shape[0], n_labels), dtype=torch.float64)
