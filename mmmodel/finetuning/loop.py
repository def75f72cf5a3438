"""Fine-tuning loop: epochs over labelled samples, validation after each, early stop, the best weights kept."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmmodel import checkpoint, stopping, update
from mmmodel.configs import ConfigError
from mmmodel.finetuning import scores
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.learner import Aligned, FineTuned, parameter_groups
from mmmodel.finetuning.tasks import Labelled, Task, make_task
from mmmodel.limits import RunError
from mmmodel.metrics import MetricsFile

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # least time from one checkpoint to the next: an epoch may take milliseconds
OURS = ("step", "epoch", "loss", "lr", "seconds")  # of an epoch's figures; the others are its scores


@dataclass(frozen=True)
class Outcome:
    """How the training went.  The learner holds the best epoch's weights."""

    history: list[dict[str, float]]  # per epoch: step, epoch, loss, lr, and the validation scores
    best_epoch: int
    validation: dict[str, float]


def train(
    learner: FineTuned | Aligned,
    data: Labelled,
    config: FinetuneConfig,
    checkpoints: Path | None = None,
    curve: Path | None = None,
) -> Outcome:
    """Train the learner in place; with a folder of checkpoints, from the last step that one was kept of.

    curve: the metrics file, which is written anew, a line as each epoch ends.

    Raises RunError when the loss is no longer finite, saying in which epoch, and ConfigError if the validation
    samples have no score, as R2 of a single number has none.  With checkpoints, SIGTERM and Ctrl-C finish the step in
    progress and keep one: then it raises SystemExit with status 143, or KeyboardInterrupt.
    """
    device = torch.device(config.device)
    with update.dropout_apart(device):
        update.seed_dropout(config.seed, device)  # batches have generators of their own
        training = Training.open(learner, data, config, checkpoints)
        with stopping.signals() if checkpoints else nullcontext(()) as stop:
            training.run(curve, stop)
        return training.outcome()


