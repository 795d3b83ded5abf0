"""A picture's worth of states: the two directions in which they vary most."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def principal_plane(points: Tensor) -> tuple[Tensor, Tensor]:
    """(coordinates [S, N, 2] float32 on the first two principal components, share [S] float64 of the variance that the
    plane holds) of points [S, N, D]. Uses no labels. The sign of each axis makes its largest weight positive; a set
    without variance lies in the origin and has share NaN; one that is not finite has no plane, and is NaN throughout.
    """
    if points.shape[-1] == 1:
        points = F.pad(points, (0, 1))
    x_SND = points.double() - points.double().mean(1, keepdim=True)
    covariance_SDD = x_SND.mT @ x_SND
    is_finite_S11 = covariance_SDD.isfinite().all(2, True).all(1, True)
    covariance_SDD = torch.where(is_finite_S11, covariance_SDD, 0.0)
    x_SND = torch.where(is_finite_S11, x_SND, torch.nan)
    value_SD, vector_SDD = torch.linalg.eigh(covariance_SDD)
    axes_SD2 = vector_SDD[..., -2:].flip(-1)
    largest = axes_SD2.abs().argmax(1, keepdim=True)
    axes_SD2 = axes_SD2 * axes_SD2.gather(1, largest).sign()
    share_S = value_SD[:, -2:].sum(-1) / value_SD.sum(-1)
    return (x_SND @ axes_SD2).float(), share_S
