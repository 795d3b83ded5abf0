"""Hostile files: each attack harms one part of a sound record, and must end as its reader promises.

To add a reader, add its function to READERS in reading.py; to add an attack, add a line to ATTACKS.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Harm = Callable[[Path], None]


class Attack(NamedTuple):
    """`harm` changes a file of the record in place; `reader` then must end as `ends`: an error's name, or 'reads'."""

    name: str
    reader: str
    file: str
    harm: Harm
    ends: str = ""


# What is done to a file, whatever it is


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    path.unlink()
    before = os.getcwd()
    os.chdir(path.parent)  # an address may have 107 letters
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(to: str) -> Harm:
    def harm(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name if to == "." else to)

    return harm


def unreadable(path: Path) -> None:
    path.chmod(0)


def holds(content: bytes | str) -> Harm:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def sparse(size: int) -> Harm:
    """The file, then nothing up to a size that no disk needs to have."""
    return lambda path: os.truncate(path, size)


def cut(n_bytes: int) -> Harm:
    return lambda path: os.truncate(path, path.stat().st_size - n_bytes)


# JSON


def changed(**values: Any) -> Harm:
    """Values of a JSON table replaced; `...` takes one out."""

    def harm(path: Path) -> None:
        table = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in table.items() if value is not ...}))

    return harm


def column(**values: Any) -> Harm:
    def harm(path: Path) -> None:
        meta = json.loads(path.read_text())
        meta["columns"][5] |= values
        path.write_text(json.dumps(meta))

    return harm


def line(text: bytes) -> Harm:
    """A line in the middle of events.jsonl."""

    def harm(path: Path) -> None:
        first, *others = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([first, text + b"\n", *others]))

    return harm


DEEP = 200_000
DIGITS = "1" * 10**6

# .npy and .npz


