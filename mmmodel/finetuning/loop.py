"""Fine-tuning loop: epochs over labelled samples, validation after each, early stop, the best weights kept."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmmodel import checkpoint, stopping
from mmmodel.batches import Batch
from mmmodel.configs import ConfigError
from mmmodel.embed import make_batch, sample_vectors, segment_vectors
from mmmodel.features import Features, Item
from mmmodel.finetuning import scores
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import Aligned, FineTuned, make_loss, parameter_groups
from mmmodel.limits import RunError
from mmmodel.metrics import MetricsFile
from mmmodel.model import autocast
from mmmodel.update import adamw

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # least time from one checkpoint to the next: an epoch may take milliseconds


@dataclass(frozen=True)
class Labelled:
    """Samples of the splits that learn and choose, with their labels."""

    features: Features
    train: list[Item]
    validation: list[Item]
    test: list[Item]  # may be empty; never seen before the end
    values: dict[str, Any]  # key -> label, as labels.read gives it
    labels: Labels

    def of(self, items: Sequence[Item]) -> list[Any]:
        return [self.values[item.key] for item in items]


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of dropout: batches have generators of their own
        learner.model.requires_grad_(config.freeze != "encoder")
        feed, validate = (_retrieval if isinstance(learner, Aligned) else _outputs)(learner, data, config)
        with stopping.signals() if checkpoints else nullcontext(()) as stop:
            return _train(learner, data, config, feed, validate, checkpoints, curve, stop)


def _train(
    learner: FineTuned | Aligned,
    data: Labelled,
    config: FinetuneConfig,
    feed: Callable[[int, int], Iterator[Tensor]],
    validate: Callable[[], dict[str, float]],
    checkpoints: Path | None,
    curve: Path | None,
    stop: Sequence[int],
) -> Outcome:
    groups = parameter_groups(learner, lr=config.lr, layer_decay=config.layer_decay, weight_decay=config.weight_decay)
    rates = [group["lr"] for group in groups]
    optimizer = adamw(groups)
    steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []  # of the steps in the epoch under way
    main, weights = scores.MAIN[config.task], _trained(learner)
    if checkpoints is not None and (found := checkpoint.saved(checkpoints)):
        progress = {"history": "", "losses": "", "best": weights, "dropout": torch.get_rng_state()}
        progress = checkpoint.load(found[-1], learner, optimizer, progress)
        history = json.loads(progress["history"])
        losses = list(torch.tensor(json.loads(progress["losses"]), device=config.device))
        torch.set_rng_state(progress["dropout"])
        logger.info("continuing at step %d of %d", len(history) * steps_per_epoch + len(losses), steps)
    log = MetricsFile(curve, from_step=0) if curve is not None else None
    for line in history if log else ():  # not what the file had: it may be another's, or of epochs done again
        log.write(line)

    def keep() -> None:
        so_far = json.dumps([float(loss) for loss in losses])
        progress = {"history": json.dumps(history), "losses": so_far, "best": weights, "dropout": torch.get_rng_state()}
        done = len(history) * steps_per_epoch + len(losses)
        checkpoint.save(checkpoints, done, learner, optimizer, progress, keep=1)
        if stop and done < steps:
            stopping.end(stop, stopping.message(done, steps))

    kept = time.monotonic()
    for epoch in range(len(history), config.epochs):
        learner.train()
        started = time.perf_counter()
        for loss in feed(epoch, len(losses)):
            factor = _schedule(epoch * steps_per_epoch + len(losses), steps, config.warmup_share)
            _step(learner, optimizer, loss, [rate * factor for rate in rates], config.clip_norm)
            losses.append(loss.detach())
            if stop and len(losses) < steps_per_epoch:
                keep()
        mean_loss, losses = float(torch.stack(losses).mean()), []
        if not math.isfinite(mean_loss):
            raise RunError(f"finetune: the loss of epoch {epoch + 1} is not finite; try a lower lr than {config.lr:g}")
        found = validate()
        if not math.isfinite(found[main]):
            count = len(data.validation)
            raise ConfigError(
                f"finetune: {main} of {count} validation samples is {found[main]}: no epoch can be chosen"
            )
        line = {"step": (epoch + 1) * steps_per_epoch, "epoch": epoch + 1, "loss": mean_loss, "lr": config.lr * factor}
        history.append({**line, **found, "seconds": time.perf_counter() - started})
        if log:
            log.write(history[-1])
        best = _best(history, main)
        if best == epoch:
            weights = _trained(learner)
        logger.info(
            "epoch %d/%d  loss %.4f  %s %.4f (best %.4f)",
            epoch + 1,
            config.epochs,
            mean_loss,
            main,
            found[main],
            history[best][main],
        )
        if config.patience and epoch - best >= config.patience:
            logger.info("no better for %d epochs: stopping", config.patience)
            break
        if checkpoints is not None and (stop or time.monotonic() - kept >= CHECKPOINT_SECONDS):
            keep()
            kept = time.monotonic()
    if log:
        log.close()
    best = _best(history, main)
    learner.load_state_dict(weights, strict=False)
    ours = ("step", "epoch", "loss", "lr", "seconds")
    return Outcome(history, best + 1, {name: value for name, value in history[best].items() if name not in ours})


def _step(
    learner: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rates: Sequence[float], clip_norm: float
) -> None:
    """rates: of the optimizer's groups."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(learner.parameters(), clip_norm)
    optimizer.step()


