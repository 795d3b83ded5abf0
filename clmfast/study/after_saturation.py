"""Long after early stopping: do the clusters by task stay, or do they dissolve into a collapse by output?

Runs of many times the length, with two weight decays. "At early stopping" is, for a curve over steps, its mean from
that step to twice that step; for neural collapse, the first checkpoint not before it. "At the end" is the mean of the
last tenth; for neural collapse, the last checkpoint. The layer is the one that clusters most at early stopping, so that
the choice does not favour the end. A number stays if it keeps nine tenths of what it was.

NC1, NC2 and NC3 (Papyan, Han & Donoho 2020; clmfast/measure/collapse.py has the formulas) are those of the probe's
training states, run through the weights of the checkpoints: by task at the end of the instruction, in that layer; by
task and by output at the end of the prompt, where the output matrix reads them (after the last norm). NC3 by output
compares with the rows of the output matrix, less their mean, which changes no prediction. For tasks the model has no
such matrix: there it is what ridge regression fits to the same states. NC1 is compared as its logarithm (base 10).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from clmfast.config import RunConfig
from clmfast.findings import HEADLINE_READOUT, HEADLINE_SPLIT, early_stopping_step, smooth_curve
from clmfast.measure.collapse import Collapse, collapse
from clmfast.measure.controls import letter_counts
from clmfast.measure.probe import Probe
from clmfast.plot import GREY, layout
from clmfast.record import Run
from clmfast.study.base import Kept, Revisit, Runs, Section, Study, StudyError, changed
from clmfast.study.claims import Claim, claim
from clmfast.study.figures import (
    COLOURS,
    CONTROL_TEXT,
    CONTROLS,
    MAX_POINTS,
    UNTRAINED,
    add_band,
    add_controls,
    control_of,
    curves,
    over_seeds,
)
from clmfast.study.revisit import checkpoint_steps, model_at, tasks_of
from clmfast.study.summary import kept_at, revisited
from clmfast.study.unseen import CROSS, KNN

LENGTH = 6  # times the steps of other studies: some ten times the step that early stopping picks
MEASURE_EVERY, N_PROBES, VALIDATE_EVERY = 25, 24, 20
MORE_DECAY = 10  # times the default weight decay
STAYS = 0.9
SHUFFLE_SEED = 0
TOP = "prompt_end"


class View(NamedTuple):
    """States of a readout, by a kind of label."""

    readout: str
    kind: str
    colour: str


VIEWS = {
    "by task, end of the instruction": View(HEADLINE_READOUT, "task", COLOURS[0]),
    "by task, end of the prompt": View(TOP, "task", COLOURS[4]),
    "by output, end of the prompt": View(TOP, "output", COLOURS[2]),
}
TASK, TASK_TOP, OUTPUT = VIEWS
COLLAPSE = {
    "nc1": "NC1: scatter within<br>over between classes",
    "nc2_norm": "NC2: unequal lengths<br>of class means",
    "nc2_angle": "NC2: unequal angles<br>between them",
    "nc2_widest": "NC2: distance from<br>the widest angle",
    "nc3": "NC3: distance of<br>classifier and means",
}


def configs(base: RunConfig) -> dict[str, RunConfig]:
    steps = LENGTH * base.steps
    every = min(MEASURE_EVERY, max(1, steps // 20))
    patience = max(1, base.train.patience * base.train.validate_every // VALIDATE_EVERY)
    long = dataclasses.replace(base, steps=steps, measure_every=every, resume_every=LENGTH * base.resume_every)
    long = changed(long, "measure", probe_every=max(1, steps // N_PROBES), probe_splits=(HEADLINE_SPLIT,))
    long = changed(long, "train", validate_every=VALIDATE_EVERY, patience=patience)
    decays = (base.train.weight_decay, MORE_DECAY * base.train.weight_decay)
    return {f"weight decay {decay:g}": changed(long, "train", weight_decay=decay) for decay in decays}


def stop_of(run: Run) -> int:
    """The step that early stopping picked, at least 1."""
    return max(1, early_stopping_step(run) or 1)


Curve = tuple[NDArray[np.int64], NDArray[np.float64]]  # steps and values, where there are any


def curve(run: Run, readout: str, measure: str, layer: int, split: str = "") -> Curve:
    """The window's measure in one layer."""
    values = run.by_layer("window", readout, measure, split)[:, layer]
    known = np.isfinite(values)
    return run.step[known], values[known]


def around(run: Run, of_run: Curve) -> tuple[float, float]:
    """(value at early stopping, value at the end) of a curve; see the head of this file."""
    step, values = of_run
    stop, end = stop_of(run), run.config.steps
    early = (step >= stop) & (step <= 2 * stop)
    if not early.any():  # measured less often than that
        early = step == step[np.abs(step - stop).argmin()]
    return float(values[early].mean()), float(values[step >= 0.9 * end].mean())


