"""Does early stopping pick the step at which clustering saturates? In three difficulties: half, once and one and a half
times the tasks.

Early stopping picks the step of the best accuracy on unseen instructions, validated every few steps. Saturation is that
of the ARI of a layer, smoothed, as in clmfast.findings; the headline is the layer that clusters most. Lag: saturation
minus early stopping, in steps. The control pairs the early stopping of one seed with the saturation of the others: if
the two were close merely because all runs are alike, that would be as close. A layer whose ARI never reaches a plateau
of 0.1 has no saturation and its seed is left out.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.stats import rankdata

from clmfast.config import RunConfig
from clmfast.findings import CLOSE_SHARE_OF_RUN, HEADLINE_SPLIT, best_layer, early_stopping_step, task_curve
from clmfast.plot import layout
from clmfast.record import Run
from clmfast.study.base import BASE_LABEL, Runs, Section, Study, changed
from clmfast.study.claims import Claim, claim, side_of
from clmfast.study.emergence import milestones, rank_correlation
from clmfast.study.figures import (
    COLOURS,
    CONTROL_TEXT,
    GREY,
    add_band,
    add_controls,
    add_intervals,
    layer_name,
    over_seeds,
)

EASY, HARD = "half the tasks", "one and a half times the tasks"


def configs(base: RunConfig) -> dict[str, RunConfig]:
    n = base.task.n_tasks
    return {
        EASY: changed(base, "task", n_tasks=max(2, n // 2)),
        BASE_LABEL: base,
        HARD: changed(base, "task", n_tasks=n + n // 2),
    }


def stop_of(run: Run) -> float:
    found = early_stopping_step(run)
    return np.nan if found is None else float(found)


def saturation_of(run: Run, layer: int) -> float:
    return milestones(run.step, task_curve(run, layer))["saturation"]


def mismatched(stop: NDArray[np.float64], saturation: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each seed the mean distance of its early stopping from the saturation of the other seeds."""
    distance = np.abs(stop[:, None] - saturation[None])
    np.fill_diagonal(distance, np.nan)
    known = np.isfinite(distance)
    return np.where(known, distance, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def ranks_within(steps: dict[str, NDArray[np.float64]], others: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Ranks of the steps within their own difficulty, from 0 to 1, one difficulty after the other; NaN where either is
    missing. Harder runs stop and saturate later anyway: ranks over all difficulties would only say that."""
    ranks = []
    for label, of_label in steps.items():
        known = np.isfinite(of_label) & np.isfinite(others[label])
        of_known = np.full(len(of_label), np.nan)
        of_known[known] = (rankdata(of_label[known]) - 0.5) / max(1, known.sum())
        ranks.append(of_known)
    return np.concatenate(ranks)


def leader(label: str, lag: NDArray[np.float64]) -> Claim:
    """Who comes first, in the direction of the mean."""
    side = side_of(lag)
    statement = {
        "above": "Accuracy leads: clustering saturates after the step that early stopping picks",
        "below": "Clustering leads: it saturates before the step that early stopping picks",
    }[side]
    return claim(f"{statement}: {label}", "saturation - early stopping, steps", lag, "same step", 0.0, side)


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    groups = {label: list(of_seed.values()) for label, of_seed in runs.items()}
    stop = {label: np.array([stop_of(run) for run in group]) for label, group in groups.items()}
    saturation = {
        label: np.array([saturation_of(run, best_layer(run)) for run in group]) for label, group in groups.items()
    }
    claims = []
    for label, group in groups.items():
        lag = saturation[label] - stop[label]
        bar = CLOSE_SHARE_OF_RUN * group[0].config.steps
        what = "steps between early stopping and saturation"
        claims += [
            claim(f"Early stopping lies near saturation: {label}", what, abs(lag), "bar", bar, "below", "3"),
            claim(
                f"Nearer than to the saturation of other seeds: {label}",
                what, abs(lag), "other seeds", mismatched(stop[label], saturation[label]), "below", "3",
            ),
            leader(label, lag),
        ]  # fmt: skip
    claims.append(
        claim(
            "Runs of one difficulty that stop later saturate later",
            "rank correlation of the two steps, ranked within each difficulty",
            [ranks_within(stop, saturation), ranks_within(saturation, stop)],
            "no order", 0.0, finding="3", statistic=rank_correlation,
        )
    )  # fmt: skip
    return claims, [
        Section(
            "Accuracy and clustering on one axis",
            f"Accuracy on unseen instructions and ARI of the layer that clusters most, default task. Controls are "
            f"those of the ARI. {CONTROL_TEXT}",
            learning_figure(groups[BASE_LABEL]),
        ),
        Section(
            "Early stopping against saturation",
            "One point for each run; on the line they are the same step. Grey: the control, early stopping of one seed "
            f"against the saturation of the others. Runs end at step {groups[HARD][0].config.steps}: one that is still "
            "learning there has both steps near its end, and close together, for that reason alone.",
            pair_figure(stop, saturation),
        ),
        Section(
            "Who leads, layer by layer",
            "Saturation of each layer minus the step of early stopping: above zero, accuracy led. Bars: interval over "
            "seeds. Grey line: the same step.",
            lag_figure(groups),
        ),
    ]


def learning_figure(runs: list[Run]) -> go.Figure:
    figure = go.Figure()
    add_controls(figure, runs, [0, runs[0].config.steps], "ari_task")
    for name, colour, read in (
        ("accuracy, unseen instructions", COLOURS[2], lambda run: run.column(f"validation/{HEADLINE_SPLIT}/accuracy")),
        ("ARI (task)", COLOURS[0], lambda run: task_curve(run, best_layer(run))),
    ):
        add_band(figure, *over_seeds(runs, read), name, colour)
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(range=[-0.05, 1.05])
    return layout(figure, 420)


def pair_figure(stop: dict[str, NDArray], saturation: dict[str, NDArray]) -> go.Figure:
    figure = go.Figure()
    for i, (label, x) in enumerate(stop.items()):
        y = saturation[label]
        others = ~np.eye(len(x), dtype=bool)
        pairs = np.stack(np.broadcast_arrays(x[:, None], y[None]))[:, others]
        figure.add_scatter(
            x=pairs[0], y=pairs[1], mode="markers", name="other seeds (control)", legendgroup="control",
            showlegend=i == 0, marker={"size": 4, "color": GREY, "opacity": 0.4},
        )  # fmt: skip
        figure.add_scatter(x=x, y=y, mode="markers", name=label, marker={"size": 9, "color": COLOURS[i]})
    every = np.concatenate([*stop.values(), *saturation.values()])
    end = float(np.nanmax(every)) if np.isfinite(every).any() else 1.0
    figure.add_scatter(x=[0, end], y=[0, end], mode="lines", name="same step", line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title_text="step of early stopping")
    figure.update_yaxes(title_text="step of saturation")
    return layout(figure, 460)


def lag_figure(groups: dict[str, list[Run]]) -> go.Figure:
    figure = go.Figure()
    for (label, group), colour in zip(groups.items(), COLOURS, strict=False):
        names = [layer_name(layer) for layer in group[0].layers]
        lags = [[saturation_of(run, layer) - stop_of(run) for run in group] for layer in group[0].layers]
        add_intervals(figure, names, lags, label, colour)
    figure.add_hline(0, line={"color": GREY})
    figure.update_yaxes(title_text="saturation - early stopping, steps")
    return layout(figure, 420)


STUDY = Study("Does early stopping pick the step at which clustering saturates?", 10, 2, configs, analyse)
