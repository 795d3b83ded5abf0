"""The Triton kernels of attention, run by Triton's interpreter on the CPU, or on a GPU where there is one."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton")

import test_attention_compiled  # noqa: E402
from test_attention import assert_as_good_as_eager, eager, gradient, lengths_for, normal  # noqa: E402

from clmfast import ops  # noqa: E402
from clmfast.ops import attention_triton, reference  # noqa: E402
from clmfast.ops.attention_triton import ALL_FULL, LENGTHS, OFFSETS, Form  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, H, W: several sequences in a tile, a tile that is not full, tiles that meet, widths that are padded
SHAPES = [
    (1, 1, 1, 16), (5, 5, 2, 7), (3, 32, 1, 32), (2, 70, 1, 20),
    (5, 10, 1, 64), (4, 33, 2, 33), (3, 130, 1, 64),
    (3, 9, 1, 100), (2, 65, 1, 128),
]  # fmt: skip


@pytest.fixture(autouse=True)
def whole_interpreter(monkeypatch):
    """What Triton's interpreter lacks. It keeps bfloat16 as bits, and multiplies these; here it multiplies the numbers.
    With NumPy 2.4, Triton 3.6 takes no integer from an array of one element (drop with Triton 3.9)."""
    if ON_GPU:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch_tensor = interpreter._patch_lang_tensor

    def with_integers(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_integers)
    dot = InterpreterBuilder.create_dot

    def as_numbers(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, as_numbers(a), as_numbers(b), *rest)
    )


class Kernels(torch.autograd.Function):
    """attention_triton's two launchers as one function of qkv [rows, 3, H, W]."""

    @staticmethod
    def forward(ctx, qkv, form):
        ctx.form = form
        out, lse = attention_triton.forward(qkv, form)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        return attention_triton.backward(grad_out, *ctx.saved_tensors, ctx.form), None


def padded(qkv, lengths):
    B, T, _, H, W = qkv.shape
    lengths = lengths if lengths is None else lengths.to(DEVICE)
    form = Form(ALL_FULL, B, T) if lengths is None else Form(LENGTHS, B, T, lengths)
    return Kernels.apply(qkv.flatten(0, 1).to(DEVICE), form).view(B, T, H, W).to(qkv.device)


def test_shapes_reach_every_configuration():
    """With one of them on each path for every dtype and width, all that is compiled is also run."""
    reached = set()
    for dtype, (_, T, _, W) in itertools.product(DTYPES, SHAPES):
        width = next(width for width in attention_triton.WIDTHS if width >= W)
        reached.add((dtype, width, attention_triton.choose(dtype, width, T)))
    every = itertools.product(attention_triton.DTYPES, attention_triton.WIDTHS, range(1, 2049))
    assert reached == {(dtype, width, attention_triton.choose(dtype, width, T)) for dtype, width, T in every}


@pytest.fixture
def new_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_lengths", [False, True])
def test_against_reference(shape, dtype, has_lengths, new_memory_is_nan):
    B, T, H, W = shape
    qkv, grad_out = normal(B, T, 3, H, W).to(dtype), normal(B, T, H, W, seed=1).to(dtype)
    lengths = torch.cat([lengths_for(B, T), torch.tensor([T - 1])])[:B] if has_lengths else None
    exact = reference.attention(qkv, lengths)
    exact_grad = gradient(lambda x: reference.attention(x, lengths), qkv.double(), grad_out.double())
    spoilt, spoilt_grad_out = qkv.clone(), grad_out.clone()
    if has_lengths:
        is_padding = torch.arange(T) >= lengths[:, None]
        spoilt[is_padding] = spoilt_grad_out[is_padding] = torch.nan  # must not be read
    out = padded(spoilt, lengths)
    grad = gradient(lambda x: padded(x, lengths), spoilt, spoilt_grad_out)
    assert out.dtype == dtype
    assert_as_good_as_eager(out, eager(qkv, lengths), exact)
    assert_as_good_as_eager(grad, gradient(lambda x: eager(x, lengths), qkv, grad_out), exact_grad)
    if has_lengths:
        assert (out[is_padding] == 0).all() and (grad[is_padding] == 0).all()


