"""Training: a generator of Step records, one per update and one for the finished model. Knows nothing of files.

Row t of a run describes the model after t updates: the loss of batch t, the window over the states up to batch t, and,
where they are due, a validation and a probe of exactly that model. Then update t + 1 follows. The last row has no
batch. Measuring draws nothing from a random stream that training uses and changes no state of it, so the losses are
bit for bit those of an unmeasured run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clmfast.capture import Recorder, from_host, spans
from clmfast.config import UNSEEN_SPLITS, RunConfig, replays_graph, rides_inside
from clmfast.data.tasks import Batch, Ids, TaskSet, choose, draw, make_tasks
from clmfast.measure.catalogue import Column
from clmfast.measure.controls import raw_string_control, shuffled_label_control
from clmfast.measure.probe import Probe
from clmfast.measure.projection import principal_plane
from clmfast.measure.window import Window
from clmfast.measuring_thread import MeasuringThread, threads_beside
from clmfast.model import Tap, Transformer
from clmfast.static_step import StaticStep

TRAIN_MEASURES = ("loss", "accuracy", "lr", "grad_norm")
# ride_along_ms is for unseen examples in a pass of their own. Those that ride in the training pass are a part of
# step_ms that no clock can tell apart, so that their run has no such column: the benchmark of the tax tells their cost.
TIMING_COLUMNS = ("step_ms", "capture_ms", "ride_along_ms", "window_ms", "probe_ms", "validation_ms")
MEASURING_COLUMNS = ("capture_ms", "ride_along_ms", "window_ms", "probe_ms")
VALIDATION_SPLIT = "unseen_instruction"
CHUNK = 256  # sequences of a pass without gradient: their activations stay in the cache


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; `step` says where."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"training stopped at step {step}: the loss must be finite, got {loss}")
        self.step = step


@dataclass(frozen=True)
class Snapshot:
    """A probe's training states in their principal plane: `plane` [L, N, 2], `share` [L], labels [N] by kind."""

    readout: str
    plane: NDArray[np.float32]
    share: NDArray[np.float64]
    labels: dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Step:
    """One row of the run: `values` in the order of Training.columns, NaN = not measured."""

    step: int
    values: NDArray[np.float64]
    answers: NDArray[np.float64] | None  # what neighbours say in the window, as Window.answers_shape
    timing: dict[str, float]  # ms by Training.timing_columns
    events: list[dict[str, Any]]
    snapshots: list[Snapshot]


@dataclass
class EarlyStopping:
    """Picks the step of the best validation accuracy once `patience` validations have brought nothing better."""

    patience: int
    best_accuracy: float = -1.0
    best_step: int = -1
    n_without_gain: int = 0
    picked_step: int = -1

    def update(self, step: int, accuracy: float) -> bool:
        """Take in a validation; True when this one makes the pick (once)."""
        if self.picked_step >= 0:
            return False
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step, self.n_without_gain = accuracy, step, 0
            return False
        self.n_without_gain += 1
        if self.n_without_gain < self.patience:
            return False
        self.picked_step = self.best_step
        return True


@dataclass
class Stopwatch:
    """Adds up milliseconds by name."""

    ms: dict[str, float]

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.ms[name] += 1e3 * (time.perf_counter() - start)