def layer_at_stop(run: Run, readout: str = HEADLINE_READOUT, measure: str = "ari_task", split: str = "") -> int:
    """The layer where a measure is largest at early stopping."""
    return int(np.argmax([around(run, curve(run, readout, measure, layer, split))[0] for layer in run.layers]))


class Trace(NamedTuple):
    """Neural collapse of a run: `values` and `shuffled` [views, checkpoints, measures], `letters` [views, measures]."""

    step: NDArray[np.int64]
    values: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    letters: NDArray[np.float64]


def _numbers(found: Collapse) -> list[float]:
    return [getattr(found, name).item() for name in COLLAPSE]


def trace_of(run: Run) -> Trace:
    """Neural collapse at every checkpoint of a run."""
    trace = Trace(**revisited(run, TRACE))
    n_steps = (len(trace.step), trace.values.shape[1], trace.shuffled.shape[1])
    if len(set(n_steps)) != 1:
        raise StudyError(f"{kept_at(run.path, TRACE).name} must have values at each of its steps, got {n_steps}")
    return trace


def collapse_at_checkpoints(run: Run) -> Trace:
    """The same from the weights; StudyError if there are none."""
    steps, tasks = checkpoint_steps(run), tasks_of(run.config)
    measure = dataclasses.replace(run.config.measure, probe_splits=(), readouts=(HEADLINE_READOUT, TOP))
    probe = Probe(tasks, measure, len(run.layers), run.config.model.width, run.config.seed)
    sets = {s.readout: (s, i) for i, s in enumerate(probe.sets)}
    layer = layer_at_stop(run)
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    order = {r: torch.randperm(len(s.train), generator=generator) for r, (s, _) in sets.items()}
    values, shuffled = np.empty((2, len(VIEWS), len(steps), len(COLLAPSE)))
    for i, step in enumerate(steps):
        model = model_at(run, tasks, step)
        states = probe.states(model)
        with torch.inference_mode():
            head = model.head.weight[tasks.first_output :]
            points = {
                HEADLINE_READOUT: states[sets[HEADLINE_READOUT][1]][0][layer][None],
                TOP: model.norm_out(states[sets[TOP][1]][0][-1])[None],
            }
        for of_view, of_shuffled, view in zip(values, shuffled, VIEWS.values(), strict=True):
            label = sets[view.readout][0].train_labels[view.kind]
            weight = head - head[label.unique()].mean(0) if view.kind == "output" else None
            of_view[i] = _numbers(collapse(points[view.readout], label, weight))
            of_shuffled[i] = _numbers(collapse(points[view.readout], label[order[view.readout]], weight))
    letters = []
    for view in VIEWS.values():
        probe_set, _ = sets[view.readout]
        counts = letter_counts(tasks, probe_set.train, view.readout == TOP)
        letters.append(_numbers(collapse(counts, probe_set.train_labels[view.kind])))
    return Trace(np.array(steps), values, shuffled, np.array(letters))


TRACE = Revisit(
    "collapse",
    lambda run: collapse_at_checkpoints(run)._asdict(),
    (
        Kept("step", np.int64, (None,)),
        Kept("values", np.float64, (len(VIEWS), None, len(COLLAPSE))),
        Kept("shuffled", np.float64, (len(VIEWS), None, len(COLLAPSE))),
        Kept("letters", np.float64, (len(VIEWS), len(COLLAPSE))),
    ),
)


def collapse_around(run: Run, view: str, measure: str) -> tuple[float, float]:
    """(at early stopping, at the end); NC1 as its logarithm."""
    trace = trace_of(run)
    values = trace.values[list(VIEWS).index(view), :, list(COLLAPSE).index(measure)]
    if measure == "nc1":
        values = np.log10(values)
    at_stop = int(np.searchsorted(trace.step, min(stop_of(run), trace.step[-1])))
    return float(values[at_stop]), float(values[-1])


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    groups = {label: list(of_seed.values()) for label, of_seed in runs.items()}
    claims = [one for label, group in groups.items() for one in claims_of(label, group)]
    (less, few), (more, many) = ((label, group) for label, group in groups.items())
    end = {label: {run.config.seed: collapse_around(run, OUTPUT, "nc1")[1] for run in group}
           for label, group in groups.items()}  # fmt: skip
    both = sorted(end[less].keys() & end[more].keys())
    claims.append(
        claim(
            "More weight decay, more collapse by output", f"log NC1 by output, end of the prompt, {more}, at the end",
            [end[more][seed] for seed in both], less, [end[less][seed] for seed in both], "below",
        )
    )  # fmt: skip
    times = sorted({f"{run.config.steps / stop_of(run):.1f}" for run in [*few, *many]}, key=float)
    of_times = " to ".join(dict.fromkeys([times[0], times[-1]]))
    return claims, [
        Section(
            "Clusters and collapse on one time axis",
            f"Runs are {of_times} times as long as the step that early stopping picks "
            "(dotted, one line for each seed). The axis of steps is logarithmic. Lines: mean over seeds; bands: their "
            "range. In the rows of NC1 to NC3, 0 is full collapse, by the label that the colour names; chance for NC1 "
            "is the grey band. Dashed: letter counts in place of states, for NC in the colour of the label. Blue band: "
            "the untrained model. Grey band: shuffled labels.",
            time_figure(groups),
        ),
        *(
            Section(
                f"In every layer: {label}",
                f"ARI of the same clusters with the task and with the output. {CONTROL_TEXT}",
                curves(group, [("ari_task", "", "ARI (task)"), ("ari_output", "", "ARI (output)")]),
            )
            for label, group in groups.items()
        ),
    ]


