"""How far apart labelled groups of points lie, from group centroids alone. Pure functions, all sets at once."""

from __future__ import annotations

import torch
from torch import Tensor


def separation(points: Tensor, label: Tensor, n_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(centroid silhouette, scatter ratio, total scatter about the mean), each [S] float64, of points [S, N, D] grouped
    by label [N] int64.

    Centroid silhouette (Hruschka et al. 2004, the simplified silhouette): with a = distance of a point to its own
    group's centroid and b = distance to the nearest other centroid,

        mean over points of (b - a) / max(a, b)          in [-1, 1]; 0 where both are 0

    Scatter ratio (the trace form of Fisher's criterion), with group sizes n_c, centroids m_c and mean m:

        sum_c n_c |m_c - m|^2 / sum_i |x_i - m_label(i)|^2          in [0, inf]; NaN where all points are equal

    Chance: about 0 or below for the silhouette, (n_labels - 1) / (N - n_labels) for the ratio. Groups without points
    are left out.
    """
    # float32 is enough once the common offset is gone, which residual streams have plenty of; any point near the
    # middle serves as the new origin, so its own rounding does not matter.
    x_SND = points.float() - points.float().mean(1, keepdim=True)
    member_NC = torch.nn.functional.one_hot(label, n_labels).to(x_SND.dtype)
    n_C = member_NC.sum(0)
    centroid_SCD = (member_NC.T @ x_SND) / n_C.clamp(min=1)[:, None]
    # |x|^2 - 2 x.m + |m|^2 loses what is small beside |x|^2; clamped, and enough for a mean over thousands of points.
    norm2_SC = centroid_SCD.square().sum(-1)
    norm2_SN = torch.linalg.vector_norm(x_SND, dim=-1).square()
    dist2_SNC = (norm2_SN[..., None] + norm2_SC[:, None] - 2 * (x_SND @ centroid_SCD.mT)).clamp_(min=0)
    dist2_SNC.masked_fill_(n_C == 0, torch.inf)
    own_SN = dist2_SNC.gather(-1, label.expand(len(points), -1)[..., None])[..., 0]
    other_SN = dist2_SNC.scatter(-1, label.expand(len(points), -1)[..., None], torch.inf).amin(-1)
    a_SN, b_SN = own_SN.double().sqrt(), other_SN.double().sqrt()
    silhouette_S = ((b_SN - a_SN) / torch.maximum(a_SN, b_SN)).nan_to_num(0.0).mean(-1)
    mean_SD = x_SND.mean(1, dtype=torch.float64)
    between_S = (n_C.double() * (centroid_SCD.double() - mean_SD[:, None]).square().sum(-1)).sum(-1)
    within_S = own_SN.double().sum(-1)
    return silhouette_S, between_S / within_S, between_S + within_S
