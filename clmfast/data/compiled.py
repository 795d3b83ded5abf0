"""numba's njit with its cache on disk where there is room for one, and without it elsewhere.

numba keeps compiled functions beside the source or else under the home folder, and refuses to work where it can write
to neither: a package that another user installed, with no HOME. It also fails for a damaged file in its cache, or on a
full disk. The cache only saves a second or two, so whatever is wrong with it, the function is compiled instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


class _ForgivingCache(FunctionCache):
    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # what unpickling half a file raises is anything
            with suppress(Exception):
                self.flush()  # else it would be in the way for ever
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):  # a full disk
            super().save_overload(*arguments)


def compiled(function: Callable) -> Any:
    """The function as machine code, compiled at its first call in a process unless the cache has it."""
    dispatcher: Any = njit(function)
    with suppress(Exception):  # no folder to write to, or a numba that keeps its cache elsewhere
        dispatcher._cache = _ForgivingCache(function)  # as dispatcher.enable_caching() does, with numba's own
    return dispatcher
