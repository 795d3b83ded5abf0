"""ops.capture_rows against the reference: bit for bit, whatever strides its tensors have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import assert_same_bits, assert_threads_do_not_matter

from clmfast import ops
from clmfast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spans(R, B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(T, (2, R, B), generator=generator).sort(dim=0).values
    return ends[0], ends[1] + 1


def assert_like_reference(x, start, stop, slot, bank, norm2):
    """Also that no other row changes: both begin with the same rubbish."""
    expected_bank, expected_norm2 = bank.clone(), norm2.clone()
    ops.capture_rows(x, start, stop, slot, bank, norm2)
    reference.capture_rows(x, start, stop, slot, expected_bank, expected_norm2)
    assert_same_bits([bank, norm2], [expected_bank, expected_norm2])


# ---- is it right? does it write all that it should, and nothing else?


def test_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], [[-1.0, 0.0], [0.0, 2.0], [7.0, 7.0]]])
    bank, norm2 = torch.full((2, 3, 2), -9.0), torch.full((2, 3), -9.0)
    ops.capture_rows(x, torch.tensor([[2, 0], [0, 0]]), torch.tensor([[3, 1], [3, 2]]), torch.tensor([2]), bank, norm2)
    assert bank.tolist() == [[[-1, 0], [-9, -9], [5, 9]], [[-0.5, 1], [-9, -9], [3, 5]]]
    assert norm2.tolist() == [[1, -9, 106], [1.25, -9, 34]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "D", "R", "N", "slot"), [(1, 1, 1, 1, 1, 0), (7, 5, 63, 2, 7, 3), (3, 40, 130, 3, 64, 62)]
)
def test_against_reference(B, T, D, R, N, slot, dtype):
    x = normal(B, T, D).to(dtype)
    assert_like_reference(
        x,
        *spans(R, B, T),
        torch.tensor(slot),
        torch.full((R, N, D), torch.nan, dtype=dtype),
        torch.full((R, N), torch.nan),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_is_copied_bit_for_bit(dtype):
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (4, 6, 500), dtype=integer, generator=torch.Generator().manual_seed(0))
    x, start = bits.view(dtype), torch.tensor([[0, 5, 2, 3]])  # NaN of every kind, denormals and infinities among them
    bank, norm2 = torch.zeros(1, 4, 500, dtype=dtype), torch.zeros(1, 4)
    ops.capture_rows(x, start, start + 1, torch.tensor(0), bank, norm2)
    assert torch.equal(bank.view(integer)[0], bits[torch.arange(4), start[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_widen_and_narrow_as_in_torch(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    n = len(every)
    bank, norm2, zeros = torch.zeros(1, n, 1, dtype=dtype), torch.zeros(1, n), torch.zeros(1, n, dtype=torch.int64)
    # The mean of a value twice is the value, but it passes through both conversions.
    ops.capture_rows(every.view(n, 1, 1).expand(n, 2, 1), zeros, zeros + 2, torch.tensor(0), bank, norm2)
    assert torch.equal(bank.flatten(), every)
    assert torch.equal(norm2.flatten(), every.double().square().float())
    # The mean of a value and the next lies halfway between them; of the largest ones and of infinity it overflows.
    pairs = torch.stack([every, every.roll(-1)], dim=1)[..., None]
    ops.capture_rows(pairs, zeros, zeros + 2, torch.tensor(0), bank, norm2)
    assert torch.equal(bank[0].nan_to_num(7), pairs.double().mean(dim=1).float().to(dtype).nan_to_num(7))


def test_any_strides():
    B, T, D, R, N = 5, 7, 12, 2, 9
    x = normal(D, B, T, 2).permute(1, 2, 0, 3)[..., 0]
    start, stop = (t.T.contiguous().T for t in spans(R, B, T))
    bank, norm2 = torch.full((N, D, R), -1.0).permute(2, 0, 1), torch.full((N, 2 * R), -1.0).T[::2]
    assert not any(t.is_contiguous() for t in (x, start, stop, bank, norm2))
    assert_like_reference(x, start, stop, torch.tensor([8]), bank, norm2)


def test_the_ring_closes():
    bank, norm2 = torch.zeros(1, 6, 1), torch.zeros(1, 6)
    slot, zero = torch.tensor([0]), torch.zeros(1, 4, dtype=torch.int64)
    for step in range(5):
        x = torch.arange(4.0).view(4, 1, 1) + 10 * step
        ops.capture_rows(x, zero, zero + 1, slot, bank, norm2)
        slot += 4  # counts on: the op takes it modulo N
    assert bank.flatten().tolist() == [42, 43, 32, 33, 40, 41]
    slot.fill_(2**62 + 1)
    assert_like_reference(x, zero, zero + 1, slot, bank, norm2)


@pytest.mark.parametrize(("B", "R", "D"), [(0, 2, 3), (4, 0, 3), (4, 2, 0)])
def test_nothing_to_write(B, R, D):
    x, bank, norm2 = normal(B, 3, D), torch.full((R, 5, D), -1.0), torch.full((R, 5), -1.0)
    zero = torch.zeros(R, B, dtype=torch.int64)
    assert_like_reference(x, zero, zero + 1, torch.tensor(0), bank, norm2)
    assert (bank == -1).all()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(0, 9), T=st.integers(1, 9), D=st.integers(0, 20), R=st.integers(0, 3), extra=st.integers(0, 9),
    slot=st.integers(0, 50), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(B, T, D, R, extra, slot, dtype, seed):
    N = B + extra
    bank, norm2 = normal(R, N, D, seed=1).to(dtype), normal(R, N, seed=2)
    assert_like_reference(normal(B, T, D).to(dtype), *spans(R, B, T, seed), torch.tensor(slot), bank, norm2)


def test_threads_do_not_matter():
    x, (start, stop) = normal(40, 30, 50), spans(2, 40, 30)

    def capture():
        bank, norm2 = torch.zeros(2, 64, 50), torch.zeros(2, 64)
        ops.capture_rows(x, start, stop, torch.tensor(33), bank, norm2)
        return bank, norm2

    assert_threads_do_not_matter(capture)


def test_takes_no_part_in_autograd():
    x = normal(3, 4, 5).requires_grad_()
    bank, norm2 = torch.zeros(1, 3, 5), torch.zeros(1, 3)
    zero = torch.zeros(1, 3, dtype=torch.int64)
    y = x * 2
    ops.capture_rows(y, zero, zero + 4, torch.tensor(0), bank, norm2)
    assert not bank.requires_grad and not norm2.requires_grad
    y.sum().backward()
    assert (x.grad == 2).all()


# ---- is it registered right?


def test_opcheck():
    x, (start, stop) = normal(3, 4, 5), spans(2, 3, 4)
    arguments = (x, start, stop, torch.tensor([1]), torch.zeros(2, 6, 5), torch.zeros(2, 6))
    torch.library.opcheck(torch.ops.clmfast.capture_rows.default, arguments)


def test_compiled():
    x, (start, stop) = normal(3, 4, 5), spans(2, 3, 4)
    bank, norm2 = torch.zeros(2, 6, 5), torch.zeros(2, 6)
    compiled = torch.compile(ops.capture_rows, fullgraph=True)
    compiled(x, start, stop, torch.tensor([1]), bank, norm2)
    expected = torch.zeros(2, 6, 5), torch.zeros(2, 6)
    ops.capture_rows(x, start, stop, torch.tensor([1]), *expected)
    assert_same_bits([bank, norm2], expected)
    assert bank.abs().sum() > 0


# ---- does it refuse what it should?

GOOD = {
    "x": torch.zeros(3, 4, 5),
    "start": torch.zeros(2, 3, dtype=torch.int64),
    "stop": torch.ones(2, 3, dtype=torch.int64),
    "slot": torch.zeros(1, dtype=torch.int64),
    "bank": torch.zeros(2, 6, 5),
    "norm2": torch.zeros(2, 6),
}
SPANS = "capture_rows: slot must be at least 0 and spans must satisfy 0 <= start < stop <= T, with T=4"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(4), "capture_rows: x must be [B, T, D] or [n, D], got [4]"),
        ("x", torch.zeros(3, 4, 5).double(), "capture_rows: x must be float32, bfloat16 or float16"),
        ("x", torch.zeros(3, 4, 5).half(), "capture_rows: bank must have the dtype of x"),
        ("start", torch.zeros(2, 3), "capture_rows: start must be integers, got float32"),
        ("stop", torch.zeros(2, 3), "capture_rows: stop must be integers, got float32"),
        ("slot", torch.zeros(1), "capture_rows: slot must be integers, got float32"),
        (
            "start",
            torch.zeros(2, 4, dtype=torch.int64),
            "capture_rows: start and stop must be [R, B], with the B of x if that is [B, T, D], got [2, 4]",
        ),
        (
            "stop",
            torch.zeros(1, 3, dtype=torch.int64),
            "capture_rows: start and stop must be [R, B], with the B of x if that is [B, T, D], got [2, 3]",
        ),
        ("slot", torch.zeros(2, dtype=torch.int64), "capture_rows: slot must be one number, got [2]"),
        ("bank", torch.zeros(2, 6, 4), "capture_rows: bank must be [R, N, D] with R=2 and D=5, got [2, 6, 4]"),
        ("bank", torch.zeros(3, 6, 5), "capture_rows: bank must be [R, N, D] with R=2 and D=5, got [3, 6, 5]"),
        ("norm2", torch.zeros(2, 5), "capture_rows: norm2 must be [R, N] = [2, 6] float32, got [2, 5]"),
        ("norm2", torch.zeros(2, 6).double(), "capture_rows: norm2 must be [R, N] = [2, 6] float32, got [2, 6]"),
        ("start", torch.full((2, 3), -1), SPANS),
        ("start", torch.full((2, 3), 1), SPANS),
        ("stop", torch.full((2, 3), 5), SPANS),
        ("slot", torch.tensor([-1]), SPANS),
    ],
)
def test_refusals(name, value, message):
    arguments = GOOD | {name: value}
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as it is, not as a pattern
        ops.capture_rows(**arguments)
    assert str(error.value).startswith(message)
    assert (arguments["bank"] == 0).all()


def test_refuses_a_batch_larger_than_the_ring():
    arguments = GOOD | {"bank": torch.zeros(2, 2, 5), "norm2": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"^capture_rows: the batch must fit the bank, got B=3 with N=2$"):
        ops.capture_rows(**arguments)
