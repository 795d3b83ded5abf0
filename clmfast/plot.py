"""Pictures of a run, as plotly figures. They draw what was recorded and compute no measure."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import qualitative, sample_colorscale
from plotly.subplots import make_subplots

from clmfast.config import LABEL_KINDS
from clmfast.findings import (
    HEADLINE_SPLIT,
    best_layer,
    control,
    early_stopping_step,
    final_by_layer,
    first_by_layer,
    saturation_step,
    task_curve,
)
from clmfast.record import Run

READOUT_TEXT = {
    "instruction_end": "at the end of the instruction",
    "prompt_end": "at the end of the prompt",
    "mean": "mean over the sequence",
}
KIND_COLOURS = dict(zip(LABEL_KINDS, ("#d62728", "#1f77b4", "#17becf", "#9467bd", "#2ca02c", "#ff7f0e"), strict=True))
GREY = "#777777"
PROJECTED_POINTS = 700  # per picture of a projection: enough to see, few enough for a page with dozens of them


def kind_name(kind: str) -> str:
    """As pictures and claims write a kind of label: task x output is the pair of both."""
    return kind.replace("_", " x ")


def layer_colours(n_layers: int) -> list[str]:
    """Light for the embedding to dark for the top: one scale in every picture."""
    return sample_colorscale("Plasma_r", np.linspace(0.15, 1, n_layers))


def layout(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 70, "r": 20, "t": 60, "b": 55},
        font={"family": "system-ui, sans-serif", "size": 13}, hoverlabel={"namelength": -1},
    )  # fmt: skip
    return figure


def _add_layer_lines(
    figure: go.Figure, run: Run, values: NDArray[np.float64], row: int, col: int, show_legend: bool,
    band: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> None:  # fmt: skip
    """A line for each layer, over its band [rows, layers] from low to high."""
    is_measured = np.isfinite(values).any(1)
    for layer, colour in zip(run.layers, layer_colours(len(run.layers)), strict=True):
        name = "layer 0 (embedding)" if layer == 0 else f"layer {layer}"
        if band is not None:
            x, (low, high) = run.step[is_measured], (edge[is_measured, layer].astype(np.float32) for edge in band)
            figure.add_scatter(
                x=np.concatenate([x, x[::-1]]), y=np.concatenate([low, high[::-1]]), mode="none", fill="toself",
                fillcolor=colour, opacity=0.3, legendgroup=name, showlegend=False, hoverinfo="skip", row=row, col=col,
            )  # fmt: skip
        figure.add_scatter(
            x=run.step[is_measured], y=values[is_measured, layer].astype(np.float32), mode="lines", name=name,
            legendgroup=name, showlegend=show_legend, line={"color": colour, "width": 1.6}, row=row, col=col,
            hovertemplate=f"step %{{x}}: %{{y:.3f}}<extra>{name}</extra>",
        )  # fmt: skip


def _add_controls(
    figure: go.Figure, run: Run, readout: str, measure: str, split: str, row: int, col: int, show_legend: bool
) -> None:
    """The letters as a dashed line, shuffled labels as a grey band over all layers, the untrained model as dots."""
    ends = [run.step[0], run.config.steps]
    raw = control(run, "raw_strings", readout, measure, split)
    if raw:
        figure.add_scatter(
            x=ends, y=[raw["mean"]] * 2, mode="lines", name="letters alone", legendgroup="letters",
            showlegend=show_legend, line={"color": GREY, "dash": "dash", "width": 1.5}, row=row, col=col,
        )  # fmt: skip
    bands = [control(run, "shuffled_labels", readout, measure, split, layer) for layer in run.layers]
    known = [band for band in bands if band]
    if known:
        low, high = min(b["low"] for b in known), max(b["high"] for b in known)
        figure.add_scatter(
            x=[*ends, *ends[::-1]], y=[low, low, high, high], fill="toself", mode="none", name="shuffled labels",
            legendgroup="shuffled", showlegend=show_legend, fillcolor="rgba(120,120,120,0.35)", hoverinfo="skip",
            row=row, col=col,
        )  # fmt: skip
    has_probe = any(c.estimator == "probe" and c.readout == readout and c.split == split for c in run.columns)
    values = first_by_layer(run, measure, split, readout) if has_probe else np.array([])
    values = values[np.isfinite(values)]
    if len(values):
        figure.add_scatter(
            x=[*ends, *ends[::-1]], y=[min(values)] * 2 + [max(values)] * 2, mode="lines", fill="toself",
            name="untrained model, all layers", legendgroup="untrained", showlegend=show_legend, hoverinfo="skip",
            line={"color": "#3b8ea5", "width": 0.8, "dash": "dot"}, fillcolor="rgba(59,142,165,0.15)", row=row, col=col,
        )  # fmt: skip


def curves_by_layer(run: Run, measures: list[tuple[str, str, str]]) -> go.Figure:
    """A grid: rows are (measure, split, axis title), columns the readouts; one line per layer, controls as bands."""
    figure = make_subplots(
        len(measures), len(run.readouts), shared_xaxes=True, shared_yaxes="rows", vertical_spacing=0.07,
        horizontal_spacing=0.04, column_titles=[READOUT_TEXT[r] for r in run.readouts],
    )  # fmt: skip
    for row, (measure, split, title) in enumerate(measures, start=1):
        for col, readout in enumerate(run.readouts, start=1):
            first = row == col == 1
            _add_controls(figure, run, readout, measure, split, row, col, first)
            band = None
            if measure == "ari_task" and run.measurement_version > 1:
                low, high = (run.by_layer("window", readout, f"ari_task_{end}") for end in ("low", "high"))
                band = low, high
            _add_layer_lines(figure, run, run.by_layer("window", readout, measure, split), row, col, first, band)
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_yaxes(range=[-0.05, 1.05])
    figure.update_xaxes(title_text="training step", row=len(measures))
    return layout(figure, 120 + 330 * len(measures))


def learning(run: Run, layer: int | None) -> go.Figure:
    """Accuracy, loss and the clustering of one layer on one step axis, with early stopping and saturation marked."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    loss, accuracy = run.column("train/loss"), run.column(f"validation/{HEADLINE_SPLIT}/accuracy")
    is_loss, is_validated = np.isfinite(loss), np.isfinite(accuracy)
    figure.add_scatter(
        x=run.step[is_loss], y=loss[is_loss].astype(np.float32), mode="lines", name="training loss (right axis)",
        line={"color": "#bbbbbb", "width": 1}, secondary_y=True,
    )  # fmt: skip
    figure.add_scatter(
        x=run.step[is_validated], y=accuracy[is_validated].astype(np.float32), mode="lines+markers",
        name="accuracy, unseen instructions", line={"color": "#2ca02c"}, marker={"size": 4},
    )  # fmt: skip
    marks = [("early stopping", early_stopping_step(run), "#2ca02c", "top left")]
    if layer is not None:
        curve = task_curve(run, layer)
        is_measured = np.isfinite(curve)
        figure.add_scatter(
            x=run.step[is_measured], y=curve[is_measured].astype(np.float32), mode="lines",
            name=f"ARI (task), layer {layer}", line={"color": "#d62728", "width": 1.6},
        )  # fmt: skip
        marks.append(("clustering saturates", saturation_step(run.step, curve), "#d62728", "bottom right"))
    for text, step, colour, position in marks:
        if step is not None:
            figure.add_vline(
                step, line={"color": colour, "dash": "dash"}, annotation_text=f"{text}: step {step}",
                annotation_position=position, annotation_font_color=colour,
            )  # fmt: skip
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="accuracy, ARI", range=[-0.05, 1.05], secondary_y=False)
    figure.update_yaxes(title_text="loss (nats)", rangemode="tozero", showgrid=False, nticks=6, secondary_y=True)
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return layout(figure, 430)


