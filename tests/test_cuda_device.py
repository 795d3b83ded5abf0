"""The CUDA ops on a GPU: the CPU's answers, on any stream and device, compiled, in a graph, and without waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import assert_same_bits
from torch import Tensor

from clmfast import ops

pytestmark = pytest.mark.gpu

Inputs = tuple[Tensor, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(n: int, *shape: int, seed: int = 0, low: int = 0) -> Tensor:
    return torch.randint(low, n, shape, generator=torch.Generator().manual_seed(seed))


def capture(x: Tensor, start: Tensor, stop: Tensor, slot: Tensor) -> Inputs:
    bank = torch.zeros(2, 16, x.shape[-1], dtype=x.dtype, device=x.device)
    norm2 = torch.zeros(2, 16, device=x.device)
    ops.capture_rows(x, start, stop, slot, bank, norm2)
    return bank, norm2


def by_seed(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Callable[..., Inputs], Inputs]]:
    """Every op, as a function of tensors, and inputs of a seed: shapes do not depend on it."""
    points = normal(3, 200, 64, seed=seed).to(dtype)
    queries = normal(3, 50, 64, seed=seed + 1).to(dtype)
    label, truth = draw(7, 3, 200, seed=seed), draw(5, 3, 200, seed=seed + 1)
    start = draw(5, 2, 9, seed=seed)
    index = draw(200, 3, 50, 10, seed=seed, low=-1)
    many = draw(5000, 3, 200, seed=seed)
    return {
        "capture_rows": (capture, (normal(9, 6, 64, seed=seed).to(dtype), start, start + 1, torch.tensor([seed + 14]))),
        "knn": (lambda p: ops.knn(p, 10), (points,)),
        "knn of queries": (lambda p, q, g, h: ops.knn(p, 5, q, (g, h)), (points, queries, label[0, :50], label[0])),
        "kmeans": (lambda p, c: ops.kmeans(p, 6, init=c), (points, points[:, :6].float())),
        "partition_scores": (lambda t, l: ops.partition_scores(t, l, n_truth=5, n_label=7), (truth, label)),
        "partition_scores of any": (ops.partition_scores, (truth, many)),
        "adjusted_rand": (lambda t, l: (ops.adjusted_rand(t, l - 1, 5, 7),), (truth, label)),
        "adjusted_rand of many": (lambda t, l: (ops.adjusted_rand(t, l - 1, 5000, 7),), (many, label)),
        "majority_vote": (lambda i, l: (ops.majority_vote(i, l),), (index, label[0])),
        "label_shares": (lambda i, l, t: (ops.label_shares(i, l, t, 7),), (index, label[0], label[1, :50])),
        "separation": (lambda p, l: (ops.separation(p, l, 7),), (points, label[0])),
    }


CASES = list(by_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(inputs: Inputs, device: str | torch.device) -> Inputs:
    return tuple(x.to(device) for x in inputs)


def assert_as_on_cpu(found: Inputs, expected: Inputs) -> None:
    for x, y in zip(found, expected, strict=True):
        if y.is_floating_point():
            torch.testing.assert_close(x.cpu(), y, rtol=1e-6 if y.dtype == torch.float32 else 1e-12, atol=1e-12)
        else:
            assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_cpu(case: str, dtype: torch.dtype) -> None:
    op, inputs = by_seed(0, dtype)[case]
    assert_as_on_cpu(op(*moved(inputs, "cuda")), op(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_views_are_read_as_they_are(case: str) -> None:
    op, inputs = by_seed(0)[case]
    views = [torch.stack([x, x], dim=-1)[..., 0] for x in moved(inputs, "cuda")]
    assert not any(x.is_contiguous() for x in views if x.numel() > 1)
    assert_as_on_cpu(op(*views), op(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_device(case: str) -> None:
    op, inputs = by_seed(0)[case]
    on_gpu = moved(inputs, "cuda")
    op(*on_gpu)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = op(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert_as_on_cpu(found, op(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_a_graph_is_replayed_with_other_contents(case: str) -> None:
    op, inputs = by_seed(0)[case]
    kept = moved(inputs, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*kept)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op(*kept)
    for seed in (0, 100, 200):
        _, others = by_seed(seed)[case]
        for x, y in zip(kept, others, strict=True):
            x.copy_(y)
        graph.replay()
        assert_as_on_cpu(found, op(*others))


@pytest.mark.parametrize("case", CASES)
def test_work_goes_to_the_current_stream(case: str) -> None:
    op, inputs = by_seed(0)[case]
    stream = torch.cuda.Stream()
    large = torch.zeros(1 << 26, device="cuda")
    kept = tuple(torch.zeros_like(x, device="cuda") for x in inputs)
    on_gpu = moved(inputs, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):  # so that the copies below come late
            large += 1
        for x, y in zip(kept, on_gpu, strict=True):
            x.copy_(y)
        found = op(*kept)
    stream.synchronize()
    assert_as_on_cpu(found, op(*inputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", CASES)
def test_another_device_than_the_current_one(case: str) -> None:
    op, inputs = by_seed(0)[case]
    with torch.cuda.device(0):
        found = op(*moved(inputs, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in found)
    assert_as_on_cpu(found, op(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    op, inputs = by_seed(0)[case]
    assert_as_on_cpu(torch.compile(op, fullgraph=True)(*moved(inputs, "cuda")), op(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_twice_the_same_bits(case: str) -> None:
    op, inputs = by_seed(0)[case]
    on_gpu = moved(inputs, "cuda")
    assert_same_bits(op(*on_gpu), op(*on_gpu))


def test_opcheck() -> None:
    points, label = normal(2, 40, 8).cuda(), draw(4, 2, 40).cuda()
    index = draw(40, 2, 10, 3, low=-1).cuda()
    torch.library.opcheck(torch.ops.clmfast.knn.default, (points, 3, None, None, None, None))
    torch.library.opcheck(torch.ops.clmfast.partition_scores.default, (label, label, 4, 4))
    torch.library.opcheck(torch.ops.clmfast.partition_scores.default, (label, label, None, None))
    torch.library.opcheck(torch.ops.clmfast.adjusted_rand.default, (label, label, 4, 4))
    torch.library.opcheck(torch.ops.clmfast.majority_vote.default, (index, label[0]))
    torch.library.opcheck(torch.ops.clmfast.label_shares.default, (index, label[0], label[1, :10], 4))
    torch.library.opcheck(torch.ops.clmfast.separation.default, (points, label[0], 4))
    zero = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    banks = torch.zeros(2, 6, 8, device="cuda"), torch.zeros(2, 6, device="cuda")
    torch.library.opcheck(
        torch.ops.clmfast.capture_rows.default, (normal(3, 4, 8).cuda(), zero, zero + 1, zero[0, :1], *banks)
    )


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"one device|same device|on another"):
        ops.separation(normal(1, 4, 3).cuda(), torch.zeros(4, dtype=torch.int64), 2)