def claims_of(label: str, group: list[Run]) -> list[Claim]:
    claims = []
    for title, readout, measure, split in (
        ("Clusters by task, end of the instruction", HEADLINE_READOUT, "ari_task", ""),
        ("Neighbours by task, end of the instruction", HEADLINE_READOUT, KNN, HEADLINE_SPLIT),
        ("Neighbours across grammars, end of the instruction", HEADLINE_READOUT, CROSS, HEADLINE_SPLIT),
        ("Neighbours across grammars, end of the prompt", TOP, CROSS, HEADLINE_SPLIT),
    ):
        layers = [layer_at_stop(run, readout, measure, split) for run in group]
        pairs = np.array(
            [around(run, curve(run, readout, measure, layer, split)) for run, layer in zip(group, layers, strict=True)]
        )
        what = f"{'ARI' if measure == 'ari_task' else 'cross-grammar kNN' if measure == CROSS else 'kNN'}, at the end"
        claims.append(
            claim(
                f"{title} stay: {label}", what, pairs[:, 1],
                f"{STAYS:g} of that at early stopping", STAYS * pairs[:, 0],
                finding="2" if measure == "ari_task" else "",
            )
        )  # fmt: skip
        if measure == KNN:
            continue  # letters alone reach it
        controls = [max(control_of(run, name, measure, split, readout) for name in CONTROLS) for run in group]
        claims.append(
            claim(f"{title} are more than every control: {label}", what, pairs[:, 1], "strongest control", controls)
        )
    for statement, view, measure, side in (
        ("States that predict the output collapse further by output", OUTPUT, "nc1", "below"),
        ("Their class means come closer to a simplex", OUTPUT, "nc2_angle", "below"),
        ("The output matrix comes to lie along them", OUTPUT, "nc3", "below"),
        ("States that predict the output lose their clusters by task", TASK_TOP, "nc1", "above"),
        ("States that have read the instruction collapse further by task", TASK, "nc1", "below"),
    ):
        found = np.array([collapse_around(run, view, measure) for run in group])
        what = f"{'log NC1' if measure == 'nc1' else 'NC3' if measure == 'nc3' else 'NC2, angles,'} {view}, at the end"
        claims.append(
            claim(f"{statement}: {label}", what, found[:, 1], "at early stopping", found[:, 0], side)  # type: ignore[arg-type]
        )
    by_output, by_task = ([collapse_around(run, view, "nc1")[1] for run in group] for view in (OUTPUT, TASK_TOP))
    claims.append(
        claim(
            f"States that predict the output have collapsed by output rather than by task: {label}",
            f"log NC1 {OUTPUT}, at the end", by_output, "by task", by_task, "below",
        )
    )  # fmt: skip
    return claims


