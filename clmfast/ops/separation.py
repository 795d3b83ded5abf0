"""separation: silhouette and scatter of labelled groups. The contract is csrc/separation.h."""

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


def separation(points: Array, label: Array, n_labels: int) -> Tensor:
    """Centroid silhouette, scatter ratio and total scatter, [3, S] float64, of points [S, N, D] (float32, bfloat16 or
    float16) grouped by label [N], integers in [0, n_labels); clmfast/measure/separation.py has the formulas.
    Arrays and lists serve as well as tensors; a list of numbers becomes float32. No gradient flows.
    """
    op = "separation"
    beside = (points, label)
    return torch.ops.clmfast.separation(
        arguments.points(op, "points", points, beside),
        arguments.labels(op, "label", label, beside),
        arguments.integer(op, "n_labels", n_labels),
    )


@arguments.register_fake("separation")
def _(points: Tensor, label: Tensor, n_labels: int) -> Tensor:
    return points.new_empty((3, points.shape[0]), dtype=torch.float64)
