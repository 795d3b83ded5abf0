"""What is printed: on any stdout and stderr, closed, full, left by its reader or of a narrow encoding.

`forgiving()` puts a `Screen` before each of the two for as long as a command works, so that print, rich, argparse and
tyro need to know nothing of it. Text that cannot be shown never ends a run and never changes its exit code: characters
that the encoding lacks are written as escapes, and what the stream does not take is dropped; the next line tries anew.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console

from clmfast.untrusted import one_line

PLAIN_WIDTH = 160  # columns of the table where there is no terminal to ask
MIN_WIDTH = 40  # a terminal that says it is narrower gets long lines: letters below each other say nothing
MAX_LINE = 5000  # characters of a message: a path may have 4096, and what came may be a whole file
PATIENCE_S = 10.0  # how long a stream that does not block may be full before a text is dropped


class Screen(io.TextIOBase):
    """A text stream that never fails, before one that may; `stream` None swallows all."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._file = _file_of(stream)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the stream below; rich draws its tables accordingly."""
        name = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            return codecs.lookup(name).name
        except LookupError:
            return "ascii"

    def write(self, text: str) -> int:
        """Write as much of the text as the stream takes; returns its length all the same."""
        if self.stream is None:
            return len(text)
        shown = text.encode(self.encoding, "backslashreplace")
        with suppress(OSError, ValueError):  # ValueError: closed, by whoever owns it
            if self._file is None:
                self.stream.write(shown.decode(self.encoding))
            else:
                # Not through the stream's own buffer: what a full disk or a reader that has left does not take would
                # stay there, and fail once more when Python ends, with exit code 120.
                self.stream.flush()
                _write_all(self._file, shown)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if self.stream is not None and self._file is None:
                self.stream.flush()

    def isatty(self) -> bool:
        try:
            return bool(self.stream.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._file is None:
            raise io.UnsupportedOperation("fileno")
        return self._file

    def writable(self) -> bool:
        return True


def _file_of(stream: Any) -> int | None:
    """The number of the file that a stream writes to by itself; None for what somebody put in its place (a notebook,
    rich, a test), which has to get its text by `write`."""
    if type(stream) is not io.TextIOWrapper:
        return None
    with suppress(OSError, ValueError):
        return stream.fileno()
    return None


def _write_all(file: int, content: bytes) -> None:
    while content:
        try:
            content = content[os.write(file, content) :]
        except BlockingIOError:
            if not select.select([], [file], [], PATIENCE_S)[1]:
                return


def keep_standard_files() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: the next file that is opened would take that place, and
    whatever a library prints would be written into it."""
    for file in range(3):
        try:
            os.fstat(file)
        except OSError:
            taken = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one, as those below are taken
            if taken == file:
                os.set_inheritable(file, True)  # a child's, too
            else:
                os.close(taken)


@contextmanager
def forgiving() -> Iterator[None]:
    """A Screen in place of sys.stdout and sys.stderr, for as long as a command works."""
    keep_standard_files()
    before = sys.stdout, sys.stderr
    screens = Screen(sys.stdout), Screen(sys.stderr)
    sys.stdout, sys.stderr = screens
    try:
        yield
    finally:
        if sys.stdout is screens[0]:  # else somebody else's, who puts back what there was before
            sys.stdout = before[0]
        if sys.stderr is screens[1]:
            sys.stderr = before[1]


def console() -> Console:
    """rich's printer on the stdout of now. Texts are no markup to it: paths may hold [/]."""
    screen = sys.stdout if isinstance(sys.stdout, Screen) else Screen(sys.stdout)
    found = Console(file=cast("IO[str]", screen), highlight=False, markup=False, emoji=False, force_jupyter=False)
    if not screen.isatty():
        found.width = PLAIN_WIDTH
    elif found.width < MIN_WIDTH:
        found.width = MIN_WIDTH
    return found


def is_live(on: Console) -> bool:
    """Can a line be written over? Not in a file (whatever FORCE_COLOR says), and not on a terminal of unknown type."""
    return on.file.isatty() and on.is_terminal and not on.is_dumb_terminal and bool(os.environ.get("TERM", ""))


def complain(who: str, what: object) -> None:
    """One line on stderr."""
    screen = sys.stderr if isinstance(sys.stderr, Screen) else Screen(sys.stderr)
    screen.write(f"{who}: {one_line(what, MAX_LINE)}\n")
