"""What do the states cluster by? The same k-means partition against every kind of label, at both positions.

The margin of a kind is its ARI minus the largest ARI of any other kind, in the layer where the kind's own is largest,
at the last probe. At the end of the instruction no input has been read: only task, grammar and instruction exist.
Nothing wins where no kind's mean over seeds is above the largest of a run's shuffles of the task, mean over seeds.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from clmfast.config import LABEL_KINDS
from clmfast.findings import control, final_by_layer, first_by_layer
from clmfast.plot import GREY, KIND_COLOURS, READOUT_TEXT, kind_name, layout
from clmfast.record import Run
from clmfast.study.base import BASE_LABEL, Runs, Section, Study
from clmfast.study.claims import Claim, claim
from clmfast.study.emergence import configs
from clmfast.study.figures import CONTROL_TEXT, add_band, add_controls, curves, layer_name, over_seeds


def kinds_of(readout: str) -> tuple[str, ...]:
    return LABEL_KINDS[:3] if readout == "instruction_end" else LABEL_KINDS


def best_and_rival(run: Run, readout: str, kind: str) -> tuple[float, float]:
    """(ARI of the kind in its best layer, the largest ARI of another kind there)."""
    ari = {k: final_by_layer(run, f"ari_{k}", "", readout) for k in kinds_of(readout)}
    layer = int(np.nanargmax(ari[kind]))
    return float(ari[kind][layer]), float(max(values[layer] for k, values in ari.items() if k != kind))


NOTHING = len(LABEL_KINDS)  # in place of the index of a kind


def winner_of(ari: NDArray[np.float64], chance: float | NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the kind with the largest ARI of [kinds, ...]; NOTHING where that is no more than chance."""
    return np.where(ari.max(0) > chance, ari.argmax(0), NOTHING)


def chance_of(runs: list[Run], readout: str) -> NDArray[np.float64]:
    """[layers] the largest ARI of a run's shuffles, mean over runs."""
    bands = [[control(run, "shuffled_labels", readout, "ari_task", "", at) for at in run.layers] for run in runs]
    return np.mean([[band["high"] if band else 0.0 for band in of_run] for of_run in bands], axis=0)


def winners(runs: list[Run], readout: str) -> tuple[NDArray, NDArray]:
    """(steps, index of the winning kind [layers, steps]), mean over seeds of the window's ARI."""
    kinds = kinds_of(readout)
    found = [over_seeds(runs, lambda r: r.by_layer("window", readout, f"ari_{k}")) for k in kinds]  # noqa: B023
    step, mean = found[0][0], np.stack([values.mean(0) for _, values in found])
    known = np.isfinite(mean).all((0, 2))
    return step[known], winner_of(mean[:, known], chance_of(runs, readout)).T


def winners_of_controls(runs: list[Run], readout: str) -> dict[str, int]:
    """Who wins where nothing was learned: with letter counts, and in the best layer of the untrained model."""
    kinds, chance = kinds_of(readout), chance_of(runs, readout).max()

    def letters(run: Run, kind: str) -> float:
        found = control(run, "raw_strings", readout, f"ari_{kind}", "")
        return found["mean"] if found else 0.0

    ari = {
        "letters alone": [np.mean([letters(run, kind) for run in runs]) for kind in kinds],
        "untrained model": [
            np.mean([first_by_layer(run, f"ari_{kind}", "", readout).max() for run in runs]) for kind in kinds
        ],
    }
    return {name: int(winner_of(np.array(values), chance)) for name, values in ari.items()}


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    base = list(runs[BASE_LABEL].values())
    claims = []
    for readout in base[0].readouts:
        for kind in kinds_of(readout):
            pairs = np.array([best_and_rival(run, readout, kind) for run in base])
            claims.append(
                claim(
                    f"States {READOUT_TEXT[readout]} cluster by {kind_name(kind)} more than by anything else",
                    f"ARI with the {kind_name(kind)}, its best layer, last probe",
                    pairs[:, 0], "best other kind", pairs[:, 1],
                    finding="1" if kind == "task" and readout == "instruction_end" else "",
                )
            )  # fmt: skip
    return claims, [
        Section(
            "Who wins, where and when",
            "The kind of label with the largest ARI, for every layer and step, mean over seeds; nothing: no kind is "
            "above what shuffled labels give. Below the layers, the controls: who wins with letter counts in place of "
            "states, and in the best layer of the untrained model. It says who wins, not by how much: see the curves.",
            winner_figure(base),
        ),
        Section(
            "By how much, in the top layer",
            f"ARI of the same clusters with every kind of label; controls are those of the task. {CONTROL_TEXT}",
            top_figure(base),
        ),
        Section("The task, in every layer", CONTROL_TEXT, curves(base, [("ari_task", "", "ARI (task)")])),
    ]


def winner_figure(runs: list[Run]) -> go.Figure:
    readouts = runs[0].readouts
    figure = make_subplots(1, len(readouts), shared_yaxes=True, subplot_titles=[READOUT_TEXT[r] for r in readouts])
    classes = {kind_name(kind): colour for kind, colour in KIND_COLOURS.items()} | {"nothing": "#e8e8e8"}
    n = len(classes)
    scale = [[(i + edge) / n, colour] for i, colour in enumerate(classes.values()) for edge in (0, 1)]
    for col, readout in enumerate(readouts, start=1):
        step, winner = winners(runs, readout)
        every = max(1, len(step) // 300)
        controls = winners_of_controls(runs, readout)
        rows = np.concatenate([np.repeat([[i] for i in controls.values()], winner.shape[1], axis=1), winner])
        ticks = {"tickvals": list(range(n)), "ticktext": list(classes)}
        figure.add_heatmap(
            x=step[::every], y=list(range(len(rows))), z=rows[:, ::every], zmin=-0.5, zmax=n - 0.5, colorscale=scale,
            colorbar=ticks, showscale=col == 1, row=1, col=col,
        )  # fmt: skip
        figure.add_hline(len(controls) - 0.5, line={"color": GREY, "width": 2}, row=1, col=col)
        names = [*controls, *(layer_name(layer) for layer in runs[0].layers)]
        figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, row=1, col=col)
    figure.update_xaxes(title_text="training step")
    return layout(figure, 420)


def top_figure(runs: list[Run]) -> go.Figure:
    readouts = runs[0].readouts
    figure = make_subplots(1, len(readouts), shared_yaxes=True, subplot_titles=[READOUT_TEXT[r] for r in readouts])
    top = runs[0].layers[-1]
    for col, readout in enumerate(readouts, start=1):
        add_controls(figure, runs, [0, runs[0].config.steps], "ari_task", "", readout, 1, col, col == 1)
        for kind in kinds_of(readout):
            step, values = over_seeds(runs, lambda r: r.by_layer("window", readout, f"ari_{kind}")[:, top])  # noqa: B023
            add_band(figure, step, values, kind_name(kind), KIND_COLOURS[kind], col == len(readouts), 1, col)
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="ARI", col=1)
    return layout(figure, 400)


STUDY = Study("What do the states cluster by: who wins where, and when?", 10, 5, configs, analyse)
