"""What is kept of a run, so that its studies can be drawn again without its directory: NAME.npz beside NAME/.

Studies read this file alone, also where the directory still is, so that a page drawn from committed files is the same
page. It holds config, events, controls, machine and versions; the measures in KEPT, every step and layer, in
thousandths; the neighbour purity of each task in the layer that clusters most; the totals of the timings. A default run
takes some 70 kB. What a study reads from checkpoints has a file of its own, NAME.WHAT.npz, written at the same time.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clmfast.config import LABEL_KINDS, ConfigError, RunConfig, from_dict, to_dict
from clmfast.files import write_file
from clmfast.findings import HEADLINE_READOUT, best_layer
from clmfast.record import NotARun, Run
from clmfast.schema import MAX_STEPS, check_controls, check_event, check_facts, columns_of
from clmfast.study.base import Revisit
from clmfast.untrusted import JSON_BYTES, Archive, Damaged, is_there, need, one_line, parse_json, refusing

KEPT = ("accuracy", *(f"ari_{kind}" for kind in LABEL_KINDS), "knn_accuracy", "cross_grammar_knn_accuracy")
META = ("measurement_version", "versions", "machine", "threads", "n_layers", "n_tasks", "readouts")
FACTS = ("config", "meta", "columns", "events", "controls", "timing_ms")
MAX_PER_TASK_BYTES = 2 << 30
THOUSANDTHS, NOT_MEASURED = 1000, np.iinfo(np.int16).min


def beside(path: Path, suffix: str) -> Path:
    """A file beside a run directory. Path.with_suffix would cut a name such as 'noise_0.1-seed0-...' at its point."""
    return path.parent / f"{path.name}{suffix}"


def pack(values: NDArray[np.float64]) -> NDArray[np.int16]:
    """Thousandths, each less the one of the row before: small numbers, which compress well. Wraps around, exactly."""
    thousandths = np.where(np.isfinite(values), np.rint(values * THOUSANDTHS), NOT_MEASURED).astype(np.int16)
    return np.diff(thousandths, axis=0, prepend=np.zeros_like(thousandths[:1])).T.copy()


def unpack(packed: NDArray[np.int16]) -> NDArray[np.float64]:
    thousandths = np.cumsum(packed.T, axis=0, dtype=np.int16)
    return np.where(thousandths == NOT_MEASURED, np.nan, thousandths / THOUSANDTHS)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz of the same bytes for the same arrays: half the size that numpy's own compression gives."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as file:
        for name, value in arrays.items():
            array = io.BytesIO()
            np.lib.format.write_array(array, np.asarray(value), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getvalue(), zipfile.ZIP_LZMA)
    write_file(path, content.getvalue())


def run_of(file: Path) -> Path:
    """The directory of the run that a summary is of, the inverse of `beside`."""
    return file.with_name(file.name.removesuffix(".npz"))


def write_summary(run: Run) -> None:
    """Write NAME.npz of a run that has ended, finished or diverged."""
    kept = [i for i, column in enumerate(run.columns) if column.measure in KEPT]
    facts = {
        "config": to_dict(run.config),
        "meta": {name: run.meta[name] for name in META},
        "columns": [vars(run.columns[i]) for i in kept],
        "events": run.events,
        "controls": run.controls,
        "timing_ms": {name: float(column.sum()) for name, column in run.timing.items()},
    }
    arrays: dict[str, Any] = {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "step": run.step,
        "values": pack(run.values[:, kept]),
    }
    if run.per_task is not None and HEADLINE_READOUT in run.readouts and run.has("probe"):
        layer = best_layer(run)
        arrays["per_task"] = pack(run.per_task[:, layer, run.readouts.index(HEADLINE_READOUT)])
        arrays["per_task_layer"] = layer
    write_arrays(beside(run.path, ".npz"), arrays)


class Summary(Run):
    """A run as its summary tells it; `path` is that of its directory, which need not be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = beside(path, ".npz")
        with refusing(NotARun, f"{one_line(file)} must be the summary of a run"):
            archive = Archive(file)
            n_bytes = math.prod(archive.shape("facts"))
            need(n_bytes <= JSON_BYTES, f"facts must have at most {JSON_BYTES:,} bytes", n_bytes)
            with refusing(Damaged, "facts"):
                facts = parse_json(archive.read("facts", np.uint8, (None,)).tobytes())
                self.timing = self._check(facts)
            try:
                self.config = from_dict(facts["config"], RunConfig(), "config")
            except ConfigError as error:
                raise Damaged(str(error)) from None
            n_rows = math.prod(archive.shape("step"))
            need(n_rows <= MAX_STEPS, f"step must have at most {MAX_STEPS:,} rows", n_rows)
            self.step = archive.read("step", np.int64, (None,))
            is_right = (np.diff(self.step, prepend=-1) > 0).all() and (self.step <= MAX_STEPS).all()
            need(bool(is_right), f"step must rise from 0 or more to at most {MAX_STEPS:,}", "others")
            n = len(self.step)
            self.values = unpack(archive.read("values", np.int16, (len(self.columns), n)))
            self._of_task: NDArray[np.float64] | None = None
            if "per_task" in archive:
                self._of_task = unpack(archive.read("per_task", np.int16, (self.meta["n_tasks"], n)))
                self._layer_of_tasks = int(archive.read("per_task_layer", np.int64, ()))
                need(self._layer_of_tasks in self.layers, "per_task_layer must be a layer", self._layer_of_tasks)
                need(HEADLINE_READOUT in self.readouts, f"readouts must have {HEADLINE_READOUT}", self.readouts)
        self._at = {column.name: i for i, column in enumerate(self.columns)}

    def _check(self, facts: Any) -> dict[str, NDArray[np.float64]]:
        """Take in the facts; the totals of the timings."""
        need(isinstance(facts, dict) and set(facts) == set(FACTS), f"must be {', '.join(FACTS)}", facts)
        self.meta = facts["meta"]
        check_facts(self.meta)
        need(isinstance(facts["columns"], list), "columns must be a list", facts["columns"])
        self.columns = columns_of(facts["columns"], self.meta["n_layers"])
        self.events, self.damaged_events, self.controls = facts["events"], [], facts["controls"]
        need(isinstance(self.events, list), "events must be a list", self.events)
        for event in self.events:
            check_event(event)
        check_controls(self.controls)
        timing = facts["timing_ms"]
        are_numbers = isinstance(timing, dict) and all(isinstance(ms, float) for ms in timing.values())
        need(are_numbers, "timing_ms must be numbers by name", timing)
        return {name: np.array([ms]) for name, ms in timing.items()}

    @cached_property
    def per_task(self) -> NDArray[np.float64] | None:
        """As of the whole run; NaN but in the layer that is kept."""
        if self._of_task is None:
            return None
        n, n_tasks = self._of_task.shape
        shape = (n, len(self.layers), len(self.readouts), n_tasks)
        if math.prod(shape) * 8 > MAX_PER_TASK_BYTES:  # it was a small file
            said = f"must unpack to at most {MAX_PER_TASK_BYTES:,} bytes, got shape {list(shape)}"
            raise NotARun(f"{one_line(beside(self.path, '.npz'))} must be the summary of a run: per_task {said}")
        found = np.full(shape, np.nan)
        found[:, self._layer_of_tasks, self.readouts.index(HEADLINE_READOUT)] = self._of_task
        return found


def kept_at(path: Path, what: Revisit) -> Path:
    return beside(path, f".{what.name}.npz")


def revisited(run: Run, what: Revisit) -> dict[str, NDArray]:
    """What the checkpoints of a run say, or said when they were there; NotARun if what was kept is damaged."""
    path = kept_at(run.path, what)
    if not is_there(path):
        write_arrays(path, what.read(run))
    with refusing(NotARun, f"{one_line(path)} must be what the checkpoints of a run say"):
        archive = Archive(path)
        wanted, names = sorted(one.name for one in what.holds), sorted(archive)
        need(names == wanted, f"must hold {', '.join(wanted)}", ", ".join(names))
        return {one.name: archive.read(one.name, one.dtype, one.shape) for one in what.holds}
