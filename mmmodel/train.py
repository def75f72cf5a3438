"""The training loop: a fixed number of steps, resumable to the bit.

A step's batch and draws depend on (seed, step) alone, so the state is weights, optimizer and the step number.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmmodel import checkpoint, configs, pretraining
from mmmodel.batches import Batch, Sampler
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.export import export
from mmmodel.frontends.text import load_tokenizer
from mmmodel.metrics import MetricsFile, batch_figures
from mmmodel.model import parameter_counts
from mmmodel.plot import plot_run
from mmmodel.pretraining import Pretraining
from mmmodel.progress import Progress

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20
STOPPED = 128 + signal.SIGTERM  # exit status after a SIGTERM that was obeyed


def pretrain(config: PretrainConfig, out: Path) -> bool:
    """Train in `out`, or continue what a stopped run left there.  True when all steps are done, False after SIGTERM.

    Raises ConfigError if `out` holds a run of another configuration.
    """
    started = time.perf_counter()
    torch.set_num_threads(config.threads)
    _claim(out, config)
    dataset = pretraining.open_data(config)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        pretraining.make_tokenizer(config, dataset).save(str(partial := tokenizer.with_suffix(".partial")))
        partial.replace(tokenizer)  # whole or not at all: a kill may come at any moment
    learner = Pretraining(config, load_tokenizer(tokenizer))
    corpus = pretraining.load_corpus(config, dataset, learner.model)
    device = torch.device(config.device)
    learner.to(device)
    optimizer = make_optimizer(learner, config)
    progress = {"step": 0, "skipped": 0}
    checkpoints = out / "checkpoints"
    checkpoint.clean(checkpoints)
    if found := checkpoint.saved(checkpoints):
        progress = checkpoint.load(found[-1], learner, optimizer, progress)
        logger.info("continuing at step %d of %d", progress["step"], config.steps)
    else:
        counts = parameter_counts(learner.model)
        logger.info("%d parameters: %s", counts.pop("total"), ", ".join(f"{k} {v}" for k, v in counts.items()))
    logger.info("ready after %.1f s", time.perf_counter() - started)

    items = corpus.split("train")
    sampler = Sampler(items, batch_size=config.batch_size, seed=config.seed)

    def make(step: int):
        return pretraining.make_batch(config, corpus, [items[i] for i in sampler.batch(step)], learner, step)

    def save() -> None:
        checkpoint.save(checkpoints, progress["step"], learner, optimizer, progress, keep=config.keep_checkpoints)

    if progress["step"] < config.steps:
        finished = _run(config, out, learner, optimizer, progress, make, save)
        save()
        if not finished:
            plot_run(out)
            return False
    plot_run(out)
    export(out / "model.safetensors", learner, config)
    return True


def _run(config, out, learner, optimizer, progress, make: Callable, save: Callable) -> bool:
    """Steps until config.steps or SIGTERM; progress counts them."""
    metrics = MetricsFile(out / "metrics.jsonl", from_step=progress["step"])
    skipped_in_a_row = 0
    with _sigterm() as stop, Progress(config.steps, progress["step"]) as bar, _ahead(make, progress["step"]) as batches:
        while progress["step"] < config.steps and not stop:
            before = time.perf_counter()
            batch, prepared = next(batches)
            fetched = time.perf_counter()
            step = progress["step"]
            rate = set_learning_rate(optimizer, config, step)
            figures, stepped = train_step(learner, optimizer, batch, prepared, config)
            progress["step"] = step + 1
            skipped_in_a_row = 0 if stepped else skipped_in_a_row + 1
            progress["skipped"] += not stepped
            if skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                raise RuntimeError(
                    f"train: more than {MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite"
                )
            seconds = time.perf_counter() - before
            names = config.model.modalities
            line = {"step": step + 1, **figures, "lr": rate, "skipped": progress["skipped"]}
            line |= batch_figures(batch, names, learner.model.computed_rows(batch))
            line |= {f"tokens_per_s/{name}": line[f"tokens/{name}"] / seconds for name in names}
            line |= {"step_ms": 1e3 * seconds, "data_wait_ms": 1e3 * (fetched - before)}
            metrics.write(line)
            bar.advance(line)
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                save()
    metrics.close()
    return progress["step"] >= config.steps


def train_step(
    learner: Pretraining,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    prepared: dict[str, Any],
    config: PretrainConfig,
) -> tuple[dict[str, float], bool]:
    """One update; (figures, whether it was made): not when the loss or a gradient is not finite."""
    learner.train()
    loss, figures = learner(batch.to(next(learner.parameters()).device), prepared)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for p in learner.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
    if finite:
        optimizer.step()
    figures = {"loss": loss.detach(), "grad_norm": norm, **figures}
    return {name: float(value) for name, value in figures.items()}, finite


def make_optimizer(learner: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, not on norms, biases, scales and embedding tables."""
    decayed, free = [], []
    for name, parameter in learner.named_parameters():
        (decayed if parameter.ndim > 1 and ".embedding." not in name else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to zero, or wsd: constant, then linear to zero over the last fifth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = step / config.steps
    if config.schedule == "cosine":
        return config.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "wsd":
        return config.lr * min(warm, 5 * (1 - done))
    raise ConfigError(f"schedule is {config.schedule!r}, expected cosine or wsd")


def set_learning_rate(optimizer: torch.optim.Optimizer, config: PretrainConfig, step: int) -> float:
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _claim(out: Path, config: PretrainConfig) -> None:
    """`out` is this run's: new, or holding a run of the same configuration."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    mine = configs.to_dict(config)
    if path.exists():
        theirs = configs.to_dict(configs.from_dict(json.loads(path.read_text())))
        differing = sorted(key for key in mine if mine[key] != theirs[key])
        if differing:
            raise ConfigError(f"pretrain: {out} holds a run with other {', '.join(differing)}; choose another --out")
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(config), indent=1) + "\n")
    partial.replace(path)


@contextmanager
def _sigterm() -> Iterator[list]:
    """A list that is empty until SIGTERM or SIGINT arrives: the step in progress is finished and saved first."""
    stop: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, lambda received, frame: stop.append(received))
    except ValueError:  # not in the main thread: signals are the caller's
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _ahead(make: Callable[[int], Any], step: int) -> Iterator[Iterator[Any]]:
    """make(step), make(step + 1), ... with the next one under way in a thread."""
    with ThreadPoolExecutor(1) as pool:

        def results(future: Future, step: int):
            while True:
                ready = future.result()
                step += 1
                future = pool.submit(make, step)
                yield ready

        yield results(pool.submit(make, step), step)
        pool.shutdown(wait=True, cancel_futures=True)
