"""What the tests of all ops share: outputs full of NaN, and the same bits for 1 and 2 threads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def outputs_full_of_nan() -> Iterator[None]:
    """New memory holds NaN, or the largest integer: whatever an op forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def assert_threads_do_not_matter(op: Callable[[], Sequence[Tensor]]) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(op())
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


# Points that are hard on a search of neighbours, made of normal ones [S, N, D].
AWKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: 1e4 + 1e-2 * x,
    "far cluster": lambda x: torch.cat([x[:, :40] * 1e-3 + 50, x[:, 40:]], dim=1),
    "tiny": lambda x: x * 1e-20,
    "denormal": lambda x: x * 1e-41,
    "dist2 denormal": lambda x: x * 1e-22,
    "huge": lambda x: x * 1e18,
    "dist2 overflows for some": lambda x: x * 4e18,
    "dist2 overflows for all": lambda x: x * 1e38,
    "ranges": lambda x: x * torch.logspace(-30, 30, x.shape[2]),
    "rows of all sizes": lambda x: x * torch.logspace(-36, 36, x.shape[1])[:, None],
    "duplicates": lambda x: x[:, torch.arange(x.shape[1]) % 7],
    "near duplicates": lambda x: x[:, torch.arange(x.shape[1]) % 7] + 1e-7 * x,
    "identical": lambda x: torch.full_like(x, 0.1),
    "zeros": torch.zeros_like,
    "grid": lambda x: x.round(),
}