class Training:
    """Owns everything that a run changes: weights, optimizer, rings, early stopping. Iterate over it to train.

    `state()` and `load_state()` write and read all of it between two steps.
    """

    def __init__(self, config: RunConfig, tasks: TaskSet) -> None:
        self.config, self.tasks = config, tasks
        self.device = torch.device(config.device)
        # Made on the CPU and moved, so that a seed means the same weights everywhere.
        self.model = Transformer(config.model, len(tasks.vocabulary), tasks.max_length, config.seed).to(self.device)
        decayed = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        is_decayed = {id(p) for p in decayed}
        others = [p for p in self.model.parameters() if id(p) not in is_decayed]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.train.lr,
            betas=(config.train.beta1, config.train.beta2),
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.parameters = [*decayed, *others]  # walking through the modules takes longer than clipping
        self.next_step = 0
        self.early_stopping = EarlyStopping(config.train.patience)
        self.validation = {
            split: choose(examples, config.train.n_validation, config.seed, "validation")
            for split, examples in ((s, tasks.splits[s]) for s in UNSEEN_SPLITS)
            if len(examples)
        }
        measure, n_layers, width = config.measure, self.model.n_taps, config.model.width
        self.window = self.probe = None
        if config.measure_every:
            self.window = Window(tasks, config, n_layers)
            if measure.probe_every:
                self.probe = Probe(tasks, measure, n_layers, width, config.seed, config.device)
        self.rides_inside = rides_inside(config)[0]
        n_beside, _ = threads_beside(config)
        self.beside = MeasuringThread(n_beside) if n_beside else None
        self.timing_columns = tuple(c for c in TIMING_COLUMNS if not (self.rides_inside and c == "ride_along_ms"))
        self.columns = [
            *(Column("train", measure) for measure in TRAIN_MEASURES),
            *(Column("validation", m, split=split) for split in self.validation for m in ("accuracy", "loss")),
            *(self.window.columns if self.window else []),
            *(self.probe.columns if self.probe else []),
        ]
        self._at = {column.name: i for i, column in enumerate(self.columns)}
        self.window_at = [self._at[column.name] for column in self.window.columns] if self.window else []
        self.snapshot_steps = snapshot_steps(config)
        self.static = StaticStep(self) if replays_graph(config)[0] else None

    def __iter__(self) -> Iterator[Step]:
        """Train from `next_step` on, one Step per update and one for the finished model.

        Raises TrainingDiverged after the step whose loss is not finite.
        """
        config = self.config
        while self.next_step <= config.steps:
            if config.train.stop_early and self.early_stopping.picked_step >= 0:
                return
            step = self.next_step
            watch, events = Stopwatch(dict.fromkeys(self.timing_columns, 0.0)), list[dict[str, Any]]()
            values = np.full(len(self.columns), np.nan)
            snapshots: list[Snapshot] = []
            is_last = step == config.steps
            every = config.measure.probe_every
            probe_due = self.probe is not None and (is_last or step % every == 0)
            if is_last or step % config.train.validate_every == 0 or (every and step % every == 0):
                with watch.time("validation_ms"):
                    self._validate(step, values, events, is_last or bool(every and step % every == 0))
            if probe_due:
                with watch.time("probe_ms"), self.all_threads():
                    snapshots = self._probe(step, values)
            answers = None
            loss = 0.0
            if not is_last:
                loss, answers = self._update(step, values, watch)
            self.next_step += 1
            if not math.isfinite(loss):
                events.append({"event": "anomaly", "step": step, "loss": str(loss)})
            yield Step(step, values, answers, watch.ms, events, snapshots)
            if not math.isfinite(loss):
                raise TrainingDiverged(step, loss)

    def column_at(self, name: str) -> int:
        """Where in a row's values a column is."""
        return self._at[name]

    def draw_unseen(self, step: int) -> Ids:
        """The unseen examples that ride along in a step."""
        config = self.config
        return draw(self.tasks.splits[VALIDATION_SPLIT], config.measure.unseen_per_step, config.seed, step, "unseen")

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config, step)

    def _update(self, step: int, values: NDArray[np.float64], watch: Stopwatch) -> tuple[float, NDArray | None]:
        """One training step; fills `values`, returns (loss, answers of neighbours)."""
        if self.static is not None:
            with watch.time("step_ms"):
                return self.static.update(step, values)
        config, window = self.config, self.window
        with watch.time("step_ms"):
            examples = draw(self.tasks.splits["train"], config.train.batch, config.seed, step, "train")
            batch = self.tasks.pack(examples, "prompt_end" if config.train.loss_on == "output" else "sequence_end")
            whole, tap, written = batch, None, dict[Recorder, Ids]()
            if window is not None:
                written[window.train] = examples
                if self.rides_inside:
                    written[window.unseen] = self.draw_unseen(step)
                    whole = batch.followed_by(self.tasks.pack(written[window.unseen]))
                tap = self._tap(whole, list(written), watch)
            loss, accuracy = self._loss(batch, whole, tap)
            for ring, of_ring in written.items():
                ring.advance(torch.from_numpy(of_ring))
        if window is not None and not self.rides_inside:
            # The unseen examples must see the weights that the batch saw: before the update.
            with watch.time("ride_along_ms"):
                self._ride_along(step, window.unseen)
        is_measured = window is not None and step % config.measure_every == 0
        measuring = self.beside.start(window.measure, step) if window and self.beside and is_measured else None
        with watch.time("step_ms"):
            for p in self.parameters:
                p.grad = None
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.train.clip_norm)
            lr = self.lr(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        watch.ms["step_ms"] -= watch.ms["capture_ms"]
        answers = None
        if window is not None and is_measured:
            with watch.time("window_ms"):
                measured, answered = measuring.result() if measuring else window.measure(step)
                values[self.window_at], answers = measured.cpu().numpy(), answered.cpu().numpy()
        for measure, value in zip(TRAIN_MEASURES, (loss.item(), accuracy, lr, grad_norm.item()), strict=True):
            values[self._at[f"train/{measure}"]] = value
        return loss.item(), answers

    def _tap(self, batch: Batch, rings: list[Recorder], watch: Stopwatch) -> Tap:
        """The window's recorders, aimed at the training batch and at what rides along behind it, and timed."""
        n = self.config.train.batch
        for ring, sequences in zip(rings, (slice(n), slice(n, None)), strict=False):
            self._aim(ring, batch, sequences)

        def tap(layer: int, x: Tensor) -> None:
            with watch.time("capture_ms"):
                for ring in rings:
                    ring(layer, x)

        return tap

    def _aim(self, ring: Recorder, batch: Batch, sequences: slice) -> None:
        """At the readouts of some of the batch's sequences."""
        start, stop = (x[:, sequences].contiguous() for x in spans(batch, ring.readouts, self.device))
        ring.aim(start, stop, self._kept(batch))

    def _ride_along(self, step: int, ring: Recorder) -> None:
        """A few unseen examples into their ring, in a pass of their own."""
        unseen = self.draw_unseen(step)
        batch = self.tasks.pack(unseen)
        self._aim(ring, batch, slice(None))
        with torch.inference_mode():
            self._states(batch, ring)
        ring.advance(torch.from_numpy(unseen))

    def _kept(self, batch: Batch) -> Tensor | None:
        """The rows that the last block has to compute: the same whether anything is measured or not, so that measuring
        changes no bit of a gradient. None: all, for what reads more than the ends."""
        if "mean" in self.config.measure.readouts or self.config.train.loss_on == "all":
            return None
        return from_host(batch.ends, self.device)

    def _states(self, batch: Batch, tap: Tap | None, n_trained: int | None = None) -> Tensor:
        """States after the last block, at the kept rows."""
        return self.model.states(
            from_host(batch.tokens, self.device),
            from_host(batch.offset, self.device),
            position=from_host(batch.position, self.device),
            kept=self._kept(batch),
            n_trained=n_trained,
            tap=tap,
        )

    def _loss(self, batch: Batch, whole: Batch, tap: Tap | None) -> tuple[Tensor, float]:
        """(training loss in nats per predicted token, share of right outputs) of a batch. What stands behind it in
        `whole` is seen by the tap alone."""
        states = self._states(whole, tap, len(batch.target))
        loss, accuracy = self._loss_of_outputs(states, batch)
        if self.config.train.loss_on == "all":
            rows = np.delete(np.arange(len(batch.tokens)), batch.offset[1:] - 1)
            target = from_host(batch.tokens[rows + 1], self.device)
            loss = F.cross_entropy(self.model.logits(states[from_host(rows, self.device)]), target)
        return loss, accuracy

    def _loss_of_outputs(self, states: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """(mean loss in nats, share of right ones) of the outputs that follow the prompts."""
        kept, rows = self._kept(batch), from_host(batch.prompt_end, self.device)
        logits = self.model.logits(states[rows if kept is None else torch.searchsorted(kept, rows)])
        target = from_host(batch.target, self.device)
        return F.cross_entropy(logits, target), (logits.detach().argmax(-1) == target).double().mean().item()

    def _validate(self, step: int, values: NDArray[np.float64], events: list[dict[str, Any]], all_splits: bool) -> None:
        for split, examples in self.validation.items():
            if split != VALIDATION_SPLIT and not all_splits:
                continue
            n_right = total = 0.0
            for first in range(0, len(examples), CHUNK):
                batch = self.tasks.pack(examples[first : first + CHUNK])
                with torch.inference_mode():
                    loss, accuracy = self._loss_of_outputs(self._states(batch, None), batch)
                n_right += accuracy * len(batch.target)
                total += loss.item() * len(batch.target)
            accuracy = n_right / len(examples)
            values[self._at[f"validation/{split}/accuracy"]] = accuracy
            values[self._at[f"validation/{split}/loss"]] = total / len(examples)
            if split == VALIDATION_SPLIT and self.early_stopping.update(step, accuracy):
                events.append(
                    {
                        "event": "early_stop",
                        "step": step,
                        "picked_step": self.early_stopping.picked_step,
                        "accuracy": self.early_stopping.best_accuracy,
                    }
                )

    def all_threads(self) -> AbstractContextManager[None]:
        """A probe has training's threads and those that measure the window."""
        return self.beside.lends() if self.beside else nullcontext()

    def _probe(self, step: int, values: NDArray[np.float64]) -> list[Snapshot]:
        assert self.probe is not None
        measured, states = self.probe.measure(self.model)
        values[[self._at[column.name] for column in self.probe.columns]] = measured.cpu().numpy()
        if step not in self.snapshot_steps:
            return []
        snapshots = []
        for probe_set, (train, _) in zip(self.probe.sets, states, strict=True):
            plane, share = principal_plane(train.cpu())
            labels = {kind: probe_set.train_labels[kind].numpy() for kind in probe_set.kinds}
            snapshots.append(Snapshot(probe_set.readout, plane.numpy(), share.numpy(), labels))
        return snapshots

    def controls(self) -> list[dict[str, Any]]:
        """Letters alone and shuffled labels on the probe sets, for the model as it is: one entry per measure, readout
        and (for the labels) layer, with mean and range. The untrained model is the probe of row 0."""
        if self.probe is None:
            return []
        measure, seed = self.config.measure, self.config.seed
        found: list[dict[str, Any]] = []

        def add(kind: str, readout: str, name: str, layer: int, mean: float, low: float, high: float) -> None:
            split, _, what = name.rpartition("/")
            if math.isfinite(mean):
                found.append(
                    {"control": kind, "readout": readout, "split": split, "measure": what, "layer": layer}
                    | {"mean": mean, "low": low, "high": high}
                )

        for probe_set, (points, queries) in zip(self.probe.sets, self.probe.states(self.model), strict=True):
            points, queries = points.cpu(), {split: query.cpu() for split, query in queries.items()}
            for name, value in raw_string_control(self.tasks, probe_set, measure, seed).items():
                add("raw_strings", probe_set.readout, name, -1, value, value, value)
            shuffled = shuffled_label_control(probe_set, points, queries, self.tasks.n_tasks, measure, seed)
            for name, rounds in shuffled.items():
                for layer in range(rounds.shape[1]):
                    values = rounds[:, layer]
                    mean, low, high = (stat(values).item() for stat in (torch.mean, torch.min, torch.max))
                    add("shuffled_labels", probe_set.readout, name, layer, mean, low, high)
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values): all that the steps from `next_step` on depend on."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.config.model.tie_head:
            del tensors["model.head.weight"]  # the same tensor as the embedding
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()})
        if self.window is not None:
            tensors.update({f"window.{name}": tensor for name, tensor in self.window.state().items()})
        return tensors, {"next_step": self.next_step, "early_stopping": vars(self.early_stopping).copy()}

    def check_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Raise ValueError unless `load_state` can take this: names, shapes, dtypes and counts must be those of a state
        of this run. What the numbers are is not looked at, but for those that are used as places."""

        def need(holds: bool, what: str, got: object) -> None:
            if not holds:
                raise ValueError(f"a saved state needs {what}, got {got}")

        step, early = values.get("next_step"), values.get("early_stopping")
        need(type(step) is int and 0 < step <= self.config.steps, f"next_step in [1, {self.config.steps}]", step)
        assert isinstance(step, int)
        fresh = vars(EarlyStopping(self.config.train.patience))
        need(
            isinstance(early, dict)
            and early.keys() == fresh.keys()
            and all(isinstance(early[name], int | float) for name in fresh),
            f"the numbers {', '.join(fresh)} of early stopping",
            str(early)[:100],
        )
        wanted = {name: (tuple(t.shape), t.dtype) for name, t in self.state()[0].items()}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            wanted[f"optimizer.{i}.step"] = (), torch.float32
            wanted[f"optimizer.{i}.exp_avg"] = wanted[f"optimizer.{i}.exp_avg_sq"] = tuple(p.shape), p.dtype
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        for name in dict.fromkeys((*wanted, *found)):
            one, other = wanted.get(name, "nothing"), found.get(name, "nothing")
            need(one == other, f"{one} as {name}", other)
        if self.window is not None:
            n_examples = len(self.tasks.instruction_grammar) * self.tasks.n_inputs
            for name, n_per_step in (
                ("train", self.config.train.batch),
                ("unseen", self.config.measure.unseen_per_step),
            ):
                slot, example = tensors[f"window.{name}.slot"].item(), tensors[f"window.{name}.example"]
                need(slot == step * n_per_step, f"{step * n_per_step} states written to window.{name}", slot)
                is_filled = torch.arange(len(example)) < slot
                need(
                    bool((((example >= 0) & (example < n_examples)) == is_filled).all()),
                    f"numbers of examples below {n_examples} where window.{name} is filled, and only there",
                    "others",
                )

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of `state`."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        weights = under("model.")
        if self.config.model.tie_head:
            weights["head.weight"] = weights["token_embedding.weight"]
        self.model.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under("optimizer.").items():
            i, key = name.split(".")
            moments.setdefault(int(i), {})[key] = tensor
        # load_state_dict replaces the groups by copies; what was put into them before (the learning rate as the tensor
        # that a graph reads) has to stay what it is.
        settings = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for group, before in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({name: value for name, value in before.items() if name != "params"})
        if self.window is not None:
            self.window.load_state(under("window."))
        self.next_step = values["next_step"]
        self.early_stopping = EarlyStopping(**values["early_stopping"])


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to lr_final_share of the peak."""
    train = config.train
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, config.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr * (train.lr_final_share + (1 - train.lr_final_share) * cosine)


def snapshot_steps(config: RunConfig) -> set[int]:
    """Probe steps that keep a projection: the first and the last, and log-spaced ones between, n_snapshots in all."""
    every, n = config.measure.probe_every, config.measure.n_snapshots
    if not (config.measure_every and every and n):
        return set()
    wanted = np.concatenate([[0], np.geomspace(every, max(every, config.steps), max(1, n - 1))])

    def nearest_probe(w: float) -> int:
        below = int(w // every) * every
        return min((below, below + every, config.steps), key=lambda s: (abs(min(s, config.steps) - w), s))

    return {min(nearest_probe(w), config.steps) for w in wanted} | {config.steps}


def train(config: RunConfig, tasks: TaskSet | None = None) -> Iterator[Step]:
    """The Step records of a whole run; the task set follows from the config unless one is given."""
    return iter(Training(config, tasks or make_tasks(config.task, config.seed)))