@pytest.mark.parametrize("own", [(5, 11, 0, 1, 14, 20, 3), (5, 40, 0, 1, 90, 3)])
def test_packed(own, new_memory_is_nan):
    """Back to back, against the CPU op of each sequence; both paths."""
    offset = torch.tensor([0, *own]).cumsum(0)
    n, H, W = int(offset[-1]), 2, 32
    qkv, grad_out = normal(n, 3, H, W).float(), normal(n, H, W, seed=1).float()
    form = Form(OFFSETS, len(own), max(own), offset.to(DEVICE))

    def kernels(x):
        return Kernels.apply(x.to(DEVICE), form).cpu()

    def sequences(x):
        return torch.cat([reference.attention(part[None])[0] for part in x.split(list(own))])

    torch.testing.assert_close(kernels(qkv).double(), sequences(qkv), rtol=0, atol=3e-6)
    exact = gradient(sequences, qkv.double(), grad_out.double())
    torch.testing.assert_close(gradient(kernels, qkv, grad_out).double(), exact, rtol=0, atol=1e-5)
    ours = ops.packed_attention(qkv.double(), offset, max(own))
    torch.testing.assert_close(ours, sequences(qkv), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_prefix", [7, 41])
def test_a_prefix_stands_before_its_sequences(n_prefix):
    """Sequences 1 and 3 continue 0, sequence 2 stands alone."""
    offset, prefix = (
        torch.tensor([0, n_prefix, n_prefix + 3, n_prefix + 7, n_prefix + 11]),
        torch.tensor([-1, 0, -1, 0]),
    )
    qkv = normal(int(offset[-1]), 3, 2, 32).float()
    form = Form(OFFSETS, 4, n_prefix + 4, offset.to(DEVICE), prefix.to(DEVICE))
    out, _ = attention_triton.forward(qkv.to(DEVICE), form)
    parts = qkv.split([n_prefix, 3, 4, 4])
    expected = [
        reference.attention(parts[0][None])[0],
        reference.attention(torch.cat([parts[0], parts[1]])[None])[0, n_prefix:],
        reference.attention(parts[2][None])[0],
        reference.attention(torch.cat([parts[0], parts[3]])[None])[0, n_prefix:],
    ]
    torch.testing.assert_close(out.cpu().double(), torch.cat(expected), rtol=0, atol=3e-6)
    ours = ops.packed_attention(qkv, offset, n_prefix + 4, prefix)
    torch.testing.assert_close(ours.double(), torch.cat(expected), rtol=0, atol=3e-6)


def test_lse():
    for T in (9, 70):
        qkv = normal(2, T, 3, 2, 32).float()
        _, expected = torch.ops.clmfast.attention(qkv, torch.tensor([T, 4]))
        lengths = torch.tensor([T, 4], device=DEVICE)
        _, lse = attention_triton.forward(qkv.flatten(0, 1).to(DEVICE), Form(LENGTHS, 2, T, lengths))
        torch.testing.assert_close(lse.view(2, T, 2).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [7, 65])
def test_kernels_are_launched_as_they_were_compiled(T, monkeypatch):
    """The table of test_attention_compiled.py speaks of these launches: its configuration, and pointers to numbers at
    multiples of 16 bytes, wherever the caller's tensors begin."""
    launched = set()

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(attention_triton, name)

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                numbers = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
                assert all(x.data_ptr() % 16 == 0 and x.is_contiguous() for x in numbers)
                launched.add((self.name, *arguments[-3:], *options.items()))
                return self.kernel[grid](*arguments, **options)

            return launch

    names = test_attention_compiled.SHORT + test_attention_compiled.LONG
    for name in names:
        monkeypatch.setattr(attention_triton, name, Spy(name))
    qkv = normal(1, T, 3, 1, 32).bfloat16()
    off = torch.cat([qkv.flatten()[:1], qkv.flatten()])[1:].view_as(qkv)  # begins two bytes later
    grad = gradient(lambda x: padded(x, None), off, normal(1, T, 1, 32).bfloat16())
    assert grad.isfinite().all()
    variants = test_attention_compiled.variants().values()
    is_short, _ = attention_triton.choose(torch.bfloat16, 32, T)
    path = test_attention_compiled.SHORT if is_short else test_attention_compiled.LONG
    checked = {
        (name, width, c.own, c.walked, ("num_warps", c.num_warps), ("num_stages", c.num_stages))
        for name, dtype, width, c in variants
        if dtype == torch.bfloat16 and width == 32 and name in path
    }
    assert launched == checked
