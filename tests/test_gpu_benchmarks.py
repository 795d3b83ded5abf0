"""benchmarks/gpu_attention.py and gpu_step.py without a GPU: gates let pass who is right, rivals do the same work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import gpu_attention, gpu_step
from benchmarks.gpu_attention import Gate, Shape
from benchmarks.training import PlainTraining
from clmfast import ops
from clmfast.train import Training


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_attention(is_ragged, dtype):
    shape = Shape(5, 9, 2, 16, is_ragged, None, None, dtype)
    gate = Gate(shape, "cpu")
    gate.check("clmfast", ops.attention)
    gate.check("SDPA math", gpu_attention.rivals(shape, "cpu")["SDPA math"])
    with pytest.raises(ValueError, match="halved is wrong"):
        gate.check("halved", lambda qkv, lengths: ops.attention(qkv, lengths) / 2)
    with pytest.raises(ValueError, match="not causal is wrong"):
        gate.check("not causal", lambda qkv, lengths: ops.attention(qkv.flip(1), lengths).flip(1))


def test_backends_that_are_not_there_raise():
    shape = Shape(2, 4, 1, 8, False, None, None, torch.float32)
    with pytest.raises(RuntimeError):
        Gate(shape, "cpu").check("cuDNN", gpu_attention.rivals(shape, "cpu")["SDPA cuDNN"])


def test_shapes_cover_what_is_claimed():
    named = {str(shape) for shape in gpu_attention.SHAPES}
    assert len(named) == len(gpu_attention.SHAPES)
    assert {16, 64, 128, 512, 2048} <= {shape.T for shape in gpu_attention.SHAPES}
    assert any(shape.n_bytes >= gpu_attention.COPY_FROM_BYTES for shape in gpu_attention.SHAPES)


def test_the_rival_of_the_step_computes_the_same(small, small_tasks):
    config = dataclasses.replace(small, steps=10, measure_every=0)
    ours, rival = Training(config, small_tasks), PlainTraining(Training(config, small_tasks))
    rival.n_longest = ours.model.max_length  # as for torch.compile(mode=...)
    assert sum(p.numel() for p in rival.model.parameters()) == ours.model.n_parameters
    gpu_step.gate(ours, rival)
    other = PlainTraining(Training(dataclasses.replace(config, seed=1), small_tasks))
    with pytest.raises(ValueError, match="losses of step 0 differ"):
        gpu_step.gate(Training(config, small_tasks), other)


def test_calls_take_turns():
    order = []
    found = gpu_step.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1, 2)
    assert order == ["a", "b"] * 3 and set(found) == {"a", "b"}


@pytest.mark.parametrize("preset", gpu_step.PRESET_NAMES)
def test_presets_run_on_a_gpu_as_a_graph(preset):
    from clmfast.config import check, replays_graph

    config = gpu_step.config_of(preset, "cuda", 1)
    check(config)
    assert replays_graph(config)[0]
