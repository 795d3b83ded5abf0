"""A training step of fixed shape, captured once as a CUDA graph and replayed: what it reads lies in the same memory at
every step, and nothing in it waits for the device.

Sequences are packed as everywhere; what is left of batch x longest sequence is filled with sequences of padding behind
the real ones, which nobody reads. Measuring needs nothing of the backward pass, so it runs on a stream beside it:

    forward -> backward -> clip -> [wait] -> optimizer
           \\-> ride-along --------^-> measures

The optimizer waits for the ride-along alone, which must see the weights that the batch saw. All that a step needs from
the host lies in one piece of pinned memory and takes one copy; it is prepared while the device computes the previous
step. Without a GPU the same step runs as it stands, one thing after the other; that is how it is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clmfast.capture import Recorder, spans
from clmfast.config import LABEL_KINDS, varying_shape
from clmfast.data.tasks import Batch, Ids, draw

if TYPE_CHECKING:
    from clmfast.measure.window import Window
    from clmfast.train import Training

RINGS = "train", "unseen"  # of the window, and the batches that are written to them
WARM_STEPS = 3  # of a kind, before it is captured: kernels are compiled, workspaces taken


Shapes = dict[str, tuple[int, ...]]


class Inputs:
    """Named int64 tensors in one piece of memory on the host, and in one on the device: one copy brings them all there.

    Write to `host`, then `send`; before writing again, `wait_until_sent`. Without a GPU both are the same memory.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._of_host: Tensor = torch.zeros(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=is_gpu)
        self._of_device: Tensor = self._of_host.to(device) if is_gpu else self._of_host
        self.host, self.on_device = (
            {name: x.view(shapes[name]) for name, x in zip(shapes, whole.split(sizes), strict=True)}
            for whole in (self._of_host, self._of_device)
        )
        self._sent: torch.cuda.Event | None = torch.cuda.Event() if is_gpu else None

    def send(self) -> None:
        """Start the copy to the device, in the current stream."""
        if self._sent is not None:
            self._of_device.copy_(self._of_host, non_blocking=True)
            self._sent.record()

    def wait_until_sent(self) -> None:
        """Wait for the copy, not for what the device does afterwards."""
        if self._sent is not None:
            self._sent.synchronize()


