"""clmfast: how the hidden states of a Transformer cluster by task, every layer, at every training step.

`clmfast.load(dir)` reads a run; `python -m clmfast.run` makes one. Importing this module imports no torch.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # numpy and the reader are loaded by the first use, so that `--help` need not wait for them.
    if name == "load":
        from clmfast.record import load

        return load
    raise AttributeError(f"module clmfast has no attribute {name}")
