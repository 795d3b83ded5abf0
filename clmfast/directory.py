"""A run's directory: made for one run, held by one process, and what a stopped run goes on from.

A directory is made exclusively, and whoever writes into it holds its lock, which the system takes from a process that
dies. config.json is written before anything else: with it, a run can be resumed, whatever else is missing.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmfast.config import ConfigError, RunConfig, from_dict, from_file, to_dict
from clmfast.files import (
    LOCK,
    PART,
    DamagedCheckpoint,
    checkpoints,
    hold,
    make_folder,
    read_checkpoint,
    remove_parts,
    write_json,
)
from clmfast.measure.catalogue import MEASUREMENT_VERSION
from clmfast.schema import check_header
from clmfast.untrusted import is_there, read_json, read_table, refusing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    State = tuple[dict[str, Tensor], dict[str, Any]]

FOLDERS = ("checkpoints", "projections", "resume")  # what a run makes in its directory


def check_new(path: Path) -> None:
    """ConfigError unless a run can be made in `path`: it is new or an empty directory, and can be written to."""
    if not (path.exists() or path.is_symlink()):
        check_writable(existing_parent(path))
    elif path.is_dir() and is_empty(path):
        check_writable(path)
    else:
        raise ConfigError(f"--out must name a new or an empty directory, {path} exists (--resume goes on with a run)")


def check_writable(folder: Path) -> None:
    """ConfigError unless files can be made in `folder`."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--out must be in a directory that can be written to, {folder} cannot")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def is_empty(path: Path) -> bool:
    """Is nothing there, but for what a process leaves that died before it had begun?"""
    return all(name == LOCK or PART.fullmatch(name) for name in os.listdir(path))


def claim(path: Path) -> int:
    """Make the directory of a new run, or take an empty one; returns the lock. ConfigError where a run is there."""
    check_new(path)
    make_folder(path)
    lock = _hold(path)
    try:
        check_new(path)  # once more: another run may have begun, and ended, since
        remove_parts(path)
    except BaseException:
        os.close(lock)
        raise
    return lock


def claim_free_name(folder: Path, seed: int) -> tuple[Path, int]:
    """(directory, lock) of a new run under a name of its own: the time and the seed."""
    name, i = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}", 1
    while True:
        path = folder / (name if i == 1 else f"{name}-{i}")
        try:
            return path, claim(path)
        except ConfigError:
            if not path.exists():
                raise
            i += 1


def _hold(path: Path) -> int:
    try:
        return hold(path)
    except BlockingIOError:
        raise ConfigError(f"{path} must be free: another process is writing this run") from None


def reopen(path: Path) -> int:
    """Hold the directory of a run that is to go on, without what a process that died left unfinished there."""
    _need_config(path)
    folders = [path / name for name in FOLDERS]
    if links := [folder.name for folder in folders if folder.is_symlink()]:
        raise ConfigError(f"--resume: {', '.join(links)} in {path} must be of the run itself, got a link to elsewhere")
    lock = _hold(path)
    try:
        for folder in (path, *folders):
            remove_parts(folder)
    except BaseException:
        os.close(lock)
        raise
    return lock


def settings_of(config: RunConfig) -> dict[str, Any]:
    """As plain data, without where the run lies: that is no setting of it, as it may serve another and be published."""
    return to_dict(dataclasses.replace(config, out=""))


def write_config(path: Path, config: RunConfig) -> None:
    """config.json of the run in `path`."""
    write_json(path / "config.json", settings_of(config))


def _need_config(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ConfigError(f"--resume must name a run directory, {path} has no config.json")


def config_of(path: Path) -> RunConfig:
    """The settings of the run in `path`, with `path` as its place; ConfigError."""
    _need_config(path)
    return dataclasses.replace(from_file(path / "config.json", RunConfig()), out=str(path))


def header_of(path: Path) -> dict[str, Any]:
    """meta.json of a run that is to go on; empty where it died before it had one."""
    if not is_there(path / "meta.json"):
        return {}
    with refusing(ConfigError, f"--resume: {path} must have the header of its run"):
        meta = read_json(path / "meta.json")
        check_header(meta)
    if meta["measurement_version"] != MEASUREMENT_VERSION:
        raise ConfigError(
            f"--resume: {path} must be a run of measurement version {MEASUREMENT_VERSION}, as numbers of two versions "
            f"are never mixed, got {meta['measurement_version']}"
        )
    return meta


def settings_that_differ(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings in which two configs, as plain data, differ."""
    found = []
    for name, one in a.items():
        if isinstance(one, dict):
            found += settings_that_differ(one, b[name], f"{prefix}{name}.")
        elif one != b[name]:
            found.append(f"{prefix}{name}")
    return found


def check_same(path: Path, config: RunConfig, meta: dict[str, Any]) -> int:
    """The number of steps that the run was made with so far; ConfigError where another setting has changed since, or
    where `config` asks for fewer steps than are done."""
    before = config_of(path)  # all that a run tells that was made before headers told more
    if isinstance(meta.get("config"), dict):
        # With defaults for settings that a later version added.
        before = from_dict(meta["config"], RunConfig(), str(path / "meta.json"))
    differing = settings_that_differ(settings_of(before), settings_of(dataclasses.replace(config, steps=before.steps)))
    if differing:
        raise ConfigError(
            f"--resume: config.json must be as it was when the run began, changed: {', '.join(differing)} "
            "(only steps may change)"
        )
    n_done = last_row(path)
    if config.steps < n_done:
        raise ConfigError(f"--steps must be at least the {n_done} steps that the run has done, got {config.steps}")
    return before.steps


def last_row(path: Path) -> int:
    """The last row that a run has written; 0 where there is none."""
    if not is_there(path / "steps.npy"):
        return 0
    with refusing(ConfigError, f"--resume: {path} must have the rows of its run"):
        _, first = read_table(path / "steps.npy", None)
    return int(first.nonzero()[0].max(initial=0))


def newest_state(
    path: Path, is_written: NDArray[np.bool_], max_bytes: int, check: Callable[..., None]
) -> tuple[State | None, list[str]]:
    """(the newest state that the run in `path` can go on from, why those after it cannot be used).

    is_written [rows]: the rows that are there; a state needs all that are before it, as nothing computes them again.
    max_bytes: a larger state is of no such run, and is not read.
    `check(tensors, values)` raises ValueError for a state that is of no such run. None: the run starts from step 0.
    """
    skipped = []
    for folder in reversed(checkpoints(path / "resume")):
        try:
            tensors, values = read_checkpoint(folder, max_bytes)
            check(tensors, values)
            step = values["next_step"]
            if step != int(folder.name):
                raise ValueError(f"it must be of step {int(folder.name)}, it is of {step}")
            if not is_written[:step].all():
                raise ValueError(f"it needs the {step} rows before it, {(~is_written[:step]).sum()} are missing")
        except DamagedCheckpoint as error:
            skipped.append(str(error))
        except ValueError as error:
            skipped.append(f"checkpoint {folder.name}: {error}")
        else:
            return (tensors, values), skipped
    return None, skipped
