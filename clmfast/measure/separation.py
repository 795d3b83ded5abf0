"""How far apart labelled groups of points lie, from group centroids alone. Pure functions, all sets at once."""

from __future__ import annotations

from torch import Tensor

from clmfast import ops


def separation(points: Tensor, label: Tensor, n_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(centroid silhouette, scatter ratio, total scatter about the mean), each [S] float64, of points [S, N, D] grouped
    by label [N] int64.

    Centroid silhouette (Hruschka et al. 2004, the simplified silhouette): with a = distance of a point to its own
    group's centroid and b = distance to the nearest other centroid,

        mean over points of (b - a) / max(a, b)          in [-1, 1]; 0 where both are 0

    Scatter ratio (the trace form of Fisher's criterion), with group sizes n_c, centroids m_c and mean m:

        sum_c n_c |m_c - m|^2 / sum_i |x_i - m_label(i)|^2          in [0, inf]; NaN where all points are equal

    Chance: about 0 or below for the silhouette, (n_labels - 1) / (N - n_labels) for the ratio. Groups without points
    are left out, and so are points that are not finite.
    """
    silhouette_S, ratio_S, total_S = ops.separation(points, label, n_labels).unbind(0)
    return silhouette_S, ratio_S, total_S
