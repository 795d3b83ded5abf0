"""Small configs that every test can share: a run of seconds with everything on."""

from __future__ import annotations

import dataclasses
import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in a run: before torch is imported
import torch

from clmfast.config import MeasureConfig, ModelConfig, RunConfig, TaskConfig, TrainConfig
from clmfast.data.tasks import TaskSet, make_tasks

SMALL = RunConfig(
    steps=12,
    resume_every=5,
    task=TaskConfig(
        n_tasks=4, n_grammars=2, n_instructions=6, n_unseen_instructions=4, n_inputs=3, n_outputs=8, alphabet="abcdefgh"
    ),
    model=ModelConfig(n_layers=2, width=16, n_heads=2, embedding_std=0.7),
    train=TrainConfig(batch=8, warmup_steps=2, validate_every=4, n_validation=32, patience=2),
    measure=MeasureConfig(
        window=32, unseen_per_step=2, unseen_window=8, probe_every=5, probe_train=48, probe_unseen=24,
        probe_splits=("unseen_pair", "unseen_instruction", "unseen_grammar"), k=3, n_init=2, cold_every=4, n_shuffles=3,
        n_snapshots=3,
    ),
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def small() -> RunConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_tasks() -> TaskSet:
    return make_tasks(SMALL.task, 0)


@pytest.fixture
def two_threads():
    """Some tests change the number of threads; the next test finds it as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    """The config with some values of one section replaced."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
