"""Paths as people write them: `~` and `$NAME` stand for what a shell would put there.

A shell does so itself in most places, but not in `--out=~/runs`, in quotes, in a notebook or in a config file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from clmfast.config import ConfigError

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))", re.ASCII)


def expanded(path: str | Path) -> Path:
    """The path with `~`, `~user`, `$NAME` and `${NAME}` filled in; ConfigError for a user or a variable that is not
    known. One that exists as it is written is taken so."""
    text = os.fspath(path)
    if "\0" in text:
        raise ConfigError(f"a path must hold no NUL, got {text!r}")
    if os.path.lexists(text):
        return Path(text)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ConfigError(f"the variable {found[0]} in the path {text} must be defined, it is not")
        return os.environ[name]

    filled = VARIABLE.sub(value, text)
    if not text.startswith("~"):
        return Path(filled)
    home = os.path.expanduser(filled)
    if home.startswith("~"):
        raise ConfigError(f"the home folder in the path {text} must be known, it is not: write the path out")
    return Path(home)


def target(out: str | Path | None, name: str, default: Path) -> Path:
    """Where a file goes: `out` itself, or under its name into the folder that `out` is; without `out`, into `default`.
    ConfigError where no file can be put there."""
    if out is None:
        return default / name
    path = expanded(out)
    if path.is_dir():
        path /= name
    if not path.parent.is_dir():
        raise ConfigError(f"--out must be a file in a folder that exists, or such a folder, got {path}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out must be a file that can be replaced, {path} is none")  # /dev/null would be lost
    return path
