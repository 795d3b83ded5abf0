"""What the pictures of several studies share: seeds as a mean and a band, controls beside every effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots

from clmfast.findings import HEADLINE_READOUT, control, final_by_layer, first_by_layer
from clmfast.plot import GREY, READOUT_TEXT, layer_colours, layout
from clmfast.record import Run
from clmfast.study.claims import interval

UNTRAINED = "#3b8ea5"
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
MAX_POINTS = 400  # of a line: as many as a screen has room for
CONTROLS = ("letters alone", "untrained model", "shuffled labels")

CONTROL_TEXT = (
    "Dashed: letter counts in place of states. Blue band: the untrained model, all layers. Grey band: shuffled labels."
)


def control_of(run: Run, name: str, measure: str, split: str = "", readout: str = HEADLINE_READOUT) -> float:
    """One of CONTROLS for one run, in the layer where it is strongest; of the shuffles, their mean there."""
    if name == "letters alone":
        found = control(run, "raw_strings", readout, measure, split)
        return found["mean"] if found else np.nan
    if name == "untrained model":
        return float(np.nanmax(first_by_layer(run, measure, split, readout)))
    bands = [control(run, "shuffled_labels", readout, measure, split, layer) for layer in run.layers]
    return max((band["mean"] for band in bands if band), default=np.nan)


def add_controls(
    figure: go.Figure, runs: Sequence[Run], ends: Sequence[float], measure: str, split: str = "",
    readout: str = HEADLINE_READOUT, row: int | None = None, col: int | None = None, show_legend: bool = True,
) -> None:  # fmt: skip
    """Letters as a dashed line, untrained and shuffled as bands over all seeds and layers, between two ends of x."""
    at = {"row": row, "col": col}
    x = [*ends, *ends[::-1]]
    shuffled = [
        band for run in runs for layer in run.layers
        if (band := control(run, "shuffled_labels", readout, measure, split, layer))
    ]  # fmt: skip
    untrained = np.concatenate([first_by_layer(run, measure, split, readout) for run in runs])
    untrained = untrained[np.isfinite(untrained)]
    bands = [
        (
            "shuffled labels",
            GREY,
            "rgba(120,120,120,0.35)",
            [b["low"] for b in shuffled],
            [b["high"] for b in shuffled],
        ),
        ("untrained model, all layers", UNTRAINED, "rgba(59,142,165,0.18)", untrained, untrained),
    ]
    for name, colour, fill, low, high in bands:
        if len(low):
            figure.add_scatter(
                x=x, y=[min(low)] * 2 + [max(high)] * 2, mode="lines", fill="toself", name=name, legendgroup=name,
                showlegend=show_legend, line={"color": colour, "width": 0.6}, fillcolor=fill, hoverinfo="skip", **at,
            )  # fmt: skip
    letters = np.array([control_of(run, "letters alone", measure, split, readout) for run in runs])
    if np.isfinite(letters).any():
        figure.add_scatter(
            x=list(ends), y=[float(np.nanmean(letters))] * 2, mode="lines", name="letters alone", legendgroup="letters",
            showlegend=show_legend, line={"color": GREY, "dash": "dash", "width": 1.5}, **at,
        )  # fmt: skip


def add_band(
    figure: go.Figure, step: NDArray, values: NDArray, name: str, colour: str, show_legend: bool = True,
    row: int | None = None, col: int | None = None,
) -> None:  # fmt: skip
    """Mean over seeds of values [seeds, steps] as a line, their range as a band."""
    measured = np.flatnonzero(np.isfinite(values).all(0))
    measured = measured[:: max(1, len(measured) // MAX_POINTS)]
    if not len(measured):
        return
    x, y = step[measured], values[:, measured]
    at = {"row": row, "col": col, "legendgroup": name}
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([y.min(0), y.max(0)[::-1]]).astype(np.float32), mode="none",
        fill="toself", fillcolor=colour, opacity=0.15, showlegend=False, hoverinfo="skip", **at,
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=y.mean(0).astype(np.float32), mode="lines", name=name, showlegend=show_legend,
        line={"color": colour, "width": 1.8}, hovertemplate=f"step %{{x}}: %{{y:.3f}}<extra>{name}</extra>", **at,
    )  # fmt: skip


def over_seeds(runs: Sequence[Run], read: Callable[[Run], NDArray]) -> tuple[NDArray, NDArray]:
    """(steps, values [seeds, steps, ...]); runs that ended early set the length."""
    n = min(len(run.step) for run in runs)
    return runs[0].step[:n], np.stack([read(run)[:n] for run in runs])


def layer_name(layer: int) -> str:
    return "layer 0 (embedding)" if layer == 0 else f"layer {layer}"


def curves(runs: Sequence[Run], measures: Sequence[tuple[str, str, str]], estimator: str = "window") -> go.Figure:
    """A grid: rows are (measure, split, axis title), columns the readouts; a line and a band for each layer."""
    readouts = runs[0].readouts
    figure = make_subplots(
        len(measures), len(readouts), shared_xaxes=True, shared_yaxes="rows", vertical_spacing=0.07,
        horizontal_spacing=0.04, column_titles=[READOUT_TEXT[r] for r in readouts],
    )  # fmt: skip
    for row, (measure, split, title) in enumerate(measures, start=1):
        for col, readout in enumerate(readouts, start=1):
            ends = [0, runs[0].config.steps]
            add_controls(figure, runs, ends, measure, split, readout, row, col, row == col == 1)
            step, values = over_seeds(runs, lambda r: r.by_layer(estimator, readout, measure, split))  # noqa: B023
            for layer, colour in zip(runs[0].layers, layer_colours(len(runs[0].layers)), strict=True):
                add_band(figure, step, values[:, :, layer], layer_name(layer), colour, row == col == 1, row, col)
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_yaxes(range=[-0.05, 1.05])
    figure.update_xaxes(title_text="training step", row=len(measures))
    return layout(figure, 120 + 330 * len(measures))


def add_intervals(
    figure: go.Figure, x: Sequence[float | str], samples: Sequence[ArrayLike], name: str, colour: str,
    mode: str = "lines+markers", **at: object,
) -> None:  # fmt: skip
    """Mean of each sample with its interval; with too few seeds for one, their range."""
    known = [np.asarray(s, float)[np.isfinite(np.asarray(s, float))] for s in samples]
    found = [interval(s) for s in known]
    low = [i.low if np.isfinite(i.low) else (s.min() if len(s) else np.nan) for i, s in zip(found, known, strict=True)]
    high = [
        i.high if np.isfinite(i.high) else (s.max() if len(s) else np.nan) for i, s in zip(found, known, strict=True)
    ]
    value = np.array([i.value for i in found])
    figure.add_scatter(
        x=list(x), y=value, mode=mode, name=name, line={"color": colour}, marker={"size": 7},
        error_y={"array": np.array(high) - value, "arrayminus": value - np.array(low), "thickness": 1.2}, **at,
    )  # fmt: skip


def final_layers(
    runs: Sequence[Run], measures: Sequence[tuple[str, str, str]], readout: str = HEADLINE_READOUT
) -> go.Figure:
    """The last probe against the layer, a panel for each (measure, split, title), with its controls."""
    figure = make_subplots(
        1, len(measures), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[title for *_, title in measures]
    )
    layers = list(runs[0].layers)
    for col, (measure, split, _) in enumerate(measures, start=1):
        ends = [-0.3, layers[-1] + 0.3]
        add_controls(figure, runs, ends, measure, split, readout, 1, col, col == 1)
        values = np.stack([final_by_layer(run, measure, split, readout) for run in runs])
        add_intervals(
            figure, layers, list(values.T), "trained model", COLOURS[0],
            legendgroup="trained", showlegend=col == 1, row=1, col=col,
        )  # fmt: skip
    figure.update_xaxes(title_text="layer (0 = embedding)", dtick=1)
    figure.update_yaxes(range=[-0.05, 1.05])
    return layout(figure, 400)
