"""Do hidden states come to cluster by task: when, in which layers, task by task?

Milestones of a curve, smoothed and with its plateau as in clmfast.findings: onset, half-rise and saturation are the
first steps from which it stays at or above 10, 50 and 95 % of its plateau. A curve whose plateau is below 0.1 has none.
A task is born at the first step from which more than half of the nearest neighbours of its states are its own.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.stats import spearmanr

from clmfast.config import RunConfig
from clmfast.findings import (
    HEADLINE_READOUT,
    PLATEAU_SHARE,
    best_layer,
    final_by_layer,
    first_by_layer,
    lasting_step,
    plateau,
    saturation_step,
    smooth_curve,
    task_curve,
)
from clmfast.plot import layout, task_timeline
from clmfast.record import Run
from clmfast.study.base import BASE_LABEL, Runs, Section, Study
from clmfast.study.claims import Claim, claim
from clmfast.study.figures import COLOURS, CONTROL_TEXT, CONTROLS, GREY, add_intervals, control_of, curves, layer_name

MILESTONES = {"onset": 0.1, "half-rise": 0.5, "saturation": PLATEAU_SHARE}
LEAST_PLATEAU = 0.1
BIRTH_PURITY = 0.5
FLAT_ARI = 0.1
HIGH_ARI = 0.8


def milestones(step: NDArray[np.int64], curve: NDArray[np.float64]) -> dict[str, float]:
    """Steps of the milestones by name; NaN for a curve without a plateau to speak of."""
    at, smooth = smooth_curve(step, curve)
    if len(at) < 2 or plateau(smooth) < LEAST_PLATEAU:
        return dict.fromkeys(MILESTONES, np.nan)
    found = {name: lasting_step(at, smooth, share * plateau(smooth)) for name, share in MILESTONES.items()}
    found["saturation"] = saturation_step(step, curve)
    return {name: np.nan if at_step is None else float(at_step) for name, at_step in found.items()}


def births(run: Run, layer: int) -> NDArray[np.float64]:
    """Step at which each task is born in a layer [tasks]; inf: not in this run."""
    assert run.per_task is not None
    purity = run.per_task[:, layer, run.readouts.index(HEADLINE_READOUT)]
    found = [lasting_step(*smooth_curve(run.step, of_task), BIRTH_PURITY) for of_task in purity.T]
    return np.array([np.inf if at is None else at for at in found])


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's, of what both have; 0 where one does not vary, NaN with fewer than three."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3:
        return np.nan
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y).statistic)


def gain_at_the_end(run: Run, layer: int) -> float:
    """Gain of the last tenth of the smoothed ARI over the tenth before, as a share of the plateau."""
    _, smooth = smooth_curve(run.step, task_curve(run, layer))
    tenth = max(1, len(smooth) // 10)
    return float((plateau(smooth) - smooth[-2 * tenth : -tenth].mean()) / max(plateau(smooth), LEAST_PLATEAU))


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    base = list(runs[BASE_LABEL].values())
    tops = [best_layer(run) for run in base]
    layers = np.array(base[0].layers, float)
    ari = np.stack([final_by_layer(run, "ari_task") for run in base])
    by_layer = [[milestones(run.step, task_curve(run, layer)) for layer in run.layers] for run in base]
    half_rise = np.array([[one["half-rise"] for one in row] for row in by_layer])

    measure = "ARI of k-means with the task, best layer, last probe"
    claims = [
        claim(
            f"Hidden states cluster by task: more than {name}",
            measure, ari.max(1), name, [control_of(run, name, "ari_task") for run in base], finding="1",
        )
        for name in CONTROLS
    ]  # fmt: skip
    claims += [
        claim("They do so at a high level", measure, ari.max(1), "bar", HIGH_ARI, finding="2"),
        claim("The embedding stays flat", "ARI, layer 0, last probe", ari[:, 0], "bar", FLAT_ARI, "below", "2"),
        claim(
            "Higher layers cluster more",
            "rank correlation of layer and ARI, last probe",
            [rank_correlation(layers, row) for row in ari],
            "untrained model",
            [rank_correlation(layers, first_by_layer(run, "ari_task")) for run in base],
            finding="2",
        ),
        claim(
            "The curve has saturated",
            "gain of ARI in the last tenth over that before, share of the plateau",
            [abs(gain_at_the_end(run, top)) for run, top in zip(base, tops, strict=True)],
            "bar", 0.05, "below", "2",
        ),
        claim(
            "Lower layers rise before higher ones",
            "rank correlation of layer and half-rise step",
            [rank_correlation(layers, row) for row in half_rise],
            "no order", 0.0,
        ),
    ]  # fmt: skip
    sections = [
        Section(
            "Clusters by task form layer by layer",
            "ARI of k-means (as many clusters as tasks) with the task, at every step: mean over seeds, and their range "
            f"as a band. {CONTROL_TEXT}",
            curves(base, [("ari_task", "", "ARI (task)")]),
        ),
        Section(
            "When each layer rises",
            "Onset, half-rise and saturation: first steps from which the smoothed ARI stays at or above 10, 50 and "
            "95 % of its plateau. Layers whose plateau is below 0.1 have none. Bars: interval over seeds. The controls "
            "have no curve over steps, so none of them rises.",
            milestone_figure(by_layer),
        ),
        Section(
            "When each task is born",
            "Share of tasks whose states have had mostly their own kind as nearest neighbours from that step on, in "
            "the layer that clusters most; one line for each seed. Dashed: tasks that would count as born with "
            "shuffled labels.",
            birth_figure(base, tops),
        ),
    ]
    figure = task_timeline(base[0], tops[0], HEADLINE_READOUT)
    if figure is not None:
        text = f"Neighbour purity of every task, seed {base[0].config.seed}, layer {tops[0]}."
        sections.append(Section("Task by task, one seed", text, figure))
    return claims, sections


def milestone_figure(by_layer: list[list[dict[str, float]]]) -> go.Figure:
    figure = go.Figure()
    names = [layer_name(layer) for layer in range(len(by_layer[0]))]
    for name, colour in zip(MILESTONES, COLOURS, strict=False):
        samples = [[row[layer][name] for row in by_layer] for layer in range(len(names))]
        add_intervals(figure, names, samples, name, colour)
    figure.update_xaxes(categoryorder="array", categoryarray=names)
    figure.update_yaxes(title_text="training step", rangemode="tozero")
    return layout(figure, 400)


def birth_figure(runs: list[Run], tops: list[int]) -> go.Figure:
    figure = go.Figure()
    for i, (run, top) in enumerate(zip(runs, tops, strict=True)):
        born = births(run, top)
        at = np.sort(born[np.isfinite(born)])
        x = np.concatenate([[0], at, [run.config.steps]])
        y = np.concatenate([[0], np.arange(1, len(at) + 1), [len(at)]]) / len(born)
        figure.add_scatter(
            x=x, y=y, mode="lines", line={"shape": "hv", "color": COLOURS[i % len(COLOURS)], "width": 1.5},
            name=f"seed {run.config.seed}",
        )  # fmt: skip
    shuffled = [control_of(run, "shuffled labels", "neighbour_purity") >= BIRTH_PURITY for run in runs]
    figure.add_scatter(
        x=[0, runs[0].config.steps], y=[float(np.mean(shuffled))] * 2, mode="lines", name="shuffled labels",
        line={"color": GREY, "dash": "dash"},
    )  # fmt: skip
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="share of tasks born", range=[-0.05, 1.05])
    return layout(figure, 400)


def configs(base: RunConfig) -> dict[str, RunConfig]:
    return {BASE_LABEL: base}


STUDY = Study("Do clusters by task form, in which layers, and when?", 10, 5, configs, analyse)
