"""Do states of unseen examples fall among training states of their task, and is it more than similar letters?

kNN accuracy: the nearest training states vote, those of the query's own instruction barred. Cross-grammar kNN: those of
its own grammar barred too, so that letters cannot help. Effects are the best layer of the last probe, and so are the
controls. An unseen grammar has no training states of its own: for it the two numbers are the same.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import plotly.graph_objects as go
import torch

from clmfast import ops
from clmfast.config import UNSEEN_SPLITS
from clmfast.findings import HEADLINE_READOUT, HEADLINE_SPLIT, best_layer, final_by_layer
from clmfast.measure.neighbours import majority_vote
from clmfast.measure.probe import Probe
from clmfast.plot import layout
from clmfast.record import Run
from clmfast.study.base import BASE_LABEL, Kept, Revisit, Runs, Section, Study
from clmfast.study.claims import Claim, claim
from clmfast.study.emergence import configs, rank_correlation
from clmfast.study.figures import COLOURS, CONTROL_TEXT, CONTROLS, GREY, control_of, curves, final_layers
from clmfast.study.revisit import checkpoint_steps, is_right, model_at, tasks_of
from clmfast.study.summary import revisited

KNN, CROSS = "knn_accuracy", "cross_grammar_knn_accuracy"
SPLIT_TEXT = dict(zip(UNSEEN_SPLITS, ("unseen pairs", "unseen instructions", "unseen grammars"), strict=True))
OWN_BARRED = {KNN: "", CROSS: ", own grammar barred"}
EARLY_SHARE = 0.25  # of the run, for "early kNN"


def last_accuracy(run: Run, split: str = HEADLINE_SPLIT) -> float:
    accuracy = run.column(f"validation/{split}/accuracy")
    return float(accuracy[np.isfinite(accuracy)][-1])


def foretold(runs: list[Run], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values [seeds, steps]) of the probes: the best layer's."""
    values = np.stack([run.by_layer("probe", run.readouts[0], measure, HEADLINE_SPLIT).max(1) for run in runs])
    probed = np.isfinite(values).all(0)
    return runs[0].step[probed], values[:, probed]


def mistakes_and_votes(run: Run) -> dict[str, np.ndarray]:
    """counts [2, 2]: examples of unseen instructions, counted by (vote right or wrong, output right or wrong).

    The finished model; every input of the probe's unseen instructions. The neighbours of an instruction's state in the
    layer that clusters most vote for its task, those of its own grammar barred, so that the vote is no reading of
    letters.
    """
    tasks = tasks_of(run.config)
    model = model_at(run, tasks, checkpoint_steps(run)[-1])
    measure = dataclasses.replace(run.config.measure, probe_splits=(HEADLINE_SPLIT,), readouts=(HEADLINE_READOUT,))
    probe = Probe(tasks, measure, model.n_taps, run.config.model.width, run.config.seed)
    (probe_set,) = probe.sets
    ((points, queries),) = probe.states(model)
    layer = best_layer(run)
    of_query, truth = probe_set.unseen_labels[HEADLINE_SPLIT], probe_set.train_labels
    near = ops.knn(
        points[layer : layer + 1], measure.k, queries[HEADLINE_SPLIT][layer : layer + 1],
        (of_query["grammar"], truth["grammar"]),
    )  # fmt: skip
    vote_is_right = majority_vote(near.index, truth["task"])[0] == of_query["task"]
    inputs = torch.arange(tasks.n_inputs)
    examples = (of_query["instruction"][:, None] * tasks.n_inputs + inputs).reshape(-1)
    right = is_right(model, tasks, examples).view(-1, tasks.n_inputs).sum(1)
    counts = [[int(right[v].sum()), int((tasks.n_inputs - right[v]).sum())] for v in (vote_is_right, ~vote_is_right)]
    return {"counts": np.array(counts)}


MISTAKES = Revisit("mistakes", mistakes_and_votes, (Kept("counts", np.int64, (2, 2)),))


