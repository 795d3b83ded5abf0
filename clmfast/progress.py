"""What people see while a run goes on: one live line on a terminal, a plain line now and then elsewhere (logs, CI)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clmfast.screen import MAX_LINE, console, is_live
from clmfast.untrusted import one_line

if TYPE_CHECKING:
    from clmfast.train import Step, Training

SECONDS_BETWEEN_LINES = 15.0
REFRESHES_PER_SECOND = 4


class Progress:
    """Steps per second, time left, loss, accuracy, last-layer ARI and kNN accuracy, share of time spent measuring."""

    def __init__(self, training: Training, path: Path) -> None:
        self.training, self.path = training, path
        self.console = console()
        self.is_live = is_live(self.console)
        readouts = training.config.measure.readouts
        readout = "instruction_end" if "instruction_end" in readouts else readouts[0]
        layer = f"window/{readout}/layer{training.model.n_taps - 1}"
        self._shown = {
            "loss": "train/loss",
            "accuracy (unseen)": "validation/unseen_instruction/accuracy",
            "ARI": f"{layer}/ari_task",
            "kNN": f"{layer}/unseen_instruction/knn_accuracy",
        }
        self._at = {column.name: i for i, column in enumerate(training.columns)}
        self._latest: dict[str, float] = {}
        self._training_ms = self._measuring_ms = 0.0
        self._start = self._last_line = time.perf_counter()
        self._first_step = training.next_step
        self._live = Live(console=self.console, refresh_per_second=REFRESHES_PER_SECOND, transient=False)

    def __enter__(self) -> Progress:
        model, config = self.training.model, self.training.config
        text = Text(
            f"clmfast: {model.n_parameters:,} weights, {config.model.n_layers} layers of width {config.model.width}, "
            f"{config.steps:,} steps, seed {config.seed}; records in "
        )
        self.console.print(text.append(one_line(self.path, MAX_LINE), "bold"), soft_wrap=True)
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(one_line(text, MAX_LINE), soft_wrap=True)

    def update(self, step: Step) -> None:
        """Take in a step; prints where it is time to."""
        from clmfast.train import MEASURING_COLUMNS

        for name, column in self._shown.items():
            if column in self._at and np.isfinite(value := step.values[self._at[column]]):
                self._latest[name] = float(value)
        self._training_ms += step.timing["step_ms"] + step.timing["validation_ms"]
        self._measuring_ms += sum(step.timing.get(name, 0.0) for name in MEASURING_COLUMNS)
        now = time.perf_counter()
        is_last = step.step == self.training.config.steps
        if self.is_live:
            self._live.update(self._line(step.step, now), refresh=is_last)
        elif is_last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(self._line(step.step, now), soft_wrap=True)

    def _line(self, step: int, now: float) -> Text:
        n_steps, n_done = self.training.config.steps, step - self._first_step + 1
        per_second = n_done / max(1e-9, now - self._start)
        left = int((n_steps - step) / per_second)
        parts = [
            f"step {step:,}/{n_steps:,}",
            f"{per_second:.1f} steps/s",
            f"{left // 60}:{left % 60:02d} left",
            *(f"{name} {value:.3f}" for name, value in self._latest.items()),
        ]
        if self._measuring_ms:
            share = self._measuring_ms / (self._measuring_ms + self._training_ms)
            parts.append(f"measuring {share:.0%} of the time")
        return Text("  ".join(parts))

    def summary(self, path: Path) -> None:
        """The claims that this run can speak to, and where the pictures are."""
        from clmfast.findings import findings
        from clmfast.record import Run
        from clmfast.report import cost_text

        run = Run(path)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for head in ("claim (finding of the paper)", "this run", "bar", ""):
            table.add_column(head, overflow="fold")
        for finding in findings(run):
            style = {"holds": "green", "fails": "red", "unmeasured": "dim"}[finding.kind]
            table.add_row(finding.claim, Text(finding.number), Text(finding.bar), Text(finding.verdict, style))
        self.console.print(table)
        self.console.print(cost_text(run), soft_wrap=True)
        seconds = time.perf_counter() - self._start
        self.console.print(f"{seconds:.0f} s. Report: {one_line(path / 'report.html', MAX_LINE)}", soft_wrap=True)
