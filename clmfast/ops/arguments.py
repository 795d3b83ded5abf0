"""What the public ops take for a tensor or a number, made into what the compiled ops take, or refused in one line.

A tensor that is right already is handed on as it is. Arrays and lists go to the device of the tensors beside them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[Any] | Sequence[Any]

POINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.bool,
)  # fmt: skip
INT64 = range(-(2**63), 2**63)


def points(op: str, name: str, x: Array, beside: tuple[object, ...]) -> Tensor:
    """float32, bfloat16 or float16, without its gradient. A list becomes float32; no dtype is rounded to another."""
    if not isinstance(x, Tensor):
        given = _array(op, name, x)
        if not isinstance(x, np.ndarray) and given.dtype.kind in "iuf":
            try:
                with np.errstate(over="raise"):
                    given = given.astype(np.float32)
            except FloatingPointError as error:
                raise ValueError(f"{op}: {name} must fit float32, got a number that is too large") from error
        if given.dtype not in (np.float32, np.float16):
            raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {given.dtype}")
        return _tensor(given, beside)
    if x.dtype not in POINT_DTYPES:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(x)}")
    return _dense(op, name, x).detach()


def floats(op: str, name: str, x: Array, beside: tuple[object, ...]) -> Tensor:
    """float32."""
    found = points(op, name, x, beside) if not isinstance(x, Tensor) else _dense(op, name, x).detach()
    if found.dtype != torch.float32:
        raise ValueError(f"{op}: {name} must be float32, got {dtype_name(found)}")
    return found


def labels(op: str, name: str, x: Array | int, beside: tuple[object, ...]) -> Tensor:
    """int64, from integers of any size and from booleans."""
    if isinstance(x, Tensor):
        if x.dtype == torch.int64:
            return _dense(op, name, x)
        if x.dtype in INTEGERS:
            return _dense(op, name, x).to(torch.int64)
        if x.dtype != torch.uint64:
            raise ValueError(f"{op}: {name} must be integers, got {dtype_name(x)}")
        found = _dense(op, name, x).to(torch.int64)
        is_too_large = found.device.type != "meta" and bool((found < 0).any())
    else:
        given = _array(op, name, x)
        if given.dtype.kind not in "iub" and (given.size or isinstance(x, np.ndarray)):  # of an empty list: any
            raise ValueError(f"{op}: {name} must be integers, got {given.dtype}")
        is_too_large = given.dtype.kind == "u" and given.size > 0 and int(given.max()) not in INT64
        found = _tensor(given.astype(np.int64, copy=False), beside)
    if is_too_large:
        raise ValueError(f"{op}: {name} must be below 2^63, got a larger one of uint64")
    return found


def written(op: str, name: str, x: Tensor | NDArray[Any]) -> Tensor:
    """What an op writes in place: a tensor, or an array, whose memory it is."""
    if isinstance(x, np.ndarray):
        if not x.flags.writeable:
            raise ValueError(f"{op}: {name} must be writable, got an array that is not")
        try:
            return torch.from_numpy(x)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {name} must be an array that torch can share, got one of {x.dtype}") from error
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor or an array, to be written in place, got {type(x).__name__}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, as it is written in place")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{op}: {name} must hold its values as they are, got a negated view")
    return _dense(op, name, x)


def require_tensors(op: str, *given: object, or_none: tuple[object, ...] = ()) -> None:
    """For ops that take nothing but tensors; those of `or_none` may be left out."""
    for x in (*given, *(x for x in or_none if x is not None)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: takes tensors alone, got {_short(x)}")


def require_one_device(op: str, *given: object) -> None:
    devices = {x.device for x in given if isinstance(x, Tensor)}
    if len(devices) > 1:
        both = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: all tensors must be on one device, got {both}")


def integer(op: str, name: str, value: int) -> int:
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        if torch.compiler.is_compiling() or value in INT64:
            return value
        raise ValueError(f"{op}: {name} must be in [-2^63, 2^63), got {name}={value}")
    if not isinstance(value, bool):
        try:
            return integer(op, name, operator.index(value))
        except TypeError:
            pass
    raise TypeError(f"{op}: {name} must be an integer, got {_short(value)}")


def number(op: str, name: str, value: float) -> float:
    if isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} must be within float64, got an integer beyond") from None
    raise TypeError(f"{op}: {name} must be a number, got {_short(value)}")


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.register_fake("clmfast::" + op), which also meets tensors of the meta device among others.

    torch takes such a call for one on the meta device alone, whose results hold nothing that was computed.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        schema = getattr(torch.ops.clmfast, op).default._schema.arguments
        required = [(i, argument.name) for i, argument in enumerate(schema) if str(argument.type) == "Tensor"]

        def checked(*arguments: Any) -> Any:
            for i, name in required:
                if arguments[i] is None:  # what torch makes of a tensor that is none
                    raise ValueError(f"{op}: {name} must be a tensor, got None")
            require_one_device(op, *(x for a in arguments for x in (a if isinstance(a, list | tuple) else (a,))))
            return fake(*arguments)

        torch.library.register_fake(f"clmfast::{op}", checked)
        return fake

    return register


def _array(op: str, name: str, x: object) -> NDArray[Any]:
    if x is None:
        raise ValueError(f"{op}: {name} must be a tensor, an array or a list, got None")
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(f"{op}: {name} must have no mask, got a masked array")
    try:
        given = np.asarray(x)
        return given.astype(given.dtype.newbyteorder("="), copy=False)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{op}: {name} must be a tensor, an array or a list of equal rows: {reason}") from error


def _tensor(x: NDArray[Any], beside: tuple[object, ...]) -> Tensor:
    """On the device of the first tensor beside it; without any, on the CPU."""
    # torch shares memory only with arrays of this kind; a copy serves for the others.
    found = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    return next((found.to(other.device) for other in beside if isinstance(other, Tensor)), found)


def _dense(op: str, name: str, x: Tensor) -> Tensor:
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{op}: {name} must be dense, got {'nested' if x.is_nested else _without_torch(x.layout)}")
    return x


def dtype_name(x: Tensor) -> str:
    """As an error tells it."""
    return _without_torch(x.dtype)


def _without_torch(x: object) -> str:
    return str(x).removeprefix("torch.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__
