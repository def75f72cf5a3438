"""What a person sees of a run: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich import console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LINES = 20  # over a run, where there is no terminal
SMOOTHING = 0.9


class Console(console.Console):
    """Rich's, but for a reader that has seen enough (`mmmodel evaluate | head`): that is `cli.main`'s to say."""

    def on_broken_pipe(self) -> None:
        raise


class Progress:
    """Context manager; `advance(figures)` once per step.  shown=False: a rank that leaves it to another to speak."""

    def __init__(self, steps: int, done: int, *, shown: bool = True) -> None:
        self.steps, self.done, self.first, self.shown = steps, done, done, shown
        self.console = Console()
        self.loss: float | None = None
        self.bar = RichProgress(
            TextColumn("pretrain"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )

    def __enter__(self) -> Progress:
        self.started = time.perf_counter()
        self.bar.start()
        self.task = self.bar.add_task("", total=self.steps, completed=self.done, figures="")
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def advance(self, figures: dict[str, float]) -> None:
        self.done += 1
        loss = figures["loss"]
        self.loss = loss if self.loss is None or loss != loss else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        text = (
            f"loss {self.loss:.3f}  {figures['tokens'] / figures['step_ms'] * 1e3:,.0f} tokens/s  "
            f"MFU {figures['mfu_percent']:.0f} %  fill {figures['fill_percent']:.0f} %  "
            f"data wait {100 * figures['data_wait_ms'] / figures['step_ms']:.0f} %"
        )
        self.bar.update(self.task, completed=self.done, figures=text)
        if not self.console.is_terminal and (self.done % max(1, self.steps // LINES) == 0 or self.done == self.steps):
            elapsed = time.perf_counter() - self.started
            left = elapsed / (self.done - self.first) * (self.steps - self.done)
            print(
                f"step {self.done}/{self.steps}  {text}  lr {figures['lr']:.2e}  {elapsed:.0f} s, {left:.0f} s left",
                flush=True,
            )
