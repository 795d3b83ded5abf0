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