def positive(step: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Without step 0, which has no place on a logarithmic axis, and thinned evenly along it."""
    known = np.flatnonzero((step > 0) & np.isfinite(values).all(0))
    if len(known) > MAX_POINTS:
        wanted = np.geomspace(step[known[0]], step[known[-1]], MAX_POINTS)
        known = np.unique(known[np.searchsorted(step[known], wanted).clip(max=len(known) - 1)])
    return step[known], values[:, known]


def time_figure(groups: dict[str, list[Run]]) -> go.Figure:
    titles = ["accuracy", "kNN accuracy,<br>task", "ARI", *COLLAPSE.values()]
    figure = make_subplots(
        len(titles), len(groups), shared_xaxes=True, shared_yaxes="rows", vertical_spacing=0.018,
        horizontal_spacing=0.04, column_titles=list(groups),
    )  # fmt: skip
    for col, group in enumerate(groups.values(), start=1):
        add_records(figure, group, col)
        for i in range(len(COLLAPSE)):
            add_collapse(figure, group, i, 4 + i, col)
        for run in group:
            figure.add_vline(stop_of(run), line={"color": "#444444", "dash": "dot", "width": 1}, col=col)
    for row, title in enumerate(titles, start=1):
        figure.update_yaxes(title_text=title, row=row, col=1, title_font_size=11)
        if row <= 3:
            figure.update_yaxes(range=[-0.05, 1.05], row=row)
    for i, measure in enumerate(COLLAPSE):  # the lines of early stopping keep plotly from finding a range by itself
        found = np.concatenate([_drawn(trace_of(run), i) for group in groups.values() for run in group])
        if measure == "nc1":
            low, high = np.log10(found[found > 0].min()), np.log10(found.max())
            figure.update_yaxes(type="log", dtick=1, range=[low - 0.1, high + 0.1], row=4 + i)
        else:
            figure.update_yaxes(range=[-0.02, 1.05 * found.max()], row=4 + i)
    end = max(run.config.steps for group in groups.values() for run in group)
    figure.update_xaxes(type="log", dtick=1, range=[0, float(np.log10(end)) + 0.02])
    figure.update_xaxes(title_text="training step", row=len(titles))
    return layout(figure, 1720)


def _drawn(trace: Trace, i: int) -> NDArray[np.float64]:
    """All numbers of a measure that the figure shows for a run."""
    found = np.concatenate([part[..., i].ravel() for part in trace[1:]])
    return found[np.isfinite(found)]


def add_records(figure: go.Figure, group: list[Run], col: int) -> None:
    """The rows of accuracy, kNN accuracy and ARI, from the records of the runs."""
    ends = [1, group[0].config.steps]

    def add(
        row: int, name: str, colour: str, read: Callable[[Run], NDArray], group_of_legend: bool | None = None
    ) -> None:
        step, values = positive(*over_seeds(group, read))
        show = col == 1 if group_of_legend is None else group_of_legend
        add_band(figure, step, values, name, colour, show, row, col)

    def training_accuracy(run: Run) -> NDArray[np.float64]:
        return np.append(smooth_curve(run.step, run.column("train/accuracy"))[1], np.nan)  # the last row has no batch

    add(1, "training examples", "#111111", training_accuracy)
    add(1, "unseen instructions", COLOURS[3], lambda run: run.column(f"validation/{HEADLINE_SPLIT}/accuracy"))
    for row, measure, split in ((2, KNN, HEADLINE_SPLIT), (3, "ari_task", "")):
        add_controls(figure, group, ends, measure, split, HEADLINE_READOUT, row, col, col == 1 and row == 2)
    for name in (TASK, TASK_TOP):
        view = VIEWS[name]
        add(2, name, view.colour, functools.partial(_of_layer, view, KNN, HEADLINE_SPLIT), col == 1)
    for name, view in VIEWS.items():
        add(
            3,
            name,
            view.colour,
            functools.partial(_of_layer, view, f"ari_{view.kind}", ""),
            col == 1 and name == OUTPUT,
        )


def _of_layer(view: View, measure: str, split: str, run: Run) -> NDArray[np.float64]:
    """The layer of the head of this file at the end of the instruction, the top one at the end of the prompt."""
    layer = layer_at_stop(run) if view.readout == HEADLINE_READOUT else run.layers[-1]
    return run.by_layer("window", view.readout, measure, split)[:, layer]


def add_collapse(figure: go.Figure, group: Sequence[Run], i: int, row: int, col: int) -> None:
    """One measure of neural collapse, with its controls."""
    traces = [trace_of(run) for run in group]
    ends = [1, group[0].config.steps]
    bands = {
        GREY: np.concatenate([t.shuffled[:, 1:, i].ravel() for t in traces]),
        UNTRAINED: np.concatenate([t.values[:, 0, i] for t in traces]),
    }
    for colour, values in bands.items():
        known = values[np.isfinite(values) & (values > 0)]
        if len(known):
            figure.add_scatter(
                x=[*ends, *ends[::-1]], y=[known.min()] * 2 + [known.max()] * 2, mode="lines", fill="toself",
                line={"color": colour, "width": 0.6}, opacity=0.35, fillcolor=colour, showlegend=False,
                hoverinfo="skip", row=row, col=col,
            )  # fmt: skip
    n = min(len(t.step) for t in traces)
    for i_view, (name, view) in enumerate(VIEWS.items()):
        letters = float(np.mean([t.letters[i_view, i] for t in traces]))
        figure.add_scatter(
            x=ends, y=[letters] * 2, mode="lines", line={"color": view.colour, "dash": "dash", "width": 1},
            showlegend=False, hoverinfo="skip", legendgroup=name, row=row, col=col,
        )  # fmt: skip
        step, values = positive(traces[0].step[:n], np.stack([t.values[i_view, :n, i] for t in traces]))
        add_band(figure, step, values, name, view.colour, False, row, col)


STUDY = Study(
    "Long after early stopping: do clusters by task stay, or dissolve into collapse by output?",
    5,
    1,
    configs,
    analyse,
    (TRACE,),
)