def kinds_by_layer(run: Run) -> go.Figure:
    """What the last probe clusters by: ARI against each kind of label, layer by layer."""
    figure = make_subplots(
        1, len(run.readouts), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[READOUT_TEXT[r] for r in run.readouts],
    )  # fmt: skip
    for col, readout in enumerate(run.readouts, start=1):
        for kind, colour in KIND_COLOURS.items():
            values = final_by_layer(run, f"ari_{kind}", "", readout)
            figure.add_bar(
                x=list(run.layers), y=values.astype(np.float32), name=kind_name(kind), legendgroup=kind,
                marker_color=colour, showlegend=col == len(run.readouts), row=1, col=col,
                hovertemplate=f"layer %{{x}}: %{{y:.3f}}<extra>{kind_name(kind)}</extra>",
            )  # fmt: skip
        figure.update_xaxes(title_text="layer (0 = embedding)", dtick=1, row=1, col=col)
    figure.update_yaxes(title_text="ARI of k-means against the labels", col=1)
    return layout(figure, 400)


def projections(run: Run, readout: str) -> go.Figure | None:
    """The probe's training states on their first two principal components, at several steps; a menu picks the layer."""
    snapshots = run.snapshots(readout)
    if not snapshots:
        return None
    steps = list(snapshots)
    n_columns = min(4, len(steps))
    n_rows = -(-len(steps) // n_columns)
    figure = make_subplots(
        n_rows, n_columns, subplot_titles=[f"step {s}" for s in steps], horizontal_spacing=0.03, vertical_spacing=0.1
    )
    shown = best_layer(run, readout)
    palette = qualitative.Dark24
    for layer in run.layers:
        for i, snapshot in enumerate(snapshots.values()):
            some = slice(None, None, max(1, len(snapshot["task"]) // PROJECTED_POINTS))
            plane, task, grammar = snapshot["plane"][layer][some], snapshot["task"][some], snapshot["grammar"][some]
            figure.add_scattergl(
                x=plane[:, 0], y=plane[:, 1], mode="markers", visible=layer == shown, showlegend=False,
                marker={"size": 3.5, "color": [palette[t % len(palette)] for t in task], "opacity": 0.75},
                text=[f"task {t}, grammar {g}" for t, g in zip(task, grammar, strict=True)],
                hovertemplate="%{text}<extra></extra>", row=i // n_columns + 1, col=i % n_columns + 1,
            )  # fmt: skip
    buttons = [
        {
            "label": "layer 0 (embedding)" if layer == 0 else f"layer {layer}",
            "method": "update",
            "args": [{"visible": [one == layer for one in run.layers for _ in steps]}],
        }
        for layer in run.layers
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "active": shown, "x": 0, "xanchor": "left", "y": 1.2}])
    figure.update_xaxes(showticklabels=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, zeroline=False)
    figure.update_xaxes(title_text="principal component 1", row=n_rows)
    figure.update_yaxes(title_text="principal component 2", col=1)
    return layout(figure, 140 + 260 * n_rows)


def task_timeline(run: Run, layer: int, readout: str) -> go.Figure | None:
    """Neighbour purity of every task against the step: when does each task's cluster come together?"""
    if run.per_task is None:
        return None
    purity = run.per_task[:, layer, run.readouts.index(readout)]
    is_measured = np.isfinite(purity).any(1)
    every = max(1, int(is_measured.sum()) // 500)  # as many columns as a screen has room for
    final = purity[is_measured][-max(1, int(is_measured.sum()) // 10) :].mean(0)
    order = np.argsort((purity[is_measured] > final / 2).argmax(0))
    figure = go.Figure(
        go.Heatmap(
            x=run.step[is_measured][::every], y=[f"task {t}" for t in order],
            z=purity[is_measured][::every][:, order].T.astype(np.float32), zmin=0, zmax=1, colorscale="Viridis",
            colorbar={"title": {"text": "neighbour<br>purity"}},
            hovertemplate="step %{x}, %{y}: %{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="tasks, earliest first", showticklabels=len(order) <= 30)
    return layout(figure, 420)


def cost(run: Run) -> go.Figure:
    """Where the time of each step went."""
    figure = go.Figure()
    names = {
        "step_ms": "training", "validation_ms": "validation", "capture_ms": "capture",
        "ride_along_ms": "unseen examples in a pass of their own", "window_ms": "window measures", "probe_ms": "probe",
    }  # fmt: skip
    colours = ["#c7c7c7", "#8c8c8c", "#1f77b4", "#9467bd", "#d62728", "#ff7f0e"]
    # Means over 10 steps: single steps are spikes of whatever else the machine was doing.
    width = max(1, min(10, len(run.step) // 10))
    n = len(run.step) // width * width
    for (column, text), colour in zip(names.items(), colours, strict=True):
        if column not in run.timing:
            continue
        mean = run.timing[column][:n].reshape(-1, width).mean(1)
        figure.add_scatter(
            x=run.step[:n:width], y=mean.astype(np.float32), mode="lines", stackgroup="time", name=text,
            line={"width": 0.5, "color": colour}, hovertemplate=f"%{{y:.1f}} ms<extra>{text}</extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text=f"ms per step (mean of {width})")
    return layout(figure, 360)
