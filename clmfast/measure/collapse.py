"""Neural collapse: how far labelled states are from one point per class, those points forming a simplex, and the
classifier lying along them. Pure functions, all sets at once, in float64.

Papyan, Han & Donoho 2020 (PNAS 117, 24652-24663), for points x of class c with mean m_c, and the mean m of the class
means (in their setting all classes have the same size; here each class counts the same whatever its size):

    Sigma_W  mean over classes of the covariance within the class        Sigma_B  covariance of the class means
    NC1      tr(Sigma_W pinv(Sigma_B)) / C                               0: each class is one point
    NC2      std_c |m_c - m| / mean_c |m_c - m|                          0: class means are equally long
             std over pairs of cos(m_c - m, m_c' - m)                    0: all pairs have one angle
             mean over pairs of |cos(m_c - m, m_c' - m) + 1 / (C - 1)|   0: that angle is the widest there is
    NC3      |W / |W| - M / |M||^2, Frobenius norms, M the rows m_c - m  0: classifier W along the means; 2: across

Standard deviations are those of a whole population. Classes without points are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SINGULAR = 1e-6  # of the largest: differences of float32 states below that are rounding
RIDGE = (
    0.01  # of the mean variance: without one, directions of hardly any variance would make up most of the classifier
)


class Collapse(NamedTuple):
    """Each [S] float64; NaN where fewer than two classes have points or all class means are equal."""

    nc1: Tensor
    nc2_norm: Tensor
    nc2_angle: Tensor
    nc2_widest: Tensor
    nc3: Tensor


def collapse(points: Tensor, label: Tensor, weight: Tensor | None = None) -> Collapse:
    """NC1 to NC3 of points [S, N, D] with labels [N] int64.

    weight [n_labels, D] holds a row of the classifier for every label value; it is used as given. Without one, the
    classifier is the one that fits the labels best: see `least_squares_classifier`.
    """
    classes, label = label.unique(return_inverse=True)
    n_classes = len(classes)
    nan = torch.full((len(points),), torch.nan, dtype=torch.float64, device=points.device)
    if n_classes < 2:
        return Collapse(nan, nan, nan, nan, nan)
    x_SND = points.double()
    one_hot_NC = torch.nn.functional.one_hot(label, n_classes).double()
    share_NC = one_hot_NC / one_hot_NC.sum(0)  # each class has weight 1
    mean_SCD = share_NC.T @ x_SND
    centred_SCD = mean_SCD - mean_SCD.mean(1, keepdim=True)
    within_SND = x_SND - mean_SCD[:, label]
    weight_N = share_NC.sum(1) / n_classes

    # Sigma_B = M^T M / C, so with M = U diag(s) V^T: tr(Sigma_W pinv(Sigma_B)) / C = sum_r v_r^T Sigma_W v_r / s_r^2.
    _, singular_SR, axes_SRD = torch.linalg.svd(centred_SCD, full_matrices=False)
    is_kept_SR = singular_SR > SMALLEST_SINGULAR * singular_SR[:, :1]
    variance_SR = weight_N @ (within_SND @ axes_SRD.mT).square()
    nc1_S = torch.where(is_kept_SR, variance_SR / singular_SR.square(), 0).sum(-1)

    norm_SC = centred_SCD.norm(dim=-1)
    unit_SCD = centred_SCD / norm_SC[..., None].clamp(min=torch.finfo(torch.float64).tiny)
    i, j = torch.triu_indices(n_classes, n_classes, 1)
    cosine_SP = (unit_SCD @ unit_SCD.mT)[:, i, j]
    if weight is None:
        weight_SCD = least_squares_classifier(within_SND, weight_N, centred_SCD)
    else:
        weight_SCD = weight.double()[classes].expand_as(centred_SCD)
    alignment_S = (weight_SCD * centred_SCD).sum((1, 2)) / (weight_SCD.norm(dim=(1, 2)) * centred_SCD.norm(dim=(1, 2)))
    found = Collapse(
        nc1_S,
        norm_SC.std(-1, correction=0) / norm_SC.mean(-1),
        cosine_SP.std(-1, correction=0),
        (cosine_SP + 1 / (n_classes - 1)).abs().mean(-1),
        2 - 2 * alignment_S,  # |a - b|^2 of two matrices of norm 1
    )
    return Collapse(*(torch.where(singular_SR[:, 0] > 0, value, nan) for value in found))


def least_squares_classifier(within: Tensor, weight: Tensor, centred: Tensor) -> Tensor:
    """The matrix [S, C, D] of the affine map that fits one-hot labels best by ridge regression, each class counting the
    same (Han, Papyan & Donoho 2022 (ICLR), section 2, with a bias, and a ridge that goes with the scale of the points):

        W = M (Sigma_W + Sigma_B + RIDGE tr(Sigma_W + Sigma_B) / D * I)^-1 / C

    within [S, N, D]: points minus the mean of their class; weight [N]: of points, summing to 1; centred [S, C, D]: M.
    """
    n_classes, width = centred.shape[1:]
    total_SDD = (within * weight[:, None]).mT @ within + centred.mT @ centred / n_classes
    mean_S = total_SDD.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(torch.float64).tiny)
    total_SDD = total_SDD + RIDGE * mean_S[:, None, None] * torch.eye(width, dtype=torch.float64, device=within.device)
    return torch.linalg.solve(total_SDD, centred.mT).mT / n_classes