def log_odds_ratio(table: np.ndarray) -> float:
    """ln of the odds of a wrong output after a wrong vote over those after a right one; half a count is added to every
    cell (Haldane 1956, Anscombe 1956), so that an empty one gives a number."""
    (right_right, right_wrong), (wrong_right, wrong_wrong) = table + 0.5
    return float(np.log((wrong_wrong / wrong_right) / (right_wrong / right_right)))


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    base = list(runs[BASE_LABEL].values())
    claims = [
        claim(
            f"{text[0].upper()}{text[1:]} fall among their task{OWN_BARRED[measure]}: more than {name}",
            f"{'cross-grammar ' if measure == CROSS else ''}kNN accuracy, {text}, best layer, last probe",
            [np.nanmax(final_by_layer(run, measure, split)) for run in base],
            name, [control_of(run, name, measure, split) for run in base], finding="4",
        )
        for split, text in SPLIT_TEXT.items()
        for measure in ((KNN,) if split == "unseen_grammar" else (KNN, CROSS))
        for name in CONTROLS
    ]  # fmt: skip
    final = np.array([last_accuracy(run) for run in base])
    step, early = foretold(base, CROSS)
    at = int(np.abs(step - EARLY_SHARE * base[0].config.steps).argmin())
    claims.append(
        claim(
            f"Early cross-grammar kNN (step {step[at]}) foretells the final accuracy of a run",
            "rank correlation over seeds", [early[:, at], final], "no order", 0.0, statistic=rank_correlation,
        )
    )  # fmt: skip
    tables = np.stack([revisited(run, MISTAKES)["counts"] for run in base])
    claims.append(
        claim(
            "The model's mistakes are the examples whose neighbours have the wrong task",
            "ln odds ratio of a wrong output and a wrong vote, unseen instructions",
            [log_odds_ratio(table) for table in tables], "no relation", 0.0, finding="4",
        )
    )  # fmt: skip
    panels = [(m, s, f"{n}, {SPLIT_TEXT[s]}") for m, n in ((KNN, "kNN"), (CROSS, "cross-grammar")) for s in SPLIT_TEXT]
    return claims, [
        Section(
            "By layer, at the end of training: kNN accuracy",
            f"All training states but those of the query's own instruction may vote. {CONTROL_TEXT}",
            final_layers(base, panels[:3]),
        ),
        Section(
            "By layer, at the end of training: cross-grammar kNN accuracy",
            f"Training states of the query's own grammar are barred. {CONTROL_TEXT}",
            final_layers(base, panels[3:]),
        ),
        Section(
            "While it trains",
            f"Unseen instructions, at every step. {CONTROL_TEXT}",
            curves(base, [(KNN, HEADLINE_SPLIT, "kNN accuracy"), (CROSS, HEADLINE_SPLIT, "cross-grammar kNN")]),
        ),
        Section(
            "Are the mistakes where the neighbours are wrong?",
            "Share of wrong outputs of the finished model on unseen instructions, after a right and after a wrong vote "
            "of the neighbours in the layer that clusters most (own grammar barred); a line for each seed. Votes that "
            "are shuffled among the examples would give both the same: the dashed line.",
            mistake_figure(base, tables),
        ),
        Section(
            "How early is the final accuracy foretold?",
            "Rank correlation over seeds between a number at a step and the accuracy at the end. Grey: the rival, the "
            "accuracy at that step itself. Shuffled seeds give 0.",
            foretelling_figure(base, final),
        ),
    ]


def mistake_figure(runs: list[Run], tables: np.ndarray) -> go.Figure:
    figure = go.Figure()
    names = ["neighbours right", "neighbours wrong"]
    n = tables.sum(2)
    share = np.where(n > 0, tables[:, :, 1] / np.maximum(n, 1), np.nan)
    for i, (run, of_seed, counts) in enumerate(zip(runs, share, n, strict=True)):
        figure.add_scatter(
            x=names, y=of_seed, mode="lines+markers", name=f"seed {run.config.seed}",
            text=[f"{c} examples" for c in counts], line={"color": COLOURS[i % len(COLOURS)], "width": 1.2},
        )  # fmt: skip
    overall = tables[:, :, 1].sum() / max(1, tables.sum())
    figure.add_scatter(
        x=names, y=[overall] * 2, mode="lines", name="shuffled votes", line={"color": GREY, "dash": "dash"}
    )
    figure.update_yaxes(title_text="share of wrong outputs", rangemode="tozero")
    return layout(figure, 400)


def foretelling_figure(runs: list[Run], final: np.ndarray) -> go.Figure:
    figure = go.Figure()
    rivals = {name: foretold(runs, measure) for name, measure in (("kNN", KNN), ("cross-grammar kNN", CROSS))}
    accuracy = np.stack([run.column(f"validation/{HEADLINE_SPLIT}/accuracy") for run in runs])
    at = np.isin(runs[0].step, rivals["kNN"][0])
    rivals["accuracy so far"] = runs[0].step[at], accuracy[:, at]
    for (name, (step, values)), colour in zip(rivals.items(), (*COLOURS[:2], GREY), strict=True):
        correlation = [rank_correlation(one, final) for one in values.T]
        figure.add_scatter(x=step, y=correlation, mode="lines+markers", name=name, line={"color": colour})
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="rank correlation with the final accuracy", range=[-1.05, 1.05])
    return layout(figure, 400)


STUDY = Study("Do unseen examples fall among training examples of their task?", 10, 5, configs, analyse, (MISTAKES,))
