"""partition_scores, adjusted_rand: how well a clustering recovers known classes. The contract is csrc/partition.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


class PartitionScores(NamedTuple):
    ari: Tensor  # each [S] float64
    nmi: Tensor
    homogeneity: Tensor
    completeness: Tensor
    v_measure: Tensor
    purity: Tensor


def partition_scores(
    truth: Array, label: Array, *, n_truth: int | None = None, n_label: int | None = None
) -> PartitionScores:
    """Agreement of two labelings of the same N points, for each of S sets.

    With n_ij the number of points of class i in cluster j, a_i and b_j its row and column sums, N the number of points:

        ari          = (pairs together in both - expected) / (mean of pairs together in each - expected)     [-0.5, 1]
        H(truth)     = -sum_i a_i/N log(a_i/N)            H(label) = -sum_j b_j/N log(b_j/N)
        MI           = sum_ij n_ij/N log(N n_ij / (a_i b_j))
        nmi          = MI / ((H(truth) + H(label)) / 2)                                                      [0, 1]
        homogeneity  = MI / H(truth)        completeness = MI / H(label)                                     [0, 1]
        v_measure    = harmonic mean of homogeneity and completeness (equal to nmi but where an entropy is 0) [0, 1]
        purity       = 1/N sum_j max_i n_ij                                                                  (0, 1]

    truth, label: [N] or [S, N] integers or booleans, as tensors, arrays or lists; a labeling of shape [N] is shared by
    all sets, and two of them are one set (S = 1).
    n_truth, n_label: promise that values lie in [0, n_truth) and [0, n_label), which a CPU then counts in a dense
    table; a value outside, -1 included, is an error. Without them any values are allowed, each a class of its own, and
    a CPU counts by sorting.

    Chance: for independent labelings ari is 0 on average, and only ari. MI then exceeds 0 by about
    (classes - 1)(clusters - 1) / (2 N), and with it nmi, homogeneity and completeness; purity is at least the share
    of the largest class. Many small clusters raise homogeneity and purity for nothing.
    No points, or one class and one cluster, count as full agreement: 1.0 in all six.

    ari: Hubert & Arabie 1985. homogeneity, completeness, v_measure: Rosenberg & Hirschberg 2007. purity: Manning,
    Raghavan & Schuetze 2008, section 16.3. Special cases are scikit-learn's.
    """
    op = "partition_scores"
    beside = (truth, label)
    scores = torch.ops.clmfast.partition_scores(
        arguments.labels(op, "truth", truth, beside),
        arguments.labels(op, "label", label, beside),
        None if n_truth is None else arguments.integer(op, "n_truth", n_truth),
        None if n_label is None else arguments.integer(op, "n_label", n_label),
    )
    return PartitionScores(*scores.unbind(0))


def adjusted_rand(truth: Array, label: Array, n_truth: int, n_label: int) -> Tensor:
    """The ari of partition_scores, alone and cheaper, for each of V truths and S labelings: [V, S] float64.

    truth [V, N] in [0, n_truth); label [S, N] in [-1, n_label), where -1 is a cluster like any other: integers, as
    tensors, arrays or lists.
    """
    op = "adjusted_rand"
    beside = (truth, label)
    return torch.ops.clmfast.adjusted_rand(
        arguments.labels(op, "truth", truth, beside),
        arguments.labels(op, "label", label, beside),
        arguments.integer(op, "n_truth", n_truth),
        arguments.integer(op, "n_label", n_label),
    )


@arguments.register_fake("adjusted_rand")
def _(truth: Tensor, label: Tensor, n_truth: int, n_label: int) -> Tensor:
    return truth.new_empty((truth.shape[0], label.shape[0]), dtype=torch.float64)


@arguments.register_fake("partition_scores")
def _(truth: Tensor, label: Tensor, n_truth: int | None, n_label: int | None) -> Tensor:
    S = truth.shape[0] if truth.dim() == 2 else label.shape[0] if label.dim() == 2 else 1
    return truth.new_empty((6, S), dtype=torch.float64)