class StaticBatch:
    """A batch of B sequences that always takes the same memory: what its prompts do not fill is padding."""

    def __init__(self, n_sequences: int, max_length: int, readouts: tuple[str, ...]) -> None:
        self.max_length, self.readouts = max_length, readouts
        n, R = n_sequences * max_length, len(readouts)
        self.shapes: Shapes = {
            "tokens": (n,),
            "position": (n,),
            "offset": (2 * n_sequences + 1,),  # as many sequences of padding as real ones: more are never needed
            "ends": (2 * n_sequences,),
            "prompt_end": (n_sequences,),
            "target": (n_sequences,),
            "start": (R, n_sequences),
            "stop": (R, n_sequences),
        }

    def fill(self, host: Mapping[str, Tensor], batch: Batch) -> None:
        """Write a batch of prompts, and the padding behind it, into the tensors of `shapes`."""
        n, n_all = len(batch.tokens), len(host["tokens"])
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
            host[name].copy_(torch.from_numpy(array))
        host["start"].copy_(start)
        host["stop"].copy_(stop)


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
        self.window: Window | None = training.window
        batches = {"train": StaticBatch(config.train.batch, max_length, measure.readouts)}
        shapes: Shapes = {"lr": (1,)}
        if self.window is not None:
            batches["unseen"] = StaticBatch(measure.unseen_per_step, max_length, measure.readouts)
            for ring in RINGS:
                shapes[f"labels/{ring}"] = (len(LABEL_KINDS), getattr(self.window, ring).n_points)
        self.batches: dict[str, StaticBatch] = batches
        for ring, batch in batches.items():
            shapes |= {f"{ring}/{name}": shape for name, shape in batch.shapes.items()}
        self.inputs: Inputs = Inputs(shapes, device)
        self.lr, self.host_lr = (x["lr"].view(torch.float32)[0] for x in (self.inputs.on_device, self.inputs.host))
        for group in training.optimizer.param_groups:
            group["lr"] = self.lr
        self._ready = -1  # the step that the host memory holds, and its examples
        self._examples: dict[str, Ids] = {}
        self._n_labelled = dict.fromkeys(RINGS, -1)  # rows ever written of each ring, when its labels were
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
        """One training step; fills the training's and the window's `values`, returns (loss, answers of
        neighbours)."""
        training, window = self.training, self.window
        is_measured = window is not None and step % training.config.measure_every == 0
        kind = is_measured, window is not None and is_measured and window.is_cold(step, 0)
        if self._ready != step:
            self.prepare(step)
        self.inputs.send()
        if window is not None:
            for ring, examples in self._examples.items():
                getattr(window, ring).note(torch.from_numpy(examples))
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with on_stream(self.stream):
            found = self._run(step, kind)
            if step + 1 < training.config.steps:
                self.inputs.wait_until_sent()
                self.prepare(step + 1)
            result = found.cpu().numpy()  # one small copy, and the only wait for what is computed
        loss, accuracy, grad_norm = result[:3].tolist()
        for measure, value in zip(
            ("loss", "accuracy", "lr", "grad_norm"), (loss, accuracy, training.lr(step), grad_norm), strict=True
        ):
            values[training.column_at(f"train/{measure}")] = value
        if window is None or not is_measured:
            return loss, None
        measured, answers = np.split(result[3:], [len(window.columns)])
        values[training.window_at] = measured
        return loss, answers.reshape(window.answers_shape)

    def prepare(self, step: int) -> None:
        """The host's part of a step: batches, labels and learning rate. It changes nothing that a saved state holds, so
        it may run ahead."""
        training, config, host = self.training, self.training.config, self.inputs.host
        self._examples = {"train": draw(training.tasks.splits["train"], config.train.batch, config.seed, step, "train")}
        if self.window is not None:
            self._examples["unseen"] = training.draw_unseen(step)
        for ring, examples in self._examples.items():
            of_batch = {name: host[f"{ring}/{name}"] for name in self.batches[ring].shapes}
            self.batches[ring].fill(of_batch, training.tasks.pack(examples))
            if self.window is not None:
                self._label(ring, getattr(self.window, ring), examples)
        self.host_lr.fill_(training.lr(step))
        self._ready = step

    def _label(self, ring: str, recorder: Recorder, examples: Ids) -> None:
        """Labels of the rows that a batch will be written to; of all rows where the ring was not labelled up to there,
        as after a resume."""
        assert self.window is not None
        labels, n_written = self.inputs.host[f"labels/{ring}"], recorder.n_written
        if self._n_labelled[ring] != n_written:
            labels.copy_(torch.from_numpy(self.window.labels_of(recorder.example.numpy())))
        labels[:, recorder.next_rows(len(examples))] = torch.from_numpy(self.window.labels_of(examples))
        self._n_labelled[ring] = n_written + len(examples)

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
        # The memory that cuBLAS works in belongs to whoever used it first, and torch.compile frees it when it captures
        # graphs of its own: a graph captured with it would then write to what is no longer ours. So the graph gets
        # memory of its own pool, and nobody else gets that.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, stream=self.stream):
            result = self._compute(step, kind[0])
        torch._C._cuda_clearCublasWorkspaces()
        self._graphs[kind] = graph, result
        graph.replay()
        return result

    def _is_full(self) -> bool:
        """Do the rings hold as many rows as they ever will?"""
        rings = () if self.window is None else (self.window.train, self.window.unseen)
        return all(ring.n_filled == ring.n_points for ring in rings)

    def _compute(self, step: int, is_measured: bool) -> Tensor:
        """[3 + columns + tasks] float64: loss, accuracy, gradient norm, what the window measured."""
        training, window, batch = self.training, self.window, self._on_device("train")
        states = self._states("train")
        rows = torch.searchsorted(batch["ends"], batch["prompt_end"])
        logits = training.model.logits(states[rows])
        loss = F.cross_entropy(logits, batch["target"])
        accuracy = (logits.detach().argmax(-1) == batch["target"]).double().mean()
        measured: list[Tensor] = []
        ridden = None
        with beside(self.side) as on_side:
            if window is not None:
                with on_side():
                    window.train.slot += len(batch["target"])
                    with torch.no_grad():
                        self._states("unseen")
                    window.unseen.slot += len(self._on_device("unseen")["target"])
                    ridden = None if self.side is None else self.side.record_event()
                    if is_measured:
                        train, unseen = (self.inputs.on_device[f"labels/{ring}"] for ring in RINGS)
                        values, answers = window.measure(step, (train, unseen))
                        measured = [values, answers.flatten()]
            for p in training.parameters:
                p.grad = None
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(training.parameters, training.config.train.clip_norm)
            if ridden is not None:
                torch.cuda.current_stream().wait_event(ridden)
            training.optimizer.step()
        return torch.cat([torch.stack([loss.detach().double(), accuracy, grad_norm.double()]), *measured])

    def _on_device(self, ring: str) -> dict[str, Tensor]:
        """The tensors of a batch."""
        return {name: self.inputs.on_device[f"{ring}/{name}"] for name in self.batches[ring].shapes}

    def _states(self, ring: str) -> Tensor:
        """States of a batch after the last block; what its readouts see goes into the window's ring of that name."""
        batch, tap = self._on_device(ring), None if self.window is None else getattr(self.window, ring)
        if tap is not None:
            tap.aim(batch["start"], batch["stop"], batch["ends"])
        return self.training.model.states(
            batch["tokens"], batch["offset"], position=batch["position"], kept=batch["ends"], tap=tap
        )
