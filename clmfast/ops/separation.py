"""separation: silhouette and scatter of labelled groups. The contract is csrc/separation.h."""

import torch
from torch import Tensor


def separation(points: Tensor, label: Tensor, n_labels: int) -> Tensor:
    """Centroid silhouette, scatter ratio and total scatter, [3, S] float64, of points [S, N, D] (float32, bfloat16 or
    float16) grouped by label [N] int64 in [0, n_labels); clmfast/measure/separation.py has the formulas.
    No gradient flows.
    """
    return torch.ops.clmfast.separation(points.detach(), label, n_labels)


@torch.library.register_fake("clmfast::separation")
def _(points: Tensor, label: Tensor, n_labels: int) -> Tensor:
    return points.new_empty((3, points.shape[0]), dtype=torch.float64)
