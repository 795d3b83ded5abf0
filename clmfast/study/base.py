"""What a study is: a question, the configurations it trains, and a function from their runs to claims and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from clmfast.config import UNSEEN_SPLITS, MeasureConfig, ModelConfig, RunConfig, TaskConfig, TrainConfig
from clmfast.measure.catalogue import MEASUREMENT_VERSION

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import NDArray

    from clmfast.record import Run
    from clmfast.study.claims import Claim

BASE_LABEL = "base"
VALIDATE_EVERY = 5  # steps: early stopping is compared with a curve that has a value at every step
Runs = Mapping[str, Mapping[int, "Run"]]  # label of a configuration -> seed -> run


class StudyError(ValueError):
    """What a caller can get wrong, or what lies in the way: one line."""


class Kept(NamedTuple):
    """An array that a file must hold; None in its shape: any size."""

    name: str
    dtype: type
    shape: tuple[int | None, ...]


class Revisit(NamedTuple):
    """What a study reads from a run's checkpoints. It is kept under its name, and so outlives them."""

    name: str
    read: Callable[[Run], Mapping[str, NDArray]]
    holds: tuple[Kept, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """A picture of a page."""

    title: str
    text: str
    figure: go.Figure


@dataclasses.dataclass(frozen=True)
class Study:
    """`configs` gets the base configuration with its seed and returns a configuration for each label; several studies
    may ask for the same one, which is then trained once."""

    question: str
    n_seeds: int  # seeds 0 to n_seeds - 1, unless asked otherwise
    n_quick_seeds: int  # the same for --quick
    configs: Callable[[RunConfig], dict[str, RunConfig]]
    analyse: Callable[[Runs], tuple[list[Claim], list[Section]]]
    revisits: tuple[Revisit, ...] = ()


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    """The config with some values of one section replaced."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


# Defaults of the measures of version 1, for who draws what was measured with them.
MEASURE_1 = {"window": 2048, "unseen_per_step": 8, "unseen_window": 128, "n_init": 40, "cold_every": 16}


def base_config(version: int = MEASUREMENT_VERSION) -> RunConfig:
    """The default run, validated more often (with the patience of as many steps), with every unseen split probed, half
    as often: curves come from the window."""
    config = RunConfig()
    if version == 1:
        config = changed(config, "measure", **MEASURE_1)
    patience = max(1, config.train.patience * config.train.validate_every // VALIDATE_EVERY)
    config = changed(config, "train", validate_every=VALIDATE_EVERY, patience=patience)
    return changed(config, "measure", probe_splits=UNSEEN_SPLITS, probe_every=2 * config.measure.probe_every)


def quick_config() -> RunConfig:
    """A base so small that all studies take minutes: it tries the machinery, its verdicts say little."""
    return RunConfig(
        steps=60,
        resume_every=20,
        task=TaskConfig(
            n_tasks=4, n_grammars=2, n_instructions=12, n_unseen_instructions=6, n_inputs=4, n_outputs=8,
        ),
        model=ModelConfig(n_layers=2, width=32, n_heads=2),
        train=TrainConfig(batch=32, warmup_steps=5, validate_every=VALIDATE_EVERY, n_validation=64, patience=4),
        measure=MeasureConfig(
            window=128, unseen_per_step=4, unseen_window=32, probe_every=20, probe_train=96, probe_unseen=48,
            probe_splits=UNSEEN_SPLITS, k=5, n_init=4, n_snapshots=1, n_shuffles=5,
        ),
    )  # fmt: skip