def evaluate_on(learner: FineTuned | Aligned, data: Labelled, items: Sequence[Item]) -> dict[str, float]:
    """Scores of the task on items that have labels."""
    learner.eval()
    if isinstance(learner, Aligned):
        vectors = segment_vectors(learner.model, items, data.features, learner.points)
        return scores.score_retrieval(vectors, relabelled(items, data.values))
    return scores.score(data.labels, predict(learner, data.features, items), data.of(items))


def predict(learner: FineTuned, features: Features, items: Sequence[Item]) -> Tensor:
    """Outputs of the items, float32 [len(items), C]: logits, or the number in units of the training deviation."""
    learner.eval()
    return torch.from_numpy(sample_vectors(learner.model, items, features, learner))


def relabelled(items: Sequence[Item], values: dict[str, Any]) -> list[Item]:
    """Items whose concept is their label: what retrieval counts as the same thing."""
    return [replace(item, concept=values[item.key]) for item in items]


def _outputs(learner: FineTuned, data: Labelled, config: FinetuneConfig):
    """Losses of an epoch from its batch `first` on, and validation.

    A frozen encoder reads each sample once, not augmented.
    """
    loss = make_loss(data.labels, data.of(data.train), balance=config.balance)
    device = next(learner.parameters()).device
    targets = data.labels.encode(data.of(data.train)).to(device)
    expected = data.of(data.validation)
    if config.freeze == "encoder":
        learner.eval()
        train, validation = (
            torch.from_numpy(sample_vectors(learner.model, items, data.features, learner.pooled)).to(device)
            for items in (data.train, data.validation)
        )

        def feed(epoch: int, first: int) -> Iterator[Tensor]:
            for rows in _order(len(train), config, epoch)[first:]:
                yield loss(learner.outputs(train[rows]), targets[rows])

        @torch.no_grad()
        def validate() -> dict[str, float]:
            learner.eval()
            return scores.score(data.labels, learner.outputs(validation).cpu(), expected)

        return feed, validate

    def feed_batches(epoch: int, first: int) -> Iterator[Tensor]:
        for rows, batch in _batches(learner, data.train, data.features, config, epoch, first):
            with autocast(config.device, config.precision):
                outputs = learner(batch)
            yield loss(outputs.float(), targets[rows])

    return feed_batches, lambda: evaluate_on(learner, data, data.validation)


def _retrieval(learner: Aligned, data: Labelled, config: FinetuneConfig):
    """As `_outputs`, for points."""
    items = relabelled(data.train, data.values)

    def feed(epoch: int, first: int) -> Iterator[Tensor]:
        for _, batch in _batches(learner, items, data.features, config, epoch, first):
            with autocast(config.device, config.precision):
                loss = learner(batch)
            yield loss

    return feed, lambda: evaluate_on(learner, data, data.validation)


def _batches(
    learner: nn.Module, items: Sequence[Item], features: Features, config: FinetuneConfig, epoch: int, first: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    for number, rows in enumerate(_order(len(items), config, epoch)[first:], first):
        rng = np.random.default_rng([config.seed, epoch, number, 4]) if config.augment else None
        yield rows, make_batch(learner.model, [items[i] for i in rows], features, rng)


def _order(count: int, config: FinetuneConfig, epoch: int) -> list[np.ndarray]:
    """Rows of each batch of an epoch: a shuffle that (seed, epoch) decides; the last may be smaller."""
    order = np.random.default_rng([config.seed, epoch, 5]).permutation(count)
    return [order[start : start + config.batch_size] for start in range(0, count, config.batch_size)]


def _schedule(step: int, steps: int, warmup_share: float) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / max(1.0, warmup_share * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _best(history: Sequence[dict[str, float]], main: str) -> int:
    """Number of the epoch with the best score; of equals the first."""
    return max(range(len(history)), key=lambda epoch: history[epoch][main])


def _trained(learner: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that learn."""
    return {name: p.detach().clone() for name, p in learner.named_parameters() if p.requires_grad}
