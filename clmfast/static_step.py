"""A training step of fixed shape: what it reads lies in the same memory at every step, and nothing in it waits for the
device. So it can be captured once as a CUDA graph and replayed.

Sequences are packed as everywhere; what is left of batch x longest sequence is filled with sequences of padding behind
the real ones, which nobody reads. Measuring needs nothing of the backward pass, so it runs on a stream beside it:

    forward -> backward -> clip -> [wait] -> optimizer
           \\-> ride-along --------^-> measures

The optimizer waits for the ride-along alone, which must see the weights that the batch saw. Without a GPU the same step
runs as it stands, one thing after the other; that is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clmfast.capture import Recorder, spans
from clmfast.config import varying_shape
from clmfast.data.tasks import Batch, draw

if TYPE_CHECKING:
    from clmfast.measure.window import Window
    from clmfast.train import Training

WARM_STEPS = 3  # of a kind, before it is captured: kernels are compiled, workspaces taken


class StaticBatch:
    """The tensors of a batch of B sequences in memory of their own, filled from the host without waiting."""

    def __init__(self, n_sequences: int, max_length: int, readouts: tuple[str, ...], device: torch.device) -> None:
        self.max_length, self.readouts = max_length, readouts
        n, R = n_sequences * max_length, len(readouts)
        sizes = {
            "tokens": (n,),
            "position": (n,),
            "offset": (2 * n_sequences + 1,),  # as many sequences of padding as real ones: more are never needed
            "ends": (2 * n_sequences,),
            "prompt_end": (n_sequences,),
            "target": (n_sequences,),
            "start": (R, n_sequences),
            "stop": (R, n_sequences),
        }
        is_gpu = device.type == "cuda"
        self.host = {name: torch.zeros(size, dtype=torch.int64, pin_memory=is_gpu) for name, size in sizes.items()}
        self.on_device = {name: tensor.to(device) if is_gpu else tensor for name, tensor in self.host.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.on_device[name]

    def fill(self, batch: Batch) -> None:
        """Take in a batch of prompts; what it does not fill becomes padding."""
        n, n_all = len(batch.tokens), len(self.host["tokens"])
        left, n_sequences = n_all - n, len(batch.target)
        ends = np.minimum(self.max_length * np.arange(1, n_sequences + 1), left)
        padded = {
            "tokens": np.concatenate([batch.tokens, np.zeros(left, np.int64)]),
            "position": np.concatenate([batch.position, np.arange(left) % self.max_length]),
            "offset": np.concatenate([batch.offset, n + ends]),
            "ends": batch.ends,
            "prompt_end": batch.prompt_end,
            "target": batch.target,
        }
        start, stop = spans(batch, self.readouts)
        for name, array in padded.items():
            self.host[name].copy_(torch.from_numpy(array))
        self.host["start"].copy_(start)
        self.host["stop"].copy_(stop)
        for name, tensor in self.on_device.items():
            if tensor is not self.host[name]:
                tensor.copy_(self.host[name], non_blocking=True)


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Work goes to this stream; None: to where it went before."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Fork and join of work on a second stream: `with beside(stream) as on_side: with on_side(): ...`.

    on_side() puts work on `stream` that begins when all that the current stream was given so far is done; at the end of
    the block the current stream waits for it. Where nothing was forked, nothing is joined: a graph that is captured may
    wait only for work that is a part of it. None: everything runs on the current stream, in order.
    """
    is_forked = False

    @contextmanager
    def on_side() -> Iterator[None]:
        nonlocal is_forked
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            is_forked = True
        with on_stream(stream):
            yield

    yield on_side
    if stream is not None and is_forked:
        torch.cuda.current_stream().wait_stream(stream)


