"""How far a study is: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.live import Live

from clmfast.progress import REFRESHES_PER_SECOND, SECONDS_BETWEEN_LINES
from clmfast.screen import console, is_live


class StudyProgress:
    """Runs finished, steps per second of all processes together, time left."""

    def __init__(self, n_runs: int, n_steps: int) -> None:
        self.n_runs, self.n_steps = n_runs, n_steps
        self.console = console()
        self.is_live = is_live(self.console)
        self._live = Live(console=self.console, refresh_per_second=REFRESHES_PER_SECOND)
        self._start = self._last_line = time.perf_counter()
        self._first_steps: int | None = None

    def __enter__(self) -> StudyProgress:
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self._live.stop()

    def update(self, n_finished: int, steps_done: int) -> None:
        """Take in where it stands; prints where it is time to."""
        now = time.perf_counter()
        if self._first_steps is None:
            self._first_steps = steps_done  # of runs that are resumed: they took no time now
        line = self._line(n_finished, steps_done, now)
        if self.is_live:
            self._live.update(line, refresh=n_finished == self.n_runs)
        elif n_finished == self.n_runs or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(line, soft_wrap=True)

    def _line(self, n_finished: int, steps_done: int, now: float) -> str:
        per_second = (steps_done - (self._first_steps or 0)) / max(1e-9, now - self._start)
        left = "time left not known yet"
        if per_second > 0:
            minutes = int((self.n_steps - steps_done) / per_second) // 60
            left = f"{minutes // 60}:{minutes % 60:02d} h left" if minutes >= 60 else f"{minutes} min left"
        return (
            f"{n_finished}/{self.n_runs} runs  {steps_done:,}/{self.n_steps:,} steps  {per_second:.1f} steps/s  {left}"
        )
