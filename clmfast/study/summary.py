"""What is kept of a run, so that its studies can be drawn again without its directory: NAME.npz beside NAME/.

Studies read this file alone, also where the directory still is, so that a page drawn from committed files is the same
page. It holds config, events, controls, machine and versions; the measures in KEPT, every step and layer, in
thousandths; the neighbour purity of each task in the layer that clusters most; the totals of the timings. A default run
takes some 70 kB. What a study reads from checkpoints has a file of its own, NAME.WHAT.npz, written at the same time.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clmfast.config import LABEL_KINDS, ConfigError, RunConfig, from_dict, to_dict
from clmfast.files import write_file
from clmfast.findings import HEADLINE_READOUT, best_layer
from clmfast.measure.catalogue import MEASUREMENT_VERSION, Column
from clmfast.record import NotARun, Run
from clmfast.study.base import Revisit

KEPT = ("accuracy", *(f"ari_{kind}" for kind in LABEL_KINDS), "knn_accuracy", "cross_grammar_knn_accuracy")
META = ("measurement_version", "versions", "machine", "threads", "n_layers", "n_tasks", "readouts")
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
        try:
            with np.load(beside(path, ".npz")) as file:
                arrays = dict(file)
            facts = json.loads(arrays["facts"].tobytes())
            self.meta = facts["meta"]
            self.columns = [Column(**column) for column in facts["columns"]]
            self.events, self.controls = facts["events"], facts["controls"]
            self.config = from_dict(facts["config"], RunConfig(), path.name)
            self.step, self.values = arrays["step"], unpack(arrays["values"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, ConfigError) as error:
            raise NotARun(f"{beside(path, '.npz')} must be the summary of a run: {error}") from None
        if self.meta["measurement_version"] != MEASUREMENT_VERSION:
            raise NotARun(
                f"{beside(path, '.npz')} must have measurement version {MEASUREMENT_VERSION}, "
                f"got {self.meta['measurement_version']}"
            )
        self.timing = {name: np.array([ms]) for name, ms in facts["timing_ms"].items()}
        self._at = {column.name: i for i, column in enumerate(self.columns)}
        self.per_task = None
        if "per_task" in arrays:
            of_task = unpack(arrays["per_task"])
            shape = (len(of_task), len(self.layers), len(self.readouts), of_task.shape[1])
            self.per_task = np.full(shape, np.nan)
            self.per_task[:, int(arrays["per_task_layer"]), self.readouts.index(HEADLINE_READOUT)] = of_task


def kept_at(path: Path, what: Revisit) -> Path:
    return beside(path, f".{what.name}.npz")


def revisited(run: Run, what: Revisit) -> dict[str, NDArray]:
    """What the checkpoints of a run say, or said when they were there."""
    path = kept_at(run.path, what)
    if not path.exists():
        write_arrays(path, what.read(run))
    with np.load(path) as file:
        return dict(file)
