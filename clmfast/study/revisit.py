"""Models of a finished run as they were at a checkpoint, for what only the model can answer."""

from __future__ import annotations

import torch

from clmfast.config import RunConfig
from clmfast.data.tasks import TaskSet, make_tasks
from clmfast.files import DamagedCheckpoint, checkpoints, read_checkpoint
from clmfast.model import Transformer
from clmfast.record import Run
from clmfast.study.base import StudyError
from clmfast.untrusted import TENSOR_HEADER_BYTES


def tasks_of(config: RunConfig) -> TaskSet:
    """The task set that a run of this configuration was trained on."""
    return make_tasks(config.task, config.seed)


def checkpoint_steps(run: Run) -> list[int]:
    """Steps whose weights are there, ascending; StudyError if there are none."""
    steps = [int(path.name) for path in checkpoints(run.path / "checkpoints")]
    if not steps:
        raise StudyError(f"run {run.path.name} must have its directory with checkpoints, it has none")
    return steps


def model_at(run: Run, tasks: TaskSet, step: int) -> Transformer:
    """The model after `step` updates; StudyError where its checkpoint is missing or damaged."""
    path = run.path / "checkpoints" / f"{step:08d}"
    model = Transformer(run.config.model, len(tasks.vocabulary), tasks.max_length, run.config.seed)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        tensors, _ = read_checkpoint(path, n_bytes + TENSOR_HEADER_BYTES)
    except DamagedCheckpoint as error:
        raise StudyError(f"run {run.path.name} must hold the weights of step {step}: {error}") from None
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if run.config.model.tie_head and "token_embedding.weight" in weights:
        weights["head.weight"] = weights["token_embedding.weight"]
    have = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    if have != {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}:
        raise StudyError(f"run {run.path.name} must hold the weights of its model at step {step}, they are another's")
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def is_right(model: Transformer, tasks: TaskSet, examples: torch.Tensor) -> torch.Tensor:
    """Does the model give the output of each example [N]? [N] bool."""
    found = []
    for part in examples.split(256):
        batch = tasks.pack(part.numpy())
        states = model.states(
            torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), position=torch.from_numpy(batch.position)
        )
        logits = model.logits(states[torch.from_numpy(batch.prompt_end)])
        found.append(logits.argmax(-1) == torch.from_numpy(batch.target))
    return torch.cat(found)
