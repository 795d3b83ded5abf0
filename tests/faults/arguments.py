"""Arguments of a call before there are any tensors: described, spoilt in one place or two, then made in guarded memory.

A case is a plain dict of arguments in which a `Spec` stands for each tensor, also within lists and tuples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.faults.guard import Guard, Placed, span_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (
    torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16, torch.bool, torch.complex64, torch.uint64,
    torch.float8_e5m2,
)  # fmt: skip
INT64 = torch.iinfo(torch.int64)
COUNTS = (0, -1, 1, 2, 3, 255, 257, 2**15, 2**28, 2**31 - 1, 2**31, 2**32 + 1, 2**62, INT64.max, INT64.min, 2**63)
NUMBERS = (0.0, -1.0, 1e-45, 1e-300, 1e300, math.inf, -math.inf, math.nan)
INDICES = (-1, -2, INT64.min, INT64.max, 2**31, 2**32, 2**62, -(2**31), 1000)
SIZES = (0, 1, 2, 3, 17, 33, 257, 513)


@dataclass(eq=False)
class Spec:
    """A tensor to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    fill: tuple[Any, ...] = ("normal", 1.0)  # or ("labels", low, high), ("values", [...])
    layout: tuple[Any, ...] = ()  # () contiguous; else see strides()
    spots: list[tuple[float, Any]] = field(default_factory=list)  # (where, of the whole; the value there)
    device: str = "cpu"
    form: str = "tensor"  # numpy, list, sparse, negated
    grad: bool = False
    at_end: bool = True

    def __repr__(self) -> str:
        parts = [f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"]
        if self.fill != ("normal", 1.0):
            parts.append(f"{self.fill[0]}={self.fill[1] if self.fill[0] == 'values' else self.fill[1:]}")
        for name in ("layout", "spots"):
            if value := getattr(self, name):
                parts.append(f"{name}={value}")
        parts += [x for x in (self.device, self.form) if x not in ("cpu", "tensor")] + ["grad"] * self.grad
        return "<" + " ".join(parts) + ("" if self.at_end else " at start") + ">"

    def strides(self) -> tuple[int, ...]:
        kind, *how = self.layout or ("contiguous",)
        order = list(range(len(self.shape)))
        if kind == "permuted":
            order = [i for i in how[0] if i < len(order)]
        step = how[0] if kind == "sliced" else 1
        strides = [0] * len(self.shape)
        for i in reversed(order):
            strides[i] = step
            step *= max(1, self.shape[i])
            if kind == "padded":
                step += how[0]
        if kind == "expanded" and how[0] < len(strides):
            strides[how[0]] = 0
        if kind == "overlapping":
            strides = [1] * len(strides)
        return tuple(strides)


class Made(NamedTuple):
    """The arguments as tensors, and what lies in guarded memory."""

    arguments: dict[str, Any]
    placed: list[tuple[Spec, Placed]]


def leaves(arguments: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(container, key, value) of every argument, within lists too."""
    for key, value in arguments.items() if isinstance(arguments, dict) else enumerate(arguments):
        if isinstance(value, list):
            yield from leaves(value)
        else:
            yield arguments, key, value


class Maker:
    """Makes tensors of one case after the other, in the same memory."""

    def __init__(self) -> None:
        self.guard = Guard()
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(1 << 16, generator=generator, dtype=torch.float64)
        self.integers = torch.randint(1 << 40, (1 << 16,), generator=generator)

    def make(self, arguments: dict[str, Any], rng: Random) -> Made:
        self.guard.clear()
        placed: list[tuple[Spec, Placed]] = []
        done: dict[int, Any] = {}

        def made(value: Any) -> Any:
            if isinstance(value, Spec):
                if id(value) not in done:
                    done[id(value)] = self._tensor(value, rng, placed)
                return done[id(value)]
            return [made(x) for x in value] if isinstance(value, list) else value

        return Made({name: made(value) for name, value in arguments.items()}, placed)

    def _tensor(self, spec: Spec, rng: Random, placed: list[tuple[Spec, Placed]]) -> Any:
        if spec.device != "cpu":
            return torch.empty_strided(spec.shape, spec.strides(), dtype=spec.dtype, device=spec.device)
        strides = spec.strides()
        place = self.guard.place(spec.shape, strides, spec.dtype, spec.at_end)
        if place is None:
            x = torch.empty_strided(spec.shape, strides, dtype=spec.dtype)
            flat = x.as_strided((span_of(spec.shape, strides),), (1,))
        else:
            placed.append((spec, place))
            x, flat = place.tensor, place.memory
        is_dense = spec.layout[:1] not in (("expanded",), ("overlapping",))
        to = x if is_dense else flat
        if to.numel():
            self._fill(to, spec, rng)
        for where, value in spec.spots:
            if flat.numel():
                flat[int(where * (flat.numel() - 1))] = _fitting(value, spec.dtype)
        is_small = math.prod(spec.shape) < 1 << 20
        if spec.form == "numpy" and spec.dtype not in (torch.bfloat16, torch.float8_e5m2):
            return x.numpy()
        if spec.form == "list" and is_small:
            return x.tolist()
        if spec.form == "sparse" and is_small:
            return x.to_sparse()
        if spec.form == "negated":
            return x._neg_view()
        return x.requires_grad_() if spec.grad and spec.dtype.is_floating_point else x

    def _fill(self, x: Tensor, spec: Spec, rng: Random) -> None:
        kind, *how = spec.fill
        n = x.numel()
        if kind == "values":
            values = torch.tensor([*how[0]][:n] or [0])
            x.copy_(values.repeat(-(-n // len(values)))[:n].view(x.shape))
            return
        pool = self.pool if kind == "normal" else self.integers
        if n > len(pool):
            source = pool.repeat(-(-n // len(pool)))[:n]
        else:
            first = rng.randrange(len(pool) - n + 1)
            source = pool[first : first + n]
        if kind == "normal":
            source = source * how[0]
        elif kind == "rounded":
            source = self.pool[: len(source)].repeat(-(-n // len(self.pool)))[:n].roll(rng.randrange(64)).round()
        else:
            low, high = how
            source = source % max(1, high - low) + low
        x.copy_(source.view(x.shape))


def _fitting(value: Any, dtype: torch.dtype) -> Any:
    """torch refuses to assign a finite number that the dtype does not reach."""
    if dtype.is_floating_point and math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        return math.copysign(math.inf, value)
    return value


# ---- what is done to arguments that were good

BENIGN = {"layout", "at_start"}  # the call stays a good one


def spoil(arguments: dict[str, Any], rng: Random, is_public: bool, is_free: dict[str, tuple[Any, ...]]) -> list[str]:
    """Change one or two things, in place; returns their names. `is_free` holds the counts that an argument may take
    where the work grows with it, as no call may take for ever."""
    names = []
    for _ in range(1 + (rng.random() < 0.4)):
        at = [leaf for leaf in leaves(arguments) if not isinstance(leaf[2], str)]
        if not at:
            break
        container, key, value = at[rng.randrange(len(at))]
        if isinstance(value, Spec):
            name = _spoil_tensor(container, key, value, rng, is_public, at)
        else:
            name = "number"
            container[key] = _other_scalar(value, rng, is_free.get(key, ()), at)
        names.append(f"{name} of {key}")
    return names


def _other_scalar(value: Any, rng: Random, free: tuple[Any, ...], at: list[tuple[Any, Any, Any]]) -> Any:
    if rng.random() < 0.05:
        return rng.choice((None, "x", 1.5, True, [1], 1 << 70))
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if value is None and rng.random() < 0.7:
        tensors = [v for _, _, v in at if isinstance(v, Spec)]
        return rng.choice(tensors) if tensors else None
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice((-1, 1))
    return rng.choice(free or COUNTS)


def _spoil_tensor(
    container: Any, key: Any, spec: Spec, rng: Random, is_public: bool, at: list[tuple[Any, Any, Any]]
) -> str:
    new = container[key] = copy(spec)
    n_dims = len(spec.shape)
    chance = rng.random()
    if chance < 0.25:
        new.layout = _layout(n_dims, rng)
        return "layout" if new.layout[0] not in ("expanded", "overlapping") else "overlap"
    if chance < 0.45:
        new.spots = [(rng.random(), _spot(spec.dtype, rng)) for _ in range(rng.choice((1, 1, 3)))]
        return "values"
    if chance < 0.50:
        scale = rng.choice((0.0, 1e-41, 1e-22, 1e18, 1e38, 1e300))
        new.fill = ("normal", scale) if spec.dtype.is_floating_point else ("labels", INT64.min, INT64.min + 9)
        return "values"
    if chance < 0.65:
        return _spoil_shape(new, rng)
    if chance < 0.75:
        new.dtype = rng.choice(FLOATS if rng.random() < 0.4 else OTHERS)
        return "dtype"
    if chance < 0.79:
        new.device = "meta"
        return "device"
    if chance < 0.84:
        container[key] = rng.choice((None, None, None, 1, "x", [], [0.5]))
        return "kind"
    if chance < 0.89:
        container[key] = rng.choice([v for _, _, v in at if isinstance(v, Spec)])
        return "alias"
    if chance < 0.92:
        new.form = rng.choice(("sparse", "negated")) if spec.dtype.is_floating_point else "sparse"
        return new.form
    if chance < 0.96 and is_public:
        new.form = rng.choice(("numpy", "list"))
        return new.form
    new.at_end = False
    return "at_start"


def _layout(n_dims: int, rng: Random) -> tuple[Any, ...]:
    kind = rng.choice(("permuted", "permuted", "sliced", "padded", "expanded", "overlapping"))
    if kind == "permuted":
        return kind, rng.sample(range(n_dims), n_dims)
    if kind == "sliced" or kind == "padded":
        return kind, rng.choice((2, 3))
    return (kind, rng.randrange(max(1, n_dims))) if kind == "expanded" else (kind,)


def _spot(dtype: torch.dtype, rng: Random) -> Any:
    if dtype.is_floating_point:
        return rng.choice((math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-41, 0.0))
    return rng.choice(INDICES) if dtype == torch.int64 else 1


def _spoil_shape(new: Spec, rng: Random) -> str:
    shape = list(new.shape)
    how = rng.choice(("size", "size", "size", "more", "fewer", "swap", "huge"))
    if how == "more" or not shape:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((1, 1, 2)))
    elif how == "fewer":
        del shape[rng.randrange(len(shape))]
    elif how == "swap":
        i = rng.randrange(len(shape))
        shape[i], shape[0] = shape[0], shape[i]
    else:
        i = rng.randrange(len(shape))
        if how == "huge":  # a stride of 0 takes no memory
            new.layout = ("expanded", i)
            shape[i] = rng.choice((2**31, 2**33, 2**40))
        else:
            shape[i] = max(0, rng.choice((shape[i] - 1, shape[i] + 1, rng.choice(SIZES))))
    new.shape = tuple(shape)
    return "shape"
