"""A picture's worth of states: the two directions in which they vary most."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_plane(points: Tensor) -> tuple[Tensor, Tensor]:
    """(coordinates [S, N, 2] float32 on the first two principal components, share [S] float64 of the variance that the
    plane holds) of points [S, N, D]. Uses no labels. The sign of each axis makes its largest weight positive; a set
    without variance lies in the origin and has share NaN.
    """
    x_SND = points.double() - points.double().mean(1, keepdim=True)
    covariance_SDD = x_SND.mT @ x_SND
    value_SD, vector_SDD = torch.linalg.eigh(covariance_SDD)
    axes_SD2 = vector_SDD[..., -2:].flip(-1)
    largest = axes_SD2.abs().argmax(1, keepdim=True)
    axes_SD2 = axes_SD2 * axes_SD2.gather(1, largest).sign()
    share_S = value_SD[:, -2:].sum(-1) / value_SD.sum(-1)
    return (x_SND @ axes_SD2).float(), share_S
