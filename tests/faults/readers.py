"""Damaged files: everything that reads what others may have written, and bytes that are almost right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from clmfast.config import ConfigError, MeasureConfig, ModelConfig, RunConfig, TaskConfig, from_file, to_dict
from clmfast.data.grammar import Grammar, GrammarError
from clmfast.files import DamagedCheckpoint, read_checkpoint, write_checkpoint
from clmfast.measure.catalogue import MEASUREMENT_VERSION, MEASURES, Column, layer_columns
from clmfast.record import NotARun, load
from clmfast.study.summary import Summary, beside, write_summary

SMALL = RunConfig(
    steps=3,
    task=TaskConfig(n_tasks=2, grammars=(("a[bc]{2,3}", "x(y|z)*"), ("d+e?", "[^a]w"))),
    model=ModelConfig(n_layers=1, width=8, n_heads=2),
    measure=MeasureConfig(readouts=("instruction_end",)),
)


class Reader(NamedTuple):
    """`make(folder)` writes good files; `read(folder)` reads them, and may raise `allowed` with one line."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    allowed: tuple[type[BaseException], ...]


# ---- good files


def make_toml(folder: Path) -> None:
    (folder / "config.toml").write_text(
        'seed = 3\nsteps = 100\ndevice = "cpu"\n[task]\nn_tasks = 2\nn_grammars = 1\nn_unseen_grammars = 1\n'
        'grammars = [["a[bc]{2,3}", "x(y|z)*"], ["d+e?", "[^a]w"]]\n[train]\nlr = 4e-3\nloss_on = "all"\n'
        '[measure]\nreadouts = ["instruction_end"]\nwindow = 256\n'
    )


def make_json(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(to_dict(SMALL), indent=1))


def make_pattern(folder: Path) -> None:
    (folder / "pattern").write_text(r"^(?:ab|[c-f\d]{2,4}|(?P<n>x+?y*)|\u00e9[^a-z]?|a{,3}|\x41.\w)$")


