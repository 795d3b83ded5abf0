"""The one small layer that every write of a run goes through.

`write_file` and `write_checkpoint` are atomic: after a crash the old content or the new is there, never a part.
`RowFile` is the per-step record: one `pwrite` a row into a .npy file of its full size, so that numpy opens it at any
moment and what was written survives the death of the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clmfast.untrusted import (
    CHECKPOINT_BYTES,
    Damaged,
    need,
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
    refusing,
    sha256_of,
    tensor_shapes,
)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave the one that was there."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON line to a file in a single write."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RowFile:
    """A .npy array [n_rows, *row_shape] that is written row by row; unwritten rows are zeros."""

    def __init__(self, path: Path, n_rows: int, row_shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        """Make the file, or open one of the same shape to go on with it."""
        self.dtype, self.row_shape = np.dtype(dtype), row_shape
        shape = (n_rows, *row_shape)
        if not path.exists():
            with open(path, "wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(file, header)
                n_bytes = int(np.prod(shape)) * self.dtype.itemsize
                # Reserve the space now: a full disk is an error here, not in the middle of the run.
                os.posix_fallocate(file.fileno(), file.tell(), max(1, n_bytes))
                os.truncate(file.fileno(), file.tell() + n_bytes)
        self.array = np.load(path, mmap_mode="r")
        if self.array.shape != shape or self.array.dtype != self.dtype:
            raise ValueError(f"{path} must hold {self.dtype} {shape}, got {self.array.dtype} {self.array.shape}")
        self._offset = self.array.offset
        self._file = os.open(path, os.O_RDWR)

    def write(self, row: int, values: NDArray) -> None:
        """Write one row."""
        data = np.ascontiguousarray(values, self.dtype)
        assert data.shape == self.row_shape
        os.pwrite(self._file, data.tobytes(), self._offset + row * data.nbytes)

    def read(self, row: int) -> NDArray:
        """One row as it is on disk."""
        n_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        data = os.pread(self._file, n_bytes, self._offset + row * n_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.row_shape)

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those of its manifest."""


def write_checkpoint(path: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """A folder of model.safetensors, state.json and, last of all, manifest.json with their sha256; all or nothing.

    `tensors` are torch tensors on any device; an existing folder of that name is replaced.
    """
    from safetensors.torch import save

    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {
        "tensors.safetensors": save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}),
        "state.json": (json.dumps(state, indent=1) + "\n").encode(),
    }
    for name, content in files.items():
        write_file(part / name, content)
    write_json(part / "manifest.json", {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)
    _sync_folder(path.parent)


def read_checkpoint(path: Path, max_bytes: int = CHECKPOINT_BYTES) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, state) of a checkpoint folder; DamagedCheckpoint if it is not what was written.

    `max_bytes` is the most that its tensors may take. They are read for the sum first, in little memory, then again.
    """
    tensors, state = "tensors.safetensors", "state.json"
    with refusing(DamagedCheckpoint, f"checkpoint {path} must be as it was written"):
        manifest = read_json(path / "manifest.json")
        need(
            isinstance(manifest, dict) and set(manifest) == {tensors, state},
            f"manifest.json must name {tensors} and {state} alone",
            manifest,
        )
        content = read_bytes(path / state)
        tensor_shapes(path / tensors, max_bytes)  # before a file of any size is summed
        sums = {state: hashlib.sha256(content).hexdigest(), tensors: sha256_of(path / tensors, max_bytes)}
        for name, found in sums.items():
            need(found == manifest[name], f"{name} must have the sha256 of its manifest", found)
        with refusing(Damaged, state):
            values = parse_json(content)
            need(isinstance(values, dict), "must hold values by name", values)
        return read_tensors(path / tensors, max_bytes), values


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest readable checkpoint of a folder of them; DamagedCheckpoint if there is none."""
    reasons = []
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        try:
            return read_checkpoint(path)
        except DamagedCheckpoint as error:
            reasons.append(str(error))
    raise DamagedCheckpoint("; ".join(reasons) or f"{folder} must hold a checkpoint, there is none")