@dataclass
class Training:
    """A fine-tuning under way: what it consists of, and how far it came."""

    learner: FineTuned | Aligned
    data: Labelled
    config: FinetuneConfig
    checkpoints: Path | None
    task: Task
    optimizer: torch.optim.Optimizer
    rates: list[float]  # of the optimizer's groups, at the top of the schedule
    best_weights: dict[str, Tensor]
    history: list[dict[str, float]] = field(default_factory=list)  # of the epochs that ended
    losses: list[Tensor] = field(default_factory=list)  # of the steps in the epoch under way

    @classmethod
    def open(
        cls, learner: FineTuned | Aligned, data: Labelled, config: FinetuneConfig, checkpoints: Path | None
    ) -> Training:
        """As the last checkpoint has it, or before its first step."""
        learner.model.requires_grad_(config.freeze != "encoder")
        task = make_task(learner, data, config)
        groups = parameter_groups(
            learner, lr=config.lr, layer_decay=config.layer_decay, weight_decay=config.weight_decay
        )
        rates = [group["lr"] for group in groups]
        training = cls(learner, data, config, checkpoints, task, update.adamw(groups), rates, _trained(learner))
        if checkpoints is not None and (saved := checkpoint.saved(checkpoints)):
            training.restore(saved[-1])
        return training

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.config.batch_size)

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def step(self) -> int:
        """How many are done."""
        return len(self.history) * self.steps_per_epoch + len(self.losses)

    @property
    def main(self) -> str:
        """The score that chooses."""
        return scores.MAIN[self.config.task]

    @property
    def best(self) -> int:
        """Number, from 0, of the epoch with the best score; of equals the first."""
        return max(range(len(self.history)), key=lambda epoch: self.history[epoch][self.main], default=0)

    @property
    def done(self) -> bool:
        ended, patience = len(self.history), self.config.patience
        return ended == self.config.epochs or 0 < patience < ended - self.best

    def run(self, curve: Path | None, stop: Sequence[int]) -> None:
        """Steps to the last, or until a signal is in `stop`: then it saves, and raises what a command ends with."""
        kept = time.monotonic()
        if not self.step:
            self.defined(self.task.untrained())  # what has no score is refused before it is learnt
        with closing(MetricsFile(curve, from_step=0)) if curve is not None else nullcontext() as log:
            for line in self.history if log else ():  # not what the file had: it may be another's, or done again
                log.write(line)
            while not self.done:
                started = time.perf_counter()
                self.learner.train()
                for rows in _order(len(self.data.train), self.config, len(self.history))[len(self.losses) :]:
                    self.advance(rows)
                    if stop:
                        break
                if len(self.losses) == self.steps_per_epoch:
                    self.end_epoch(started)
                    if log:
                        log.write(self.history[-1])
                if self.checkpoints is not None and (stop or time.monotonic() - kept >= CHECKPOINT_SECONDS):
                    self.save()
                    kept = time.monotonic()
                    if stop and not self.done:
                        stopping.end(stop, stopping.message(self.step, self.steps))
        if len(self.history) < self.config.epochs:
            logger.info("no better for %d epochs: stopping", self.config.patience)

    def advance(self, rows: np.ndarray) -> None:
        """One step, on these rows of data.train."""
        config, place = self.config, [len(self.history), len(self.losses)]
        loss = self.task.loss(rows, np.random.default_rng([config.seed, *place, 4]) if config.augment else None)
        factor = _schedule(self.step, self.steps, config.warmup_share)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.detach())

    def end_epoch(self, started: float) -> None:
        """Its figures, and its weights if it is the best so far.  started: when, by time.perf_counter."""
        epoch, loss = len(self.history) + 1, float(torch.stack(self.losses).mean())
        if not math.isfinite(loss):
            raise RunError(f"finetune: the loss of epoch {epoch} is not finite; try a lower lr than {self.config.lr:g}")
        found, main = self.defined(self.task.validate()), self.main
        rate = self.optimizer.param_groups[-1]["lr"]  # of the output layer
        line = {"step": self.step, "epoch": epoch, "loss": loss, "lr": rate, **found}
        self.history.append({**line, "seconds": time.perf_counter() - started})
        self.losses = []
        if self.best == epoch - 1:
            self.best_weights = _trained(self.learner)
        best = self.history[self.best][main]
        words = "epoch %d/%d  loss %.4f  %s %.4f (best %.4f)"
        logger.info(words, epoch, self.config.epochs, loss, main, found[main], best)

    def defined(self, found: dict[str, float]) -> dict[str, float]:
        """Scores of the validation samples, if they have one; ConfigError if not."""
        if not math.isfinite(found[self.main]):
            count = len(self.data.validation)
            raise ConfigError(
                f"finetune: {self.main} of {count} validation samples is {found[self.main]}: no epoch can be chosen"
            )
        return found

    def save(self) -> None:
        checkpoint.save(self.checkpoints, self.step, self.learner, self.optimizer, self.progress(), keep=1)

    def restore(self, path: Path) -> None:
        """What `save` kept."""
        optional = ["dropout_gpu"]  # one of a CPU, or of an earlier version, has none: then the masks are others
        progress = checkpoint.load(path, self.learner, self.optimizer, self.progress(), optional=optional)
        self.history = json.loads(progress["history"])
        self.losses = list(torch.tensor(json.loads(progress["losses"]), device=self.config.device))
        self.best_weights = progress["best"]
        torch.set_rng_state(progress["dropout"])
        for gpu in update.gpus(torch.device(self.config.device)):
            torch.cuda.set_rng_state(progress["dropout_gpu"], gpu)
        logger.info("continuing at step %d of %d", self.step, self.steps)

    def progress(self) -> dict[str, str | Tensor | dict[str, Tensor]]:
        """What a checkpoint holds besides the learner and its optimizer."""
        progress = {
            "history": json.dumps(self.history),
            "losses": json.dumps([float(loss) for loss in self.losses]),
            "best": self.best_weights,
            "dropout": torch.get_rng_state(),
        }
        for gpu in update.gpus(torch.device(self.config.device)):
            progress["dropout_gpu"] = torch.cuda.get_rng_state(gpu)
        return progress

    def outcome(self) -> Outcome:
        self.learner.load_state_dict(self.best_weights, strict=False)
        found = {name: value for name, value in self.history[self.best].items() if name not in OURS}
        return Outcome(self.history, self.best + 1, found)


def _order(count: int, config: FinetuneConfig, epoch: int) -> list[np.ndarray]:
    """Rows of each batch of an epoch: a shuffle that (seed, epoch) decides; the last may be smaller."""
    order = np.random.default_rng([config.seed, epoch, 5]).permutation(count)
    return [order[start : start + config.batch_size] for start in range(0, count, config.batch_size)]


def _schedule(step: int, steps: int, warmup_share: float) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / max(1.0, warmup_share * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _trained(learner: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that learn."""
    return {name: p.detach().clone() for name, p in learner.named_parameters() if p.requires_grad}