class StaticStep:
    """The step of a Training. `update` trains one step; on a GPU it replays a graph as soon as both rings are full."""

    def __init__(self, training: Training) -> None:
        self.training = training
        config, device = training.config, training.device
        why_not = varying_shape(config)
        if why_not:
            raise ValueError(f"StaticStep needs a step of fixed shape, got {why_not}")
        measure, max_length = config.measure, training.model.max_length
        self.batch: StaticBatch = StaticBatch(config.train.batch, max_length, measure.readouts, device)
        self.lr: Tensor = torch.zeros((), device=device)
        for group in training.optimizer.param_groups:
            group["lr"] = self.lr
        self.window: Window | None = training.window
        self.unseen: StaticBatch | None = None
        self.labels: tuple[Tensor, Tensor] | None = None  # of the two rings
        if self.window is not None:
            self.unseen = StaticBatch(measure.unseen_per_step, max_length, measure.readouts, device)
            rings = self.window.train, self.window.unseen
            of_train, of_unseen = (torch.from_numpy(self.window.host_labels(ring)) for ring in rings)
            self.labels = of_train.to(device, copy=True), of_unseen.to(device, copy=True)
        self.is_gpu: bool = device.type == "cuda"
        self.stream: torch.cuda.Stream | None = torch.cuda.Stream(device) if self.is_gpu else None
        self.side: torch.cuda.Stream | None = torch.cuda.Stream(device) if self.is_gpu else None
        self._n_run: dict[tuple[bool, bool], int] = {}
        self._graphs: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def n_graphs(self) -> int:
        """Graphs that were captured: one for each kind of step (measured or not, with a cold start or not)."""
        return len(self._graphs)

    def update(self, step: int, values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64] | None]:
        """One training step; fills the training's and the window's `values`, returns (loss, per-task purity)."""
        training, window = self.training, self.window
        is_measured = window is not None and step % training.config.measure_every == 0
        kind = is_measured, is_measured and step % training.config.measure.cold_every == 0
        self._load(step)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with on_stream(self.stream):
            result = self._run(step, kind).cpu().numpy()  # one small copy, and the only wait
        loss, accuracy, grad_norm = result[:3].tolist()
        for measure, value in zip(
            ("loss", "accuracy", "lr", "grad_norm"), (loss, accuracy, training.lr(step), grad_norm), strict=True
        ):
            values[training.column_at(f"train/{measure}")] = value
        if window is None or not is_measured:
            return loss, None
        measured, per_task = np.split(result[3:], [len(window.columns)])
        values[training.window_at] = measured
        return loss, per_task.reshape(window.per_task_shape)

    def _load(self, step: int) -> None:
        """The host's part: batches, labels and learning rate into the memory that the device reads."""
        training, config, window = self.training, self.training.config, self.window
        examples = draw(training.tasks.splits["train"], config.train.batch, config.seed, step, "train")
        self.batch.fill(training.tasks.pack(examples))
        self.lr.fill_(training.lr(step))
        if window is None or self.unseen is None or self.labels is None:
            return
        unseen = training.draw_unseen(step)
        self.unseen.fill(training.tasks.pack(unseen))
        for ring, chosen, labels in zip((window.train, window.unseen), (examples, unseen), self.labels, strict=True):
            ring.note(torch.from_numpy(chosen))
            labels.copy_(torch.from_numpy(window.host_labels(ring)), non_blocking=True)

    def _run(self, step: int, kind: tuple[bool, bool]) -> Tensor:
        """The device's part, replayed where it can be."""
        if kind in self._graphs:
            graph, result = self._graphs[kind]
            graph.replay()
            return result
        if not self.is_gpu or not self._is_full():
            return self._compute(step, kind[0])
        n_run = self._n_run[kind] = self._n_run.get(kind, 0) + 1
        if n_run <= WARM_STEPS:
            return self._compute(step, kind[0])
        graph = torch.cuda.CUDAGraph()
        for p in self.training.parameters:
            p.grad = None
        with torch.cuda.graph(graph, stream=self.stream):
            result = self._compute(step, kind[0])
        self._graphs[kind] = graph, result
        graph.replay()
        return result

    def _is_full(self) -> bool:
        """Do the rings hold as many rows as they ever will?"""
        rings = () if self.window is None else (self.window.train, self.window.unseen)
        return all(ring.n_filled == ring.n_points for ring in rings)

    def _compute(self, step: int, is_measured: bool) -> Tensor:
        """[3 + columns + tasks] float64: loss, accuracy, gradient norm, what the window measured."""
        training, window, batch = self.training, self.window, self.batch
        states = self._states(batch, None if window is None else window.train)
        rows = torch.searchsorted(batch["ends"], batch["prompt_end"])
        logits = training.model.logits(states[rows])
        loss = F.cross_entropy(logits, batch["target"])
        accuracy = (logits.detach().argmax(-1) == batch["target"]).double().mean()
        measured: list[Tensor] = []
        ridden = None
        with beside(self.side) as on_side:
            if window is not None and self.unseen is not None:
                with on_side():
                    window.train.slot += len(batch["target"])
                    with torch.no_grad():
                        self._states(self.unseen, window.unseen)
                    window.unseen.slot += len(self.unseen["target"])
                    ridden = None if self.side is None else self.side.record_event()
                    if is_measured:
                        values, per_task = window.measure(step, self.labels)
                        measured = [values, per_task.flatten()]
            for p in training.parameters:
                p.grad = None
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(training.parameters, training.config.train.clip_norm)
            if ridden is not None:
                torch.cuda.current_stream().wait_event(ridden)
            training.optimizer.step()
        return torch.cat([torch.stack([loss.detach().double(), accuracy, grad_norm.double()]), *measured])

    def _states(self, batch: StaticBatch, ring: Recorder | None) -> Tensor:
        if ring is not None:
            ring.aim(batch["start"], batch["stop"], batch["ends"])
        return self.training.model.states(
            batch["tokens"], batch["offset"], position=batch["position"], kept=batch["ends"], tap=ring
        )