def npy(text: str, data: bytes = b"", n_text: int | None = None, start: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    header = text.encode("latin-1")
    return start + struct.pack("<H", len(header) if n_text is None else n_text) + header + data


def described(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def saved(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def table(change: Callable[[np.ndarray], Any]) -> Harm:
    """A .npy file, its array changed."""
    return lambda path: path.write_bytes(saved(change(np.load(path)))) and None


def at(row: int, column: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[row, column] = value
        return array

    return change


class Runs:
    """A pickle that would run a command where it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pickle-was-read",)


def archive(members: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile tells of names that are there twice
        for name, data in members.items() if isinstance(members, dict) else members:
            file.writestr(name, data)
    return content.getvalue()


def members(**changes: Any) -> Harm:
    """Arrays of an .npz replaced by others, or by the bytes of a member; None takes one out."""

    def harm(path: Path) -> None:
        with np.load(path) as file:
            arrays = dict(file) | changes
        content = {f"{name}.npy": value if isinstance(value, bytes) else saved(value)
                   for name, value in arrays.items() if value is not None}  # fmt: skip
        path.write_bytes(archive(content, zipfile.ZIP_LZMA))

    return harm


def facts(**values: Any) -> Harm:
    """Facts of a summary replaced; `...` takes one out, a text with a dot goes into a table."""

    def harm(path: Path) -> None:
        with np.load(path) as file:
            told = json.loads(file["facts"].tobytes())
        for name, value in values.items():
            outer, _, inner = name.partition("__")
            if inner:
                told[outer][inner] = value
            elif value is ...:
                del told[name]
            else:
                told[name] = value
        members(facts=np.frombuffer(json.dumps(told).encode(), np.uint8))(path)

    return harm


def bomb(name: str, n_bytes: int, shape: str, descr: str, method: int) -> Harm:
    """A few kB that unpack to far more than the record has, with a header and a directory that say so."""

    def harm(path: Path) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        content = {f"{one}.npy": saved(array) for one, array in arrays.items() if one != name}
        path.write_bytes(archive(content | {f"{name}.npy": npy(described(descr, shape), bytes(n_bytes))}, method))

    return harm


def lying_bomb(method: int, n_more: int) -> Harm:
    """The directory and the local header give the size that the record must have; what is packed is a bomb."""

    def harm(path: Path) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        honest = saved(arrays["values"])
        content = {f"{name}.npy": saved(array) for name, array in arrays.items() if name != "values"}
        packed = bytearray(archive(content | {"values.npy": honest + bytes(n_more)}, method))
        true, false = (struct.pack("<I", n) for n in (len(honest) + n_more, len(honest)))
        assert packed.count(true) == 2
        path.write_bytes(packed.replace(true, false))

    return harm


def dictionary(n_bytes: int) -> Harm:
    """LZMA that asks for a dictionary of that size before it begins."""

    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        start = content.index(b"PK\x03\x04")
        n_name, n_extra = struct.unpack("<HH", content[start + 26 : start + 30])
        at = start + 30 + n_name + n_extra + 5
        content[at : at + 4] = struct.pack("<I", n_bytes)
        path.write_bytes(content)

    return harm


def many_members(path: Path) -> None:
    path.write_bytes(archive([(f"a{i}.npy", b"") for i in range(9_000)], zipfile.ZIP_STORED))


# Checkpoints


def tensors(header: Any, data: bytes = b"", n_header: int | None = None, size: int = 0) -> Harm:
    """tensors.safetensors with a header of ours, and the manifest that fits it."""

    def harm(path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack("<Q", len(text) if n_header is None else n_header) + text + data
        path.write_bytes(content)
        if size:
            os.truncate(path, size)
        seal(path, content)

    return harm


def state(content: bytes) -> Harm:
    def harm(path: Path) -> None:
        path.write_bytes(content)
        seal(path, content)

    return harm


def seal(path: Path, content: bytes) -> None:
    manifest = path.with_name("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {path.name: hashlib.sha256(content).hexdigest()}))


def tensor(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def other_names(path: Path) -> None:
    """Steps of a letter, of Arabic digits, of too few digits."""
    for step in ("0000000x", "٠٠٠٠٠٠٦٠", "60"):
        path.with_name(f"{step}-prompt_end.npz").write_bytes(b"no zip")


def no_harm(path: Path) -> None:
    pass


DEFLATE, LZMA = zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA
STEPS, META, PROJECTION = "steps.npy", "meta.json", "projections/00000060-prompt_end.npz"
TENSORS = "checkpoint/tensors.safetensors"
MARKUP = "<script>alert(1)</script>\u202e\x07"

ATTACKS = [
    Attack("nothing", "run", META, no_harm, "reads"),
    Attack("nothing", "summary", "", no_harm, "reads"),
    Attack("nothing", "kept", "", no_harm, "reads"),
    Attack("nothing", "checkpoint", TENSORS, no_harm, "reads"),
    Attack("nothing", "config", "my.toml", no_harm, "reads"),
    Attack("nothing to JSON", "config", "my.json", no_harm, "reads"),
    Attack("nothing", "report", META, no_harm, "reads"),
    Attack("nothing", "export", META, no_harm, "reads"),
    # Files that are none
    *(Attack(f"FIFO as {name}", "run", name, fifo) for name in (META, STEPS, "neighbours.npy", "events.jsonl")),
    *(Attack(f"FIFO as {name}", "run", name, fifo) for name in ("config.json", "controls.json", PROJECTION)),
    Attack("FIFO as summary", "summary", "", fifo),
    Attack("FIFO as what is kept", "kept", "", fifo),
    Attack("FIFO as config", "config", "my.toml", fifo),
    Attack("FIFO as manifest", "checkpoint", "checkpoint/manifest.json", fifo),
    Attack("FIFO as tensors", "checkpoint", TENSORS, fifo),
    Attack("socket as steps", "run", STEPS, socket_file),
    Attack("folder as steps", "run", STEPS, folder),
    Attack("folder as events", "run", "events.jsonl", folder),
    *(Attack(f"/dev/zero as {name}", "run", name, link("/dev/zero")) for name in (META, STEPS, "timing.npy")),
    Attack("/dev/zero as state", "checkpoint", "checkpoint/state.json", link("/dev/zero")),
    Attack("/dev/stdin as config", "config", "my.json", link("/dev/stdin")),
    Attack("link to a file of /proc without a size", "run", META, link("/proc/self/maps")),
    Attack("link to itself", "run", META, link(".")),
    Attack("dangling link as events", "run", "events.jsonl", link("nowhere")),
    Attack("unreadable", "run", META, unreadable),
    Attack("unreadable config", "config", "my.toml", unreadable),
    # Sizes
    Attack("4 GB of JSON", "run", META, sparse(4 << 30)),
    Attack("4 GB of events", "run", "events.jsonl", sparse(4 << 30)),
    Attack("4 GB of config", "config", "my.toml", sparse(4 << 30)),
    Attack("4 GB of manifest", "checkpoint", "checkpoint/manifest.json", sparse(4 << 30)),
    Attack("4 GB of summary", "summary", "", sparse(4 << 30)),
    Attack("1 TB of steps", "run", STEPS, sparse(1 << 40)),
    Attack("empty steps", "run", STEPS, holds(b"")),
    Attack("empty summary", "summary", "", holds(b"")),
    Attack("steps cut short", "run", STEPS, cut(1)),
    Attack("timing of fewer rows", "run", "timing.npy", table(lambda a: a[:-1])),
    # JSON
    Attack("deep JSON", "run", META, holds("[" * DEEP + "]" * DEEP)),
    Attack("deep table", "run", "controls.json", holds('{"a":' * DEEP + "0" + "}" * DEEP)),
    Attack("JSON as deep as Python allows", "run", META, holds("[" * 900 + "]" * 900)),
    Attack("a million digits", "run", META, holds(f'{{"n_layers": {DIGITS}}}')),
    Attack("digits of an exponent", "run", META, holds(f'{{"measurement_version": 1e{DIGITS}}}')),
    Attack("millions of empty lists", "run", META, holds("[" + "[]," * 9_000_000 + "[]]")),
    Attack("a wide text of 30 MB", "run", META, holds('{"a": "😀' + "a" * 30_000_000 + '"}')),
    Attack("twice the same key", "run", META, holds('{"n_layers": 1, "n_layers": 2}')),
    Attack("no UTF-8", "run", META, holds(b'{"n_layers": "\xff"}')),
    Attack("UTF-16", "run", META, holds("{}".encode("utf-16"))),
    Attack("half a letter", "run", META, changed(choices={"a": "\ud800"})),
    Attack("a list as header", "run", META, holds("[1, 2]")),
    Attack("null as header", "run", META, holds("null")),
    Attack("NaN layers", "run", META, changed(n_layers=float("nan"))),
    Attack("negative layers", "run", META, changed(n_layers=-3)),
    Attack("a billion layers", "run", META, changed(n_layers=10**9)),
    Attack("true as layers", "run", META, changed(n_layers=True)),
    Attack("fewer layers than columns have", "run", META, changed(n_layers=1)),
    Attack("another version", "run", META, changed(measurement_version="1")),
    Attack("columns as table", "run", META, changed(columns={"a": 1})),
    Attack("columns as text", "run", META, changed(columns="loss")),
    Attack("columns as null", "run", META, changed(columns=None)),
    Attack("columns of numbers", "run", META, changed(columns=[1, 2, 3])),
    Attack("no columns", "run", META, changed(columns=[])),
    Attack("columns out", "run", META, changed(columns=...)),
    Attack("layer as text", "run", META, column(layer="0")),
    Attack("layer below -1", "run", META, column(layer=-2)),
    Attack("a measure that is none", "run", META, column(measure=MARKUP)),
    Attack("a readout that is a path", "run", META, column(readout="../../x")),
    Attack("a name that is not the column's", "run", META, column(name="loss")),
    Attack("readouts that are paths", "run", META, changed(readouts=["../../x", "/etc"])),
    Attack("readouts of markup", "run", META, changed(readouts=[MARKUP])),
    Attack("readouts as text", "run", META, changed(readouts="prompt_end")),
    Attack("readouts of numbers", "run", META, changed(readouts=[1, 2])),
    Attack("timing columns as text", "run", META, changed(timing_columns="step_ms")),
    Attack("timing columns twice", "run", META, changed(timing_columns=["a"] * 7)),
    Attack("more tasks than the table", "run", META, changed(n_tasks=5)),
    Attack("controls as table", "run", "controls.json", holds("{}")),
    Attack("controls of texts", "run", "controls.json", holds('["a"]')),
    Attack("a control without a mean", "run", "controls.json", holds('[{"control": "raw_strings"}]')),
    # Events: a line that is none is told, and the others are read.
    Attack("an event that is a list", "run", "events.jsonl", line(b"[1, 2]"), "reads"),
    Attack("an event without a name", "run", "events.jsonl", line(b'{"step": 1}'), "reads"),
    Attack("a binary event", "run", "events.jsonl", line(bytes(range(11, 256))), "reads"),
    Attack("an event of 20 MB", "run", "events.jsonl", line(b'{"event": "' + b"a" * 20_000_000 + b'"}'), "reads"),
    Attack("a deep event", "run", "events.jsonl", line(b"[" * 60_000), "reads"),
    Attack("a last event cut short", "run", "events.jsonl", cut(9), "reads"),
    Attack("no events at all, but lines", "run", "events.jsonl", holds("x\n" * 100_000)),
    Attack("millions of lines", "run", "events.jsonl", holds("\n" * 10_000_000)),
    # Arrays
    Attack("a pickle as steps", "run", STEPS, holds(saved(np.array([Runs()], dtype=object)))),
    Attack("a bare pickle as steps", "run", STEPS, holds(b"\x80\x04cos\nsystem\n(S'true'\ntR.")),
    Attack("objects in the header", "run", STEPS, holds(npy(described("'|O'", "(3, 3)")))),
    Attack("a structured dtype", "run", STEPS, table(lambda a: np.zeros(3, [("a", "f8"), ("b", "i4")]))),
    Attack("a deep dtype", "run", STEPS, holds(npy(described("[" * 9000 + "]" * 9000, "(3,)")))),
    Attack("code in the header", "run", STEPS, holds(npy("__import__('os').system('touch pickle-was-read')"))),
    Attack("a huge shape", "run", STEPS, holds(npy(described("'<f8'", "(99999999999999, 99999)")))),
    Attack("a shape beyond 64 bits", "run", STEPS, holds(npy(described("'<f8'", f"({2**63}, {2**62}, 4)")))),
    Attack("a shape that overflows to its size", "run", STEPS, holds(npy(described("'<f8'", f"({2**61}, 8)")))),
    Attack("a negative shape", "run", STEPS, holds(npy(described("'<f8'", "(-1, 3)"), bytes(24)))),
    Attack("a shape of a million sizes", "run", STEPS, holds(npy(described("'<f8'", "(" + "1, " * 9000 + ")")))),
    Attack("a header longer than its file", "run", STEPS, holds(npy(described("'<f8'", "(3,)"), n_text=65_000))),
    Attack("a header of 4 GB", "run", STEPS, holds(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"{" * 99)),
    Attack("no .npy version", "run", STEPS, holds(npy("", start=b"\x93NUMPY\x09\x00"))),
    Attack("floats of 4 bytes", "run", STEPS, table(lambda a: a.astype(np.float32))),
    Attack("a table of one dimension", "run", STEPS, table(np.ravel)),
    Attack("columns before rows", "run", STEPS, table(np.asfortranarray)),
    Attack("a column too many", "run", STEPS, table(lambda a: a[:, :-1])),
    Attack("step numbers of NaN", "run", STEPS, table(at(3, 0, np.nan))),
    Attack("endless step numbers", "run", STEPS, table(at(3, 0, np.inf))),
    Attack("step numbers out of order", "run", STEPS, table(at(3, 0, 2))),
    Attack("neighbours of another shape", "run", "neighbours.npy", table(lambda a: a[:, :1])),
    *(Attack(f"a ring of {n}", "run", META, changed(estimators={"window": {"pooled_measured_steps": {"train": n}}}))
      for n in ("'x'", "[]", "null")),
    Attack("no estimators", "run", META, changed(estimators="[]")),
    Attack("neighbours of objects", "run", "neighbours.npy", holds(saved(np.array([Runs()], dtype=object)))),
    # Projections
    Attack("a projection that is none", "run", PROJECTION, holds(b"PK\x05\x06")),
    Attack("a projection of objects", "run", PROJECTION, members(task=np.array([Runs()], dtype=object))),
    Attack("a projection of fewer layers", "run", PROJECTION, members(plane=np.zeros((1, 24, 2)))),
    Attack("a projection without a plane", "run", PROJECTION, members(plane=None)),
    Attack("labels of texts", "run", PROJECTION, members(task=np.array(["<b>"] * 24))),
    Attack("a member that is a path", "run", PROJECTION, holds(archive({"../../x.npy": saved(1)}))),
    Attack("names of projections that are none", "run", PROJECTION, other_names, "reads"),
    # Archives
    Attack("a bomb as values", "summary", "", bomb("values", 31 << 20, f"(124, {1 << 17})", "'<i2'", DEFLATE)),
    Attack("a bomb as steps", "summary", "", bomb("step", 80 << 20, f"({10 << 20},)", "'<i8'", DEFLATE)),
    Attack("a bomb as facts", "summary", "", bomb("facts", 34 << 20, f"({34 << 20},)", "'|u1'", LZMA)),
    Attack("a bomb as facts that fits", "summary", "", bomb("facts", 32 << 20, f"({32 << 20},)", "'|u1'", DEFLATE)),
    Attack("a bomb as per_task", "summary", "", bomb("per_task", 16 << 20, f"(4, {2 << 20})", "'<i2'", LZMA)),
    Attack("a bomb with another header", "summary", "", bomb("values", 16 << 20, "(124, 61)", "'<i2'", DEFLATE)),
    Attack("a bomb of deflate that lies", "summary", "", lying_bomb(DEFLATE, 32 << 20)),
    Attack("a bomb of LZMA that lies", "summary", "", lying_bomb(LZMA, 16 << 20)),
    Attack("a bomb as what is kept", "kept", "", bomb("counts", 16 << 20, f"(2, {1 << 20})", "'<i8'", DEFLATE)),
    Attack("a bomb as a projection", "run", PROJECTION,
           bomb("plane", 24 << 20, f"(3, {1 << 20}, 2)", "'<f4'", DEFLATE)),
    Attack("LZMA with a dictionary of 4 GB", "summary", "", dictionary(2**32 - 1)),
    Attack("bzip2", "summary", "", holds(archive({"facts.npy": saved(1)}, zipfile.ZIP_BZIP2))),
    Attack("9,000 members", "summary", "", many_members),
    Attack("twice the same member", "summary", "", holds(archive([("facts.npy", saved(1))] * 2))),
    Attack("summary cut short", "summary", "", cut(30)),
    Attack("no zip", "summary", "", holds(b"not a zip")),
    Attack("facts out", "summary", "", members(facts=None)),
    Attack("facts of objects", "summary", "", members(facts=saved(np.array([Runs()], dtype=object)))),
    Attack("facts that are a list", "summary", "", members(facts=np.frombuffer(b"[]", np.uint8))),
    Attack("facts that are deep", "summary", "", members(facts=np.frombuffer(b"[" * DEEP, np.uint8))),
    Attack("a fact too many", "summary", "", facts(more=1)),
    Attack("columns of texts in facts", "summary", "", facts(columns=["a"])),
    Attack("events as text", "summary", "", facts(events="start")),
    Attack("an event that is none in facts", "summary", "", facts(events=[1])),
    Attack("controls as table in facts", "summary", "", facts(controls={})),
    Attack("timing of texts", "summary", "", facts(timing_ms={"step_ms": "1"})),
    Attack("meta as null", "summary", "", facts(meta=None)),
    Attack("a config that is a list", "summary", "", facts(config=[1])),
    Attack("a config that is unknown", "summary", "", facts(config={"hidden": 1})),
    Attack("tasks of a million", "summary", "", facts(meta__n_tasks=10**6)),
    Attack("steps that fall", "summary", "", members(step=np.arange(61)[::-1].copy())),
    Attack("steps of floats", "summary", "", members(step=np.arange(61.0))),
    Attack("a layer that is none", "summary", "", members(per_task_layer=np.int64(99))),
    Attack("what is kept in another shape", "kept", "", members(counts=np.zeros((3, 3), np.int64))),
    Attack("what is kept with more", "kept", "", members(more=np.zeros(3))),
    Attack("what is kept of objects", "kept", "", members(counts=saved(np.array([Runs()], dtype=object)))),
    Attack("what is kept of floats", "kept", "", members(counts=np.zeros((2, 2)))),
    # Checkpoints whose manifest fits what they hold
    Attack("a header of 4 GB said", "checkpoint", TENSORS, tensors(b"{}", n_header=2**32)),
    Attack("a header of 4 GB there", "checkpoint", TENSORS, tensors(b"{}", n_header=2**32, size=5 << 30)),
    Attack("a header of 2**64", "checkpoint", TENSORS, tensors(b"{}", n_header=2**64 - 1)),
    Attack("tensors that overlap", "checkpoint", TENSORS, tensors({"a": tensor(), "b": tensor()}, bytes(16))),
    Attack("tensors with a gap", "checkpoint", TENSORS, tensors({"a": tensor(offsets=(8, 24))}, bytes(24))),
    Attack("offsets out of bounds", "checkpoint", TENSORS, tensors({"a": tensor(offsets=(0, 16))}, bytes(8))),
    Attack("offsets that fall", "checkpoint", TENSORS, tensors({"a": tensor(offsets=(16, 0))}, bytes(16))),
    Attack("negative offsets", "checkpoint", TENSORS, tensors({"a": tensor(offsets=(-16, 0))}, bytes(16))),
    Attack("a huge tensor", "checkpoint", TENSORS, tensors({"a": tensor(shape=(2**40, 2**40))}, bytes(16))),
    Attack("an overflowing tensor", "checkpoint", TENSORS, tensors({"a": tensor(shape=(2**62, 4, 4))}, bytes(16))),
    Attack("a negative tensor", "checkpoint", TENSORS, tensors({"a": tensor(shape=(-2, -2))}, bytes(16))),
    Attack("an unknown dtype", "checkpoint", TENSORS, tensors({"a": tensor(dtype="F17")}, bytes(16))),
    Attack("a dtype that is a list", "checkpoint", TENSORS, tensors({"a": tensor(dtype=[])}, bytes(16))),
    Attack("a tensor that is a text", "checkpoint", TENSORS, tensors({"a": "b"}, bytes(16))),
    Attack("a header that is a list", "checkpoint", TENSORS, tensors([], bytes(16))),
    Attack("a deep header", "checkpoint", TENSORS, tensors(b"[" * DEEP)),
    Attack("the same tensor twice", "checkpoint", TENSORS,
           tensors(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(16))),
    Attack("a pickle as tensors", "checkpoint", TENSORS, tensors(saved(np.array([Runs()], dtype=object)))),
    Attack("8 GB of tensors", "checkpoint", TENSORS, sparse(8 << 30)),
    Attack("a flipped bit", "checkpoint", TENSORS,
           lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01") and None),
    Attack("a deep state", "checkpoint", "checkpoint/state.json", state(b"[" * DEEP)),
    Attack("a state that is a list", "checkpoint", "checkpoint/state.json", state(b"[]")),
    Attack("a state without UTF-8", "checkpoint", "checkpoint/state.json", state(b"\xff")),
    Attack("a manifest of other files", "checkpoint", "checkpoint/manifest.json",
           changed(**{"../../secret": "0" * 64})),
    Attack("a manifest that is a list", "checkpoint", "checkpoint/manifest.json", holds("[]")),
    Attack("a manifest of numbers", "checkpoint", "checkpoint/manifest.json",
           holds('{"tensors.safetensors": 1, "state.json": 2}')),
    # A run's own checkpoints, read again
    Attack("weights of another model", "weights", "checkpoints/00000001/state.json", no_harm),
    Attack("FIFO as weights", "weights", "checkpoints/00000001/tensors.safetensors", fifo),
    Attack("64 MB of weights for a small model", "weights", "checkpoints/00000001/tensors.safetensors",
           tensors({"model.a": tensor(shape=[16 << 20], offsets=[0, 64 << 20])}, size=72 + (64 << 20))),
    # Configs
    Attack("deep TOML lists", "config", "my.toml", holds("a = " + "[" * 100_000)),
    Attack("deep TOML tables", "config", "my.toml", holds("a = " + "{a=" * 60_000)),
    Attack("a TOML key of 100,000 parts", "config", "my.toml", holds("a" + ".a" * 100_000 + " = 1")),
    Attack("the same behind a comment", "config", "my.toml", holds("# '''\n[a" + ' ."a"' * 50_000 + "]\n# '''")),
    Attack("a TOML key with spaces", "config", "my.toml", holds(("a." + " " * 60_000) * 4)),
    Attack("TOML digits", "config", "my.toml", holds(f"seed = {DIGITS[:200_000]}")),
    Attack("TOML hexadecimals", "config", "my.toml", holds("seed = 0x" + "f" * 200_000)),
    Attack("a string without an end", "config", "my.toml", holds('a = """' + '\\"""' * 60_000)),
    Attack("many TOML tables", "config", "my.toml", holds("".join(f"[a{i}.a.a]\n" for i in range(20_000)))),
    Attack("deep JSON config", "config", "my.json", holds('{"task":' * DEEP)),
    Attack("JSON digits", "config", "my.json", holds(f'{{"seed": {DIGITS}}}')),
    Attack("a config that is a text", "config", "my.json", holds('"seed"')),
    Attack("a table that is a list", "config", "my.json", holds('{"task": [[1, 2]]}')),
    Attack("a table among grammars", "config", "my.json", holds('{"task": {"grammars": [{"abc": "d"}]}}')),
    Attack("a table for grammars", "config", "my.json", holds('{"task": {"grammars": {"abc": "d"}}}')),
    Attack("a date as a number", "config", "my.toml", holds("seed = 1979-05-27T07:32:00Z")),
    Attack("a setting that is a table", "config", "my.json", holds('{"seed": {"a": 1}}')),
    Attack("an unknown setting of 30 MB", "config", "my.json", holds('{"' + "a" * 30_000_000 + '": 1}')),
    Attack("a value of 30 MB", "config", "my.json", holds('{"steps": "' + "a" * 30_000_000 + '"}')),
    Attack("a value of many lines", "config", "my.json", holds(json.dumps({"device": 1, "out": "\n" * 99}))),
    Attack("an input of endless length", "checked", "my.json", holds('{"task": {"input_length": 999999999999999999}}')),
    Attack("more steps than can be", "checked", "my.json", holds('{"steps": 99999999999999999999}')),
    Attack("endless numbers", "checked", "my.json", holds('{"train": {"lr": 1e999}}')),
    # Commands: exit code 2 and one line
    *(Attack(f"{reader}: FIFO as {name}", reader, name, fifo)
      for reader in ("report", "export") for name in (META, STEPS)),
    Attack("report: FIFO as events", "report", "events.jsonl", fifo),
    Attack("report: deep config", "report", "config.json", holds("[" * DEEP)),
    Attack("report: no machine", "report", META, changed(machine={})),
    Attack("report: weights of text", "report", META, changed(n_parameters="many")),
    Attack("report: unknown readouts", "report", META, changed(readouts=["one", "two"])),
    Attack("report: no layers measured", "report", META, changed(n_layers=9)),
    Attack("report: other timing columns", "report", META, changed(timing_columns=list("abcdefg"))),
    Attack("report: not a folder", "report", META, lambda path: path.parent.rename(path.parent.with_name("gone"))),
    Attack("draw: FIFO as summary", "draw", "", fifo),
    Attack("draw: no zip", "draw", "", holds(b"not a zip")),
    Attack("draw: another config", "draw", "", facts(config={"steps": 3})),
    Attack("draw: columns out", "draw", "", facts(columns=[])),
    Attack("draw: no machine", "draw", "", facts(meta__versions={})),
    Attack("draw: a deep table beside it", "draw", "../other.json", holds("[" * DEEP)),
    Attack("draw: claims of another kind", "draw", "../other.json", holds('{"claims": [1]}')),
]  # fmt: skip
