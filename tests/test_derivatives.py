"""clmfast.ops.derivatives: what a fused op cannot differentiate it refuses, however it is asked; composed() can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from clmfast import ops
from clmfast.config import ModelConfig
from clmfast.model import Transformer

Function = Callable[[Tensor], Tensor]
TOKENS, OFFSET = torch.arange(12) * 7 % 20, torch.tensor([0, 5, 12])
WEIGHT = "blocks.0.qkv.weight"


def model_of_a_weight(dtype: torch.dtype = torch.float32) -> tuple[Function, Tensor]:
    """The sum of squared logits of a small model, as a function of one of its weights; and that weight."""
    model = Transformer(ModelConfig(n_layers=2, width=16, n_heads=2), 20, 8, 0).to(dtype)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    f = lambda w: functional_call(model, {**weights, WEIGHT: w}, (TOKENS, OFFSET)).square().sum()  # noqa: E731
    return f, weights[WEIGHT]


def functions() -> dict[str, tuple[Function, Tensor]]:
    """Every op that has a gradient, and the model, as a function of one tensor."""
    block = Transformer(ModelConfig(n_layers=1, width=16, n_heads=2), 20, 8, 0).blocks[0]
    of_attention, of_mlp = block.weights()
    generator = torch.Generator().manual_seed(1)
    x, qkv = torch.randn(12, 16, generator=generator), torch.randn(2, 6, 3, 2, 8, generator=generator)
    return {
        "attention": (ops.attention, qkv),
        "packed_attention": (lambda qkv: ops.packed_attention(qkv.flatten(0, 1), OFFSET, 7), qkv),
        "mlp_block": (lambda x: ops.mlp_block(x, of_mlp), x),
        "attention_block": (lambda x: ops.attention_block(x, of_attention, 2, OFFSET), x),
        "transformer_blocks": (lambda x: ops.transformer_blocks(x, [(of_attention, of_mlp)], 2, OFFSET)[-1], x),
        "a block's weight": (lambda w: ops.mlp_block(x, of_mlp._replace(in_weight=w)), of_mlp.in_weight.detach()),
        "the model": model_of_a_weight(),
    }


def loss(f: Function) -> Function:
    return lambda x: f(x).square().sum()


def second_by_grad(f: Function, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad((first * v).sum(), x)[0]


def forward_mode(f: Function, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


WAYS = {
    "grad of grad": second_by_grad,
    "functional.hessian": lambda f, x, v: torch.autograd.functional.hessian(loss(f), x, vectorize=True),
    "functional.hvp": lambda f, x, v: torch.autograd.functional.hvp(loss(f), x, v)[1],
    "functional.jvp": lambda f, x, v: torch.autograd.functional.jvp(f, x, v)[1],
    "forward mode": forward_mode,
    "func.jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "func.grad": lambda f, x, v: grad(loss(f))(x),
    "func.hessian": lambda f, x, v: hessian(loss(f))(x),
    "vmap of grad": lambda f, x, v: vmap(grad(loss(f)))(x[None]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", functions())
def test_what_is_not_there_is_refused(name: str, way: str) -> None:
    f, x = functions()[name]
    with pytest.raises(RuntimeError, match=r"has the first derivative alone, by backward\(\), got") as error:
        WAYS[way](f, x, torch.ones_like(x))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", functions())
def test_the_first_derivative_is_there(name: str) -> None:
    f, x = functions()[name]
    fused, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(f)(fused).backward()
    with ops.composed():
        loss(f)(other).backward()
    torch.testing.assert_close(fused.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_composed_has_all(way: str) -> None:
    """Against differences in float64."""
    f, x = model_of_a_weight(torch.float64)
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    step = 1e-5

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    tangent = (f(x + step * v) - f(x - step * v)) / (2 * step)
    with ops.composed():
        second = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
        if way in ("functional.jvp", "func.jvp", "forward mode"):
            found, expected = WAYS[way](f, x, v), tangent
        elif way in ("func.grad", "vmap of grad"):
            found, expected = WAYS[way](lambda x: f(x).sqrt(), x, v).view_as(x), gradient(x)
        else:
            found, expected = WAYS[way](lambda x: f(x).sqrt(), x, v), second
            found = found if found.dim() == 2 else torch.einsum("abcd,cd->ab", found, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_composed_ends_with_its_block() -> None:
    f, x = functions()["attention"]
    with pytest.raises(ZeroDivisionError), ops.composed(), ops.composed():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="got forward mode"):
        forward_mode(f, x, x)
