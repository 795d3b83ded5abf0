"""Do states still cluster by task where strings hardly tell the tasks apart: more than surface similarity, in numbers?

A ladder of perturbations; every rung but the first changes the grammars of the unperturbed run of the same seed:

    base              nothing is perturbed
    noise 0.1, 0.3    each letter is, with that probability, any letter of the alphabet; languages may then overlap
    distractors       before and after every instruction a word that says nothing, from two lists that all tasks share
    twins             tasks come in pairs: grammar by grammar one has the pieces of the other, but for a single one
    one letter        all tasks share the same few grammars, in each of which one letter says the task
    indistinguishable tasks come in pairs with the very same grammars: nothing tells them apart (the negative control)

Effects are those of the last probe, end of the instruction, best layer: ARI of the training states, all else of unseen
instructions. The surface control is, seed by seed, the strongest of: letter counts in place of states, letters in their
places (one-hot, from the start and from the end), and chance. For the accuracy it is the accuracy of who takes the task
that those letters vote for.
Barring the query's own grammar leaves that of its twin, so letters may do worse than chance at cross-grammar kNN.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from clmfast.config import RunConfig, TaskConfig
from clmfast.data.grammar import Grammar, common_string
from clmfast.data.tasks import Ids, TaskSet, make_tasks, random_piece
from clmfast.findings import HEADLINE_READOUT, HEADLINE_SPLIT, best_layer, final_by_layer, task_curve
from clmfast.measure.probe import columns_of, make_probe_sets, probe_measures
from clmfast.plot import layout
from clmfast.record import Run
from clmfast.study.base import BASE_LABEL, Runs, Section, Study, StudyError, changed
from clmfast.study.claims import Claim, claim
from clmfast.study.figures import (
    COLOURS,
    CONTROL_TEXT,
    GREY,
    UNTRAINED,
    add_band,
    add_controls,
    add_intervals,
    control_of,
    over_seeds,
)
from clmfast.study.revisit import tasks_of
from clmfast.study.unseen import CROSS, KNN, last_accuracy

Rows = tuple[tuple[str, ...], ...]  # regular expressions: a row for each task

ARI, ACCURACY = "ari_task", "accuracy"
MEASURES = {  # name -> (split in the records, title)
    ARI: ("", "ARI (task)"),
    KNN: (HEADLINE_SPLIT, "kNN accuracy"),
    CROSS: (HEADLINE_SPLIT, "cross-grammar kNN accuracy"),
    ACCURACY: (HEADLINE_SPLIT, "accuracy of the outputs"),
}
INDISTINGUISHABLE = "indistinguishable"
N_WORDS, WORD_LETTERS = 12, 4  # of a list of distractors
NOISE_STEPS = 10  # noise comes in tenths
N_INIT_OF_PLACES = 10  # k-means restarts on one-hot letters
MAX_TRIES = 2000  # of one piece: some grammars have twins in one try of fifty
HALF = 0.6  # bar of the negative control: a coin toss between two tasks is right in half of all cases
PIECE = re.compile(r"\[[^]]*\](?:\{\d+,\d+\})?|\([^)]*\)\??|[^[(]+")  # of a pattern that tasks.py made
ATOM = re.compile(r"\[[^]]*\]|[^][(){}|?,\d]")  # a letter, or a class of letters, of such a pattern


def noisy(pattern: str, tenths: int, alphabet: str) -> str:
    """The pattern with each letter replaced by any, in so many of ten draws: draw its strings by `branch`."""

    def instead(atom: re.Match[str]) -> str:
        return f"({'|'.join([atom[0]] * (NOISE_STEPS - tenths) + [f'[{alphabet}]'] * tenths)})"

    return ATOM.sub(instead, pattern)


def add_noise(rows: Rows, task: TaskConfig, rng: np.random.Generator, tenths: int) -> Rows:
    return tuple(tuple(noisy(pattern, tenths, task.alphabet) for pattern in row) for row in rows)


def add_distractors(rows: Rows, task: TaskConfig, rng: np.random.Generator) -> Rows:
    """All words have the same length, so languages that were disjoint still are."""

    def words() -> str:
        found = dict[str, None]()
        while len(found) < min(N_WORDS, len(task.alphabet) ** WORD_LETTERS):
            found["".join(rng.choice(list(task.alphabet), WORD_LETTERS))] = None
        return f"({'|'.join(found)})"

    before, after = words(), words()
    return tuple(tuple(f"{before}({pattern}){after}" for pattern in row) for row in rows)


def with_twins(rows: Rows, task: TaskConfig, rng: np.random.Generator) -> Rows:
    """Task 2i + 1 gets the grammars of task 2i, each with one piece that is another. No two languages overlap."""
    found = [list(row) for row in rows]
    taken = [Grammar(pattern, task.max_instruction_length) for row in rows[::2] for pattern in row]
    least = 2 * (task.n_instructions + task.n_unseen_instructions)
    for i in range(1, len(rows), 2):
        for j, pattern in enumerate(rows[i - 1]):
            pieces = PIECE.findall(pattern)
            for _ in range(MAX_TRIES):
                other = list(pieces)
                other[rng.integers(len(pieces))] = random_piece(task.alphabet, rng)[0]
                twin = Grammar("".join(other), task.max_instruction_length)
                if twin.size >= least and all(common_string(twin, one) is None for one in taken):
                    break
            else:
                raise StudyError(f"no twin of the grammar {pattern!r} was found: allow longer instructions")
            taken.append(twin)
            found[i][j] = twin.pattern
    return tuple(map(tuple, found))


def one_letter(rows: Rows, task: TaskConfig, rng: np.random.Generator) -> Rows:
    """All tasks share grammars taken from different tasks; in each, at one place, the letter is another for each task.

    What comes before that place has one length, so that tasks share no string; the grammars share none with any letter.
    """
    assert len(rows) <= len(task.alphabet), "each task needs a letter of its own"
    shapes: list[tuple[str, str]] = []
    languages: list[Grammar] = []
    for pattern in (row[j] for j in range(len(rows[0])) for row in rows):
        pieces = PIECE.findall(pattern)
        n_fixed = next((n for n, piece in enumerate(pieces) if not _has_one_length(piece, task)), len(pieces))
        place = int(rng.integers(min(1, n_fixed), n_fixed + 1))
        before, after = "".join(pieces[:place]), "".join(pieces[place:])
        language = Grammar(f"{before}[{task.alphabet}]{after}", task.max_instruction_length + 1)
        if all(common_string(language, one) is None for one in languages):
            shapes.append((before, after))
            languages.append(language)
        if len(shapes) == len(rows[0]):
            break
    letters = [rng.permutation(list(task.alphabet)) for _ in shapes]
    return tuple(
        tuple(f"{before}{letter[i]}{after}" for (before, after), letter in zip(shapes, letters, strict=True))
        for i in range(len(rows))
    )


def _has_one_length(piece: str, task: TaskConfig) -> bool:
    return len({len(text) for text in Grammar(piece, task.max_instruction_length).strings()}) == 1


def indistinguishable(rows: Rows, task: TaskConfig, rng: np.random.Generator) -> Rows:
    return tuple(rows[i - i % 2] for i in range(len(rows)))


@dataclasses.dataclass(frozen=True)
class Rung:
    """`perturb(grammars by task, task config, rng)` gives the grammars of this rung, up to `n_more` letters longer."""

    text: str
    perturb: Callable[[Rows, TaskConfig, np.random.Generator], Rows]
    n_more: int = 0
    changes: dict[str, object] = dataclasses.field(default_factory=dict)


NOISY: dict[str, object] = {"allow_overlap": True, "sampling": "branch"}
RUNGS = {
    "noise 0.1": Rung("one letter in ten is any letter", functools.partial(add_noise, tenths=1), changes=NOISY),
    "noise 0.3": Rung("three letters in ten are any letters", functools.partial(add_noise, tenths=3), changes=NOISY),
    "distractors": Rung("words that all tasks share, before and after", add_distractors, 2 * WORD_LETTERS),
    "twins": Rung("pairs of tasks whose grammars differ in one piece", with_twins),
    "one letter": Rung("grammars that all tasks share, one letter says the task", one_letter, 1),
    INDISTINGUISHABLE: Rung(
        "pairs of tasks with the same grammars", indistinguishable, changes={"allow_overlap": True}
    ),
}
TEXTS = {BASE_LABEL: "nothing is perturbed", **{name: rung.text for name, rung in RUNGS.items()}}


@functools.lru_cache(maxsize=64)
def unperturbed(task: TaskConfig, seed: int) -> Rows:
    """The grammars of the run of the seed, without its unseen ones."""
    patterns = make_tasks(task, seed).patterns
    per_task = task.n_grammars + task.n_unseen_grammars
    return tuple(patterns[i : i + task.n_grammars] for i in range(0, len(patterns), per_task))


@functools.lru_cache(maxsize=256)
def grammars_of(name: str, task: TaskConfig, seed: int) -> Rows:
    """The grammars of a rung."""
    rng = np.random.default_rng([seed, list(RUNGS).index(name)])
    return RUNGS[name].perturb(unperturbed(task, seed), task, rng)


def configs(base: RunConfig) -> dict[str, RunConfig]:
    found = {BASE_LABEL: base}
    for name, rung in RUNGS.items():
        config = changed(
            base, "task", grammars=grammars_of(name, base.task, base.seed), n_unseen_grammars=0,
            max_instruction_length=base.task.max_instruction_length + rung.n_more, **rung.changes,
        )  # fmt: skip
        found[name] = changed(config, "measure", probe_splits=(HEADLINE_SPLIT,))
    return found


def letters_in_place(tasks: TaskSet, examples: Ids) -> Tensor:
    """[1, N, places x letters] float32: one-hot letters of the instructions, placed from the start and from the end."""
    instruction = examples // tasks.n_inputs
    n_letters, n_places = tasks.first_output, int(np.diff(tasks.offset).max())
    found = torch.zeros(len(examples), 2, n_places, n_letters)
    for i, (start, stop) in enumerate(zip(tasks.offset[instruction], tasks.offset[instruction + 1], strict=True)):
        letters, place = torch.from_numpy(tasks.letters[start:stop]), torch.arange(stop - start)
        found[i, 0, place, letters] = 1
        found[i, 1, place.flip(0), letters] = 1
    return found.flatten(1)[None]


def measures_in_place(run: Run) -> dict[str, float]:
    """The measures of the last probe on letters in their places, by name."""
    tasks = tasks_of(run.config)
    measure = dataclasses.replace(
        run.config.measure, readouts=(HEADLINE_READOUT,), probe_splits=(HEADLINE_SPLIT,), n_init=N_INIT_OF_PLACES
    )
    (probe_set,) = make_probe_sets(tasks, measure, run.config.seed)
    queries = {split: letters_in_place(tasks, ids) for split, ids in probe_set.unseen.items()}
    values = probe_measures(
        probe_set, letters_in_place(tasks, probe_set.train), queries, tasks.label_counts(), measure, run.config.seed
    )
    return {c.measure: float(v) for c, v in zip(columns_of([probe_set], 1), values, strict=True)}


def through_the_task(knn: float, run: Run) -> float:
    """Accuracy of the output of who knows the task of that share of prompts, and is lucky with the others."""
    return knn + (1 - knn) / run.config.task.n_outputs


def chance(run: Run, measure: str) -> float:
    n, m = run.config.task.n_tasks, run.config.task.n_grammars
    return {ARI: 0.0, KNN: 1 / n, CROSS: (m - 1) / (n * m - 1), ACCURACY: through_the_task(1 / n, run)}[measure]


def effect_of(run: Run, measure: str) -> float:
    if measure == ACCURACY:
        return last_accuracy(run)
    return float(np.nanmax(final_by_layer(run, measure, MEASURES[measure][0])))


def controls_of(run: Run, places: dict[str, float], measure: str) -> dict[str, float]:
    """Every control of a measure by name; the surface controls are the first three."""
    known = KNN if measure == ACCURACY else measure
    split = MEASURES[known][0]
    found = {
        "letter counts": control_of(run, "letters alone", known, split),
        "letters in their places": places[known],
        "chance": chance(run, known),
        "untrained model": control_of(run, "untrained model", known, split),
        "shuffled labels": control_of(run, "shuffled labels", known, split),
    }
    return {n: through_the_task(v, run) for n, v in found.items()} if measure == ACCURACY else found


N_SURFACE = 3
CONTROL_STYLE = {
    "letter counts": (GREY, "dash"),
    "letters in their places": ("#111111", "dash"),
    "chance": (GREY, "dot"),
    "untrained model": (UNTRAINED, "dash"),
    "shuffled labels": ("#aaaaaa", "dashdot"),
}
Ladder = dict[str, dict[str, np.ndarray]]  # rung -> effect, surface and every control, of one measure [seeds]


def ladder_of(groups: dict[str, list[Run]]) -> dict[str, Ladder]:
    """The numbers of every measure: measure -> rung -> name -> one value for each seed."""
    places = {label: [measures_in_place(run) for run in group] for label, group in groups.items()}
    found: dict[str, Ladder] = {}
    for measure in MEASURES:
        for label, group in groups.items():
            beside = [controls_of(run, at, measure) for run, at in zip(group, places[label], strict=True)]
            found.setdefault(measure, {})[label] = {
                "effect": np.array([effect_of(run, measure) for run in group]),
                "surface": np.array([np.nanmax(list(one.values())[:N_SURFACE]) for one in beside]),
                **{name: np.array([one[name] for one in beside]) for name in CONTROL_STYLE},
            }
    return found


def analyse(runs: Runs) -> tuple[list[Claim], list[Section]]:
    groups = {label: list(of_seed.values()) for label, of_seed in runs.items()}
    ladder = ladder_of(groups)
    where = "best layer, last probe"
    claims = [
        claim(
            f"More than surface similarity: {label} ({TEXTS[label]})",
            title if measure == ACCURACY else f"{title}, {where}" + (", unseen instructions" if split else ""),
            ladder[measure][label]["effect"], "strongest surface control", ladder[measure][label]["surface"],
            finding="5",
        )
        for label in groups
        if label != INDISTINGUISHABLE
        for measure, (split, title) in MEASURES.items()
    ]  # fmt: skip
    claims += [
        claim(
            f"Where nothing tells two tasks apart, nothing is found ({INDISTINGUISHABLE})",
            MEASURES[measure][1], ladder[measure][INDISTINGUISHABLE]["effect"], "bar", HALF, "below",
        )
        for measure in (KNN, ACCURACY)
    ]  # fmt: skip
    return claims, [
        Section(
            "What the strings look like",
            "From the first rung, where nothing is perturbed, to the last, where nothing tells tasks apart: "
            "instructions of the first two tasks, one seed.",
            example_figure({label: group[0] for label, group in groups.items()}),
        ),
        Section(
            "The ladder",
            "Red: the trained model, best layer of the last probe, mean and interval over seeds: ARI of the training "
            "states, all else of unseen instructions. The other lines are the controls, at their strongest. Rungs from "
            "left to right: "
            + "; ".join(f"{label}: {TEXTS[label]}" for label in groups)
            + ". On the last rung no model can be right about more than half, but for luck.",
            ladder_figure(ladder),
        ),
        Section(
            "How much more than surface similarity",
            "Effect minus the strongest of letter counts, letters in their places and chance, seed by seed, with its "
            "interval over seeds: zero is what the strings give away without any model.",
            margin_figure(ladder),
        ),
        Section(
            "While it trains",
            "ARI with the task in the layer that clusters most at the end, at every step; what still rises at the last "
            f"step has not been learnt to the end. Controls are those of the unperturbed run. {CONTROL_TEXT}",
            training_figure(groups),
        ),
    ]


def ladder_figure(ladder: dict[str, Ladder]) -> go.Figure:
    figure = make_subplots(
        2, 2, shared_xaxes=True, vertical_spacing=0.08, horizontal_spacing=0.06,
        subplot_titles=[title for _, title in MEASURES.values()],
    )  # fmt: skip
    for i, rungs in enumerate(ladder.values()):
        at: dict[str, Any] = {"row": 1 + i // 2, "col": 1 + i % 2}
        for name, (colour, dash) in CONTROL_STYLE.items():
            figure.add_scatter(
                x=list(rungs), y=[float(np.nanmean(one[name])) for one in rungs.values()], mode="lines+markers",
                name=name, legendgroup=name, showlegend=i == 0, marker={"size": 4},
                line={"color": colour, "dash": dash, "width": 1.5}, **at,
            )  # fmt: skip
        samples = [one["effect"] for one in rungs.values()]
        add_intervals(
            figure, list(rungs), samples, "trained model", COLOURS[0], legendgroup="trained", showlegend=i == 0, **at
        )
    figure.update_yaxes(range=[-0.05, 1.05])
    return layout(figure, 720)


def margin_figure(ladder: dict[str, Ladder]) -> go.Figure:
    figure = go.Figure()
    for (measure, rungs), colour in zip(ladder.items(), COLOURS, strict=False):
        samples = [one["effect"] - one["surface"] for one in rungs.values()]
        add_intervals(figure, list(rungs), samples, MEASURES[measure][1], colour)
    figure.add_hline(0, line={"color": GREY})
    figure.update_yaxes(title_text="effect - surface control")
    return layout(figure, 440)


def training_figure(groups: dict[str, list[Run]]) -> go.Figure:
    figure = go.Figure()
    first = next(iter(groups.values()))
    add_controls(figure, first, [0, first[0].config.steps], ARI)
    for (label, group), colour in zip(groups.items(), COLOURS, strict=False):
        add_band(figure, *over_seeds(group, lambda run: task_curve(run, best_layer(run))), label, colour)
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="ARI (task)", range=[-0.05, 1.05])
    return layout(figure, 440)


def example_figure(runs: dict[str, Run]) -> go.Figure:
    """A table of instructions: a row for each rung, a column for two grammars of each of two tasks."""
    columns: list[list[str]] = [[], [], []]
    for label, run in runs.items():
        tasks = tasks_of(run.config)
        known = tasks.instructions("train")
        task = tasks.grammar_task[tasks.instruction_grammar[known]]
        columns[0].append(f"{label}: {TEXTS[label]}")
        for i in (0, 1):
            own = known[task == i]
            chosen = own[[0, 1, 2, run.config.task.n_instructions, run.config.task.n_instructions + 1]]
            columns[1 + i].append(", ".join(tasks.instruction_text(int(one)) for one in chosen))
    figure = go.Figure(
        go.Table(
            columnwidth=[3, 4, 4],
            header={"values": ["rung", "a task", "the next task"], "align": "left"},
            cells={"values": columns, "align": "left", "height": 26},
        )
    )
    return layout(figure, 140 + 48 * len(runs))


STUDY = Study("Do clusters by task survive where strings hardly tell the tasks apart?", 5, 1, configs, analyse)