def make_run(folder: Path) -> None:
    """What clmfast.record.RunWriter would have written in three steps."""
    n_layers, rows = SMALL.model.n_layers + 1, SMALL.steps + 1
    measured = ("ari_task", "knn_accuracy", "cross_grammar_knn_accuracy", "neighbour_purity")
    columns = [
        Column("train", "loss"), Column("validation", "accuracy"),
        *layer_columns("window", "instruction_end", n_layers, measured),
        *layer_columns("probe", "instruction_end", n_layers, ("ari_task", "neighbour_purity")),
        *layer_columns("probe", "instruction_end", n_layers, measured[1:3], "unseen_instruction"),
    ]  # fmt: skip
    values = np.random.default_rng(0).random((rows, 1 + len(columns)))
    values[:, 0] = np.arange(rows) + 1
    np.save(folder / "steps.npy", values)
    np.save(folder / "timing.npy", values[:, :3])
    np.save(folder / "neighbours.npy", np.random.default_rng(1).random((rows, 3, 2, n_layers, 1, SMALL.task.n_tasks)))
    meta = {
        "versions": {"clmfast": "0.1.0", "torch": "2.12.0"}, "machine": {"cpu": "some", "cores": 2, "system": "Linux"},
        "measurement_version": MEASUREMENT_VERSION, "n_layers": n_layers, "n_tasks": SMALL.task.n_tasks,
        "estimators": {"window": {"pooled_measured_steps": {"train": 2, "unseen": 2}}},
        "readouts": ["instruction_end"], "threads": 2, "measures": {name: vars(m) for name, m in MEASURES.items()},
        "columns": [{"name": "step_plus_1", "unit": "step"}, *(c.describe() for c in columns)],
        "timing_columns": ["step_plus_1", "forward", "backward"],
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    make_json(folder)
    events = [{"event": name, "unix_time_s": 1.5, "step": 2} for name in ("start", "early_stop", "end")]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    where = {"readout": "instruction_end", "split": "", "measure": "ari_task", "layer": 1}
    controls = [{"control": kind, **where, "mean": 0.1, "low": 0, "high": 0.2} for kind in ("letters", "shuffled")]
    (folder / "controls.json").write_text(json.dumps(controls))
    (folder / "projections").mkdir()
    np.savez(
        folder / "projections" / "00000002-instruction_end.npz",
        plane=np.zeros((n_layers, 4, 2)), share=np.zeros(n_layers), task=np.arange(4),
    )  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    import torch

    write_checkpoint(
        folder / "c", {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, {"step": 3}
    )


def make_summary(folder: Path) -> None:
    (folder / "run").mkdir()
    make_run(folder / "run")
    write_summary(load(folder / "run"))
    shutil.rmtree(folder / "run")
    assert beside(folder / "run", ".npz").exists()


# ---- reading


def read_pattern(folder: Path) -> None:
    path = folder / "pattern"
    pattern = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
    grammar = Grammar(pattern, 12)
    if grammar.size:
        grammar.sample(min(grammar.size, 3), 0)


def read_run(folder: Path) -> None:
    run = load(folder)
    for what in (run.config, run.events, run.controls, run.per_task, run.layers, run.readouts):
        assert what is not Ellipsis
    run.long()
    run.has("probe")
    for readout in run.readouts:
        run.snapshots(readout)


def read_sealed_checkpoint(folder: Path) -> None:
    """A checkpoint whose manifest agrees with its damage."""
    folder = folder / "c"
    names = ("tensors.safetensors", "state.json")
    here = [name for name in names if (folder / name).exists()]
    manifest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in here}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    read_checkpoint(folder)


READERS = [
    Reader("config.toml", make_toml, lambda folder: from_file(folder / "config.toml", RunConfig()), (ConfigError,)),
    Reader("config.json", make_json, lambda folder: from_file(folder / "config.json", RunConfig()), (ConfigError,)),
    Reader("pattern", make_pattern, read_pattern, (GrammarError,)),
    Reader("run", make_run, read_run, (NotARun, ConfigError)),
    Reader("checkpoint", make_checkpoint, lambda folder: read_checkpoint(folder / "c"), (DamagedCheckpoint,)),
    Reader("sealed checkpoint", make_checkpoint, read_sealed_checkpoint, (DamagedCheckpoint,)),
    Reader("summary", make_summary, lambda folder: Summary(folder / "run").long(), (NotARun, ConfigError)),
]
LONGEST_TEXT = 2000  # letters of a message


# ---- damage

WORDS = (
    b"0", b"-1", b"1e999", b"NaN", b"Infinity", b"-0", b"9" * 400, b"18446744073709551616", b"null", b"true", b'""',
    b"[]", b"{}", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 20_000, b'{"a":' * 20_000, b"(" * 500, b"{9999}",
    b"{1,}", b"\\", b"\n", b"1.5", b"'", b'"', b"inf", b"a = 1\n", b"[[task]]\n", b"[^", b"(?=a)", b"\\d{,99999}",
    b"..", b"/etc/passwd",
)  # fmt: skip


def damage(content: bytes, rng: Random, name: str) -> bytes:
    """Some bytes changed, added or taken away; in JSON often a whole value."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if name.endswith(("json", "jsonl")) and rng.random() < 0.5:
            content = _other_value(content, rng)
            continue
        how = rng.choice(("flip", "byte", "cut", "drop", "double", "word", "word", "move", "empty", "digit"))
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 4, 8, 40)))
        if how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif how == "byte" and at < len(content):
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "drop":
            content = content[:at] + content[end:]
        elif how == "double":
            content = content[:end] + content[at:end] * rng.choice((1, 1, 100)) + content[end:]
        elif how == "word":
            content = content[:at] + rng.choice(WORDS) + content[rng.choice((at, end)) :]
        elif how == "move":
            piece, content = content[at:end], content[:at] + content[end:]
            to = rng.randrange(len(content) + 1)
            content = content[:to] + piece + content[to:]
        elif how == "digit":
            digits = [i for i, byte in enumerate(content[:4096]) if byte in b"0123456789"]
            if digits:
                i = rng.choice(digits)
                content = content[:i] + rng.choice((b"9", b"0", b"-", b"99999999999", b".")) + content[i + 1 :]
        elif how == "empty" and rng.random() < 0.2:
            content = b""
    return content


def _other_value(content: bytes, rng: Random) -> bytes:
    """One value of a JSON text replaced by another value of it, or by one that nobody expects."""
    lines = content.splitlines() if content.count(b"\n{") else [content]
    i = rng.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[i])
        places = list(_places(value))
    except (ValueError, IndexError, RecursionError):
        return content
    if not places:
        return content
    container, key = places[rng.randrange(len(places))]
    how = rng.random()
    if how < 0.2:
        del container[key]
    elif how < 0.5:
        other, of = places[rng.randrange(len(places))]
        container[key] = json.loads(json.dumps(other[of]))
    else:
        container[key] = rng.choice(
            (None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
             "é\n", [], {}, [[]], [None], {"": 0}, "a" * 5000, list(range(100)), -(2**63), "../..", "nan")
        )  # fmt: skip
    try:
        lines[i] = json.dumps(value).encode()
    except ValueError:  # a number of too many digits to be printed
        return content
    return b"\n".join(lines)


def _places(value: object) -> list[tuple[object, object]]:
    found, open_values = [], [value]
    while open_values:
        value = open_values.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            found.append((value, key))
            open_values.append(value[key])
    return found


class ReaderCases:
    """Every case damages one or two of a reader's files and reads them."""

    name = "readers"

    def __init__(self, seed: int, registry: list[Reader] = READERS) -> None:
        self.seed, self.registry = seed, registry
        self.command = f"python -m tests.faults fuzz --seed {seed} --case readers:{{i}}"
        self.good: dict[str, dict[str, bytes]] | None = None

    def start(self) -> None:
        self.good_files()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))

    def good_files(self) -> dict[str, dict[str, bytes]]:
        """By reader: the content of its files."""
        if self.good is None:
            self.good = {}
            for reader in self.registry:
                with tempfile.TemporaryDirectory() as folder:
                    reader.make(Path(folder))
                    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                    self.good[reader.name] = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        return self.good

    def draw(self, i: int) -> tuple[Reader, dict[str, bytes | None]]:
        """The reader, and those of its files that differ from the good ones; None: missing."""
        rng = Random(f"{self.seed}/readers/{i}")
        reader = self.registry[rng.randrange(len(self.registry))]
        files = self.good_files()[reader.name]
        if rng.random() < 0.02:
            return reader, {}
        names = rng.sample(sorted(files), min(len(files), rng.choice((1, 1, 1, 2))))
        return reader, {name: damage(files[name], rng, name) if rng.random() < 0.97 else None for name in names}

    def describe(self, i: int) -> str:
        reader, changed = self.draw(i)
        return f"{reader.name} ({', '.join(changed) or 'good'})\n    " + "\n    ".join(
            f"{name}: {'missing' if content is None else repr(content[:300])}" for name, content in changed.items()
        )

    def run(self, i: int) -> str | None:
        reader, changed = self.draw(i)
        for name, content in {**self.good_files()[reader.name], **changed}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)
        try:
            wrong = self._wrong(reader, bool(changed))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        return f"{wrong} {self.describe(i)}" if wrong else None

    def _wrong(self, reader: Reader, is_damaged: bool) -> str | None:
        try:
            reader.read(self.folder)
        except Exception as error:
            text = str(error).replace(str(self.folder), "FOLDER")
            told = f"{type(error).__name__}: {reader.name}\n    {' '.join(text.split())[:160]}\n   "
            if not is_damaged:
                return f"good files are refused: {told}"
            if not isinstance(error, reader.allowed):
                return f"an exception of another kind: {told}"
            if "\n" in text:
                return f"not one line: {told}"
            if len(text) > LONGEST_TEXT:
                return f"a text of {len(text)} letters: {told}"
        return None
