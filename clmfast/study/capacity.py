"""How do onset, saturation and the merging of grammars move with the size of the model and of the task?

One thing at a time is made smaller or larger than in the default run: depth, width, tasks, grammars of a task, letters
of the alphabet. All else stays, also the learning rate and the number of steps; but initial weights are scaled by
1 / sqrt(width), and inputs get a second letter where there are fewer letters than inputs.

Onset and saturation are those of the ARI with the task in the layer that clusters most, as in the study of emergence.
Merging: the half-rise, by the same rule, of cross-grammar kNN in the layer where it is largest at the end. A run whose
curve has no plateau to speak of has none of them; one that still rises at its last step would saturate later than it
says here. How far grammars merge is cross-grammar kNN at the last probe, best layer, less the strongest control of the
same run. The effect of a size is the slope of a least-squares line through the runs of a seed in which it happens:
change for each doubling. Its claim is worded in the direction of the mean; as the interval may exclude zero on either
side, that is a test in both directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots

from clmfast.config import RunConfig
from clmfast.findings import HEADLINE_READOUT, HEADLINE_SPLIT, best_layer, final_by_layer, task_curve
from clmfast.plot import GREY, layer_colours, layout
from clmfast.record import Run
from clmfast.study.base import BASE_LABEL, Runs, Section, Study, changed
from clmfast.study.claims import Claim, claim, side_of
from clmfast.study.emergence import milestones
from clmfast.study.figures import (
    COLOURS,
    CONTROL_TEXT,
    CONTROLS,
    UNTRAINED,
    add_band,
    add_controls,
    add_intervals,
    control_of,
    over_seeds,
)
from clmfast.study.unseen import CROSS


def with_width(base: RunConfig, width: int) -> RunConfig:
    init_std = base.model.init_std * math.sqrt(base.model.width / width)
    return changed(base, "model", width=width, init_std=init_std)


def with_letters(base: RunConfig, n_letters: int) -> RunConfig:
    input_length = base.task.input_length
    while n_letters**input_length < base.task.n_inputs:
        input_length += 1
    return changed(base, "task", alphabet=base.task.alphabet[:n_letters], input_length=input_length)


@dataclasses.dataclass(frozen=True)
class Axis:
    """`factors` times the default are tried, none below `least`; `more` words an increase."""

    more: str
    size: Callable[[RunConfig], int]
    sized: Callable[[RunConfig, int], RunConfig]
    factors: tuple[float, ...]
    least: int = 1


AXES = {
    "depth": Axis(
        "more blocks", lambda c: c.model.n_layers, lambda c, n: changed(c, "model", n_layers=n), (1 / 3, 2 / 3, 4 / 3)
    ),
    "width": Axis("more width", lambda c: c.model.width, with_width, (1 / 4, 1 / 2, 3 / 2)),
    "tasks": Axis(
        "more tasks", lambda c: c.task.n_tasks, lambda c, n: changed(c, "task", n_tasks=n), (1 / 2, 3 / 2), least=2
    ),
    "grammars": Axis(  # of a single one none can merge
        "more grammars of a task", lambda c: c.task.n_grammars, lambda c, n: changed(c, "task", n_grammars=n),
        (1 / 2, 2), least=2,
    ),
    "letters": Axis("more letters", lambda c: len(c.task.alphabet), with_letters, (1 / 3, 2 / 3), least=2),
}  # fmt: skip


def configs(base: RunConfig) -> dict[str, RunConfig]:
    found = {BASE_LABEL: base}
    for name, axis in AXES.items():
        for factor in axis.factors:
            size = max(axis.least, round(factor * axis.size(base)))
            if size != axis.size(base):
                found[f"{name} {size}"] = axis.sized(base, size)
    return found


def steps_of(run: Run) -> dict[str, float]:
    """Onset and saturation of clusters, and the step where grammars have half merged; NaN for what does not happen."""
    of_task = milestones(run.step, task_curve(run, best_layer(run)))
    return {
        "onset": of_task["onset"],
        "saturation": of_task["saturation"],
        "merging": milestones(run.step, merging_curve(run))["half-rise"],
    }


def merging_curve(run: Run) -> NDArray[np.float64]:
    """Cross-grammar kNN at every step, in the layer where it is largest at the end."""
    layer = int(np.nanargmax(final_by_layer(run, CROSS, HEADLINE_SPLIT)))
    return run.by_layer("window", HEADLINE_READOUT, CROSS, HEADLINE_SPLIT)[:, layer]


def numbers_of(run: Run) -> dict[str, float]:
    """All that moves with a size, and the controls of cross-grammar kNN."""
    cross = float(np.nanmax(final_by_layer(run, CROSS, HEADLINE_SPLIT)))
    controls = {name: control_of(run, name, CROSS, HEADLINE_SPLIT) for name in CONTROLS}
    strongest = max(controls.values())
    return steps_of(run) | {CROSS: cross, STRONGEST: strongest, "beyond": cross - strongest} | controls


def slope(size: ArrayLike, value: ArrayLike) -> float:
    """Change of the value for each doubling of the size; NaN with fewer than two sizes that have a value."""
    x, y = np.log2(np.asarray(size, float)), np.asarray(value, float)
    known = np.isfinite(y)
    if len(set(x[known])) < 2:
        return math.nan
    return round(float(np.polyfit(x[known], y[known], 1)[0]), 9)  # a line that is level is level


STRONGEST = "strongest control"
WORDS = {  # measure -> (what happens, above and below the control, unit)
    "onset": ("Clusters start to form", "later", "earlier", "step of onset"),
    "saturation": ("Clustering saturates", "later", "earlier", "step of saturation"),
    "merging": ("Grammars have half merged", "later", "earlier", "step of half-rise of cross-grammar kNN"),
    "beyond": ("Grammars merge", "further", "less far", "cross-grammar kNN less its strongest control"),
}
Group = Mapping[int, Mapping[str, float]]  # seed -> numbers


def labels_of(axis: Axis, name: str, all_configs: Mapping[str, RunConfig]) -> dict[str, int]:
    """Label -> size of the configurations along an axis, the smallest first."""
    sizes = {
        label: axis.size(config)
        for label, config in all_configs.items()
        if label == BASE_LABEL or label.startswith(f"{name} ")
    }
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def trend(axis: Axis, sizes: Mapping[str, int], numbers: Mapping[str, Group], measure: str) -> Claim:
    """How a measure moves with a size."""
    seeds = sorted({seed for label in sizes for seed in numbers[label]})

    found = [
        slope(
            *zip(
                *((size, numbers[at][seed][measure]) for at, size in sizes.items() if seed in numbers[at]), strict=True
            )
        )
        for seed in seeds
    ]
    side = side_of(found)
    what, above, below, unit = WORDS[measure]
    return claim(
        f"{what} {above if side == 'above' else below} with {axis.more} ({', '.join(map(str, sizes.values()))})",
        f"{unit}, change for each doubling", found, "no change", 0.0, side,
    )  # fmt: skip


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    numbers = {label: {seed: numbers_of(run) for seed, run in group.items()} for label, group in runs.items()}
    all_configs = {label: next(iter(group.values())).config for label, group in runs.items()}
    sizes = {name: labels_of(axis, name, all_configs) for name, axis in AXES.items()}
    claims = [trend(axis, sizes[name], numbers, measure) for name, axis in AXES.items() for measure in WORDS]
    for label, group in numbers.items():
        claims.append(
            claim(
                f"Grammars of a task merge: {label}", "cross-grammar kNN, best layer, last probe",
                [one[CROSS] for one in group.values()], STRONGEST, [one[STRONGEST] for one in group.values()],
                finding="5",
            )
        )  # fmt: skip
    groups = {label: list(group.values()) for label, group in runs.items()}
    return claims, [
        Section(
            "What moves with what",
            "Mean over seeds, and its interval as a bar; sizes on a logarithmic axis, the default among them. "
            "Top: steps at which clusters start to form and saturate, and at which grammars have half merged; runs in "
            "which that does not happen have no point. Bottom: how far grammars merge in the end, beside its controls. "
            "Controls have no curve over steps, so there is nothing of them in the top row.",
            size_figure(sizes, numbers),
        ),
        Section(
            "While it trains",
            "Light: the smallest size, dark: the largest, in the layer that is best at the end; mean over seeds and "
            f"their range. Controls are those of the default run. {CONTROL_TEXT}",
            training_figure(sizes, groups),
        ),
    ]


def size_figure(sizes: Mapping[str, Mapping[str, int]], numbers: Mapping[str, Group]) -> go.Figure:
    figure = make_subplots(
        2, len(sizes), shared_xaxes="columns", shared_yaxes="rows", vertical_spacing=0.06, horizontal_spacing=0.02,
        column_titles=list(sizes),
    )  # fmt: skip
    styles = {
        "onset": (COLOURS[1], 1), "merging": (COLOURS[2], 1), "saturation": (COLOURS[0], 1),
        CROSS: (COLOURS[3], 2), "letters alone": (GREY, 2), "untrained model": (UNTRAINED, 2),
        "shuffled labels": ("#bbbbbb", 2),
    }  # fmt: skip
    names = {"merging": "grammars half merged", CROSS: "cross-grammar kNN"}
    for col, of_axis in enumerate(sizes.values(), start=1):
        for measure, (colour, row) in styles.items():
            samples: Sequence[ArrayLike] = [[one[measure] for one in numbers[label].values()] for label in of_axis]
            add_intervals(
                figure, list(of_axis.values()), samples, names.get(measure, measure), colour,
                legendgroup=measure, showlegend=col == 1, row=row, col=col,
            )  # fmt: skip
        figure.update_xaxes(type="log", tickvals=list(of_axis.values()), row=1, col=col)
        figure.update_xaxes(type="log", tickvals=list(of_axis.values()), row=2, col=col)
    figure.update_yaxes(title_text="training step", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="cross-grammar kNN", row=2, col=1)
    figure.update_yaxes(range=[-0.05, 1.05], row=2)
    return layout(figure, 640)


def training_figure(sizes: Mapping[str, Mapping[str, int]], groups: Mapping[str, list[Run]]) -> go.Figure:
    figure = make_subplots(
        2, len(sizes), shared_xaxes=True, shared_yaxes="rows", vertical_spacing=0.06, horizontal_spacing=0.02,
        column_titles=list(sizes),
    )  # fmt: skip
    base = groups[BASE_LABEL]
    rows: tuple[tuple[str, str, Callable[[Run], NDArray]], ...] = (
        ("ari_task", "", lambda run: task_curve(run, best_layer(run))),
        (CROSS, HEADLINE_SPLIT, merging_curve),
    )
    for col, (name, of_axis) in enumerate(sizes.items(), start=1):
        for row, (measure, split, read) in enumerate(rows, start=1):
            ends = [0, base[0].config.steps]
            add_controls(figure, base, ends, measure, split, row=row, col=col, show_legend=row == col == 1)
            for (label, size), colour in zip(of_axis.items(), layer_colours(len(of_axis)), strict=True):
                text = f"{name} {size}"
                add_band(figure, *over_seeds(groups[label], read), text, colour, row == 1, row, col)
    figure.update_xaxes(title_text="training step", row=2)
    figure.update_yaxes(range=[-0.05, 1.05])
    figure.update_yaxes(title_text="ARI (task)", row=1, col=1)
    figure.update_yaxes(title_text="cross-grammar kNN", row=2, col=1)
    return layout(figure, 640)


STUDY = Study("How do clusters move with the size of the model and of the task?", 5, 1, configs, analyse)
