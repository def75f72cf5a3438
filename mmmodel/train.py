"""The training loop: a fixed number of steps, resumable to the bit.

A step's batch and draws depend on (seed, step) alone, so the state is weights, optimizer and the step number.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmmodel import (
    atomic,
    checkpoint,
    distributed,
    export,
    held_out,
    language_model,
    limits,
    objectives,
    pretraining,
    run_folder,
    sharding,
    start,
    stopping,
    update,
)
from mmmodel.batches import Sampler
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.data.loader import ShardDataset
from mmmodel.flops import gemm_rate
from mmmodel.frontends.text import load_tokenizer
from mmmodel.limits import RunError
from mmmodel.metrics import MetricsFile, batch_figures, merged, timings
from mmmodel.model import autocast, check_impl, parameter_counts
from mmmodel.plot import plot_run
from mmmodel.pretraining import Corpus, Pretraining
from mmmodel.progress import Progress

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20
VALIDATION_BATCHES = 8


def pretrain(config: PretrainConfig, out: Path | str) -> bool:
    """Train in `out`, or continue what a stopped run left there.  True when all steps are done, False after SIGTERM.

    After Ctrl-C it raises KeyboardInterrupt, with rank 0's words; both finish the step in progress and save first.
    Under torchrun every process calls it; rank 0 writes.  Raises ConfigError if `out` holds a run of another
    configuration or another process is at work there, and if there is nothing to learn from the data.
    """
    check(config)
    torch.set_num_threads(config.threads)
    out = Path(out)
    config = dataclasses.replace(config, data=pretraining.located(config.data))
    with (
        distributed.processes(torch.device(config.device)) as device,
        nullcontext() if distributed.rank() else run_folder.alone_in(out, "pretrain"),
    ):
        return _pretrain(config, out, device)


def check(config: PretrainConfig) -> None:
    """Raises ConfigError for what cannot run here, whatever the data."""
    limits.check(config, "config")
    pretraining.check_vocabulary(config)
    limits.check_device(config.device, "config")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("config: tensorboard is True, expected the package to be there: pip install tensorboard")


def _pretrain(config: PretrainConfig, out: Path, device: torch.device) -> bool:
    started = time.perf_counter()
    if config.batch_size < distributed.size():
        raise ConfigError(
            f"pretrain: batch_size is {config.batch_size}, expected at least a sample for each of the "
            f"{distributed.size()} processes"
        )
    checkpoints = out / "checkpoints"
    begun = run_folder.begun(out, config)
    if begun and run_folder.finished(out, config):
        _log("%s is finished: all of its %d steps are done", out, config.steps)
        return True
    pretraining.check_teacher(config)  # not in `check`: a finished run asks it nothing
    check_impl(config.model.impl, device, config.precision)  # not in `check`: a rank's GPU is known here
    saved = checkpoint.saved(checkpoints)
    # first, so that nothing is written of a run that cannot start
    earlier, loaded = start.read(config) if config.start and not saved else (None, "")
    with distributed.first_alone():
        if not distributed.rank():  # alone in the folder: a checkpoint that was cut may be as large as a whole one
            atomic.remove_left(checkpoints, older=0)
        dataset = pretraining.open_data(config)
        learner = _learner(config, out, dataset, earlier, begun=bool(begun))
        corpus = pretraining.load_corpus(config, dataset, learner.model)
    items = corpus.split("train")
    if not items:
        raise ConfigError(f"pretrain: {config.data} has no samples of the split train")
    sampler = Sampler(items, batch_size=config.batch_size, seed=config.seed)
    pretraining.teach(learner, config)
    learner.to(device)
    if not saved:
        if config.language_model and config.load_language_model:  # then there is no earlier run
            loaded = str(language_model.load(learner.model, config.language_model))
        if loaded:
            _log("%s", loaded)
        counts = parameter_counts(learner.model)
        _log("%d parameters: %s", counts.pop("total"), ", ".join(f"{k} {v}" for k, v in counts.items()))
    update.prepare_modules(learner, config)
    if config.sharded:
        sharding.shard(learner, device)
    optimizer = update.make_optimizer(learner, config)
    progress = {"step": 0, "skipped": 0}
    if saved:
        progress = checkpoint.load(saved[-1], learner, optimizer, progress)
        _log("continuing at step %d of %d", progress["step"], config.steps)
    _tell_of_hardware(config, device)
    _tell_what_learns_nothing(learner, corpus, sampler)
    if not distributed.rank():  # not before all of it stands: a mistake leaves the folder free
        if progress["step"] < config.steps:
            run_folder.note_data(out, dataset, begun=bool(begun))
            if begun and (changed := run_folder.differences(asdict(begun), asdict(config))):
                _log("going on with other %s", changed)
        atomic.write_json(out / "config.json", asdict(config))
    _log("ready after %.1f s", time.perf_counter() - started)

    def make(step: int):
        chosen = distributed.own([items[i] for i in sampler.batch(step)])
        return pretraining.make_step(learner, corpus, chosen, step)

    def save() -> None:
        state = checkpoint.state(learner, optimizer)  # of every rank, which has the same weights or a part of them
        if not distributed.rank():
            with run_folder.writing(checkpoints):
                checkpoint.write(checkpoints, progress["step"], state, progress, keep=config.keep_checkpoints)
            with run_folder.writing(out):  # what is there may be used before the end
                export.write(out / export.FILE, state[0], config, learner.model.tokenizer, step=str(progress["step"]))
        distributed.wait()

    stop: list[int] = []
    if progress["step"] < config.steps:
        look = functools.partial(validate, learner, corpus)
        with stopping.signals() as stop:
            _run(config, out, learner, optimizer, progress, make, save, look, stop)
    save()
    if not distributed.rank():
        plot_run(out)
    distributed.wait()
    if progress["step"] < config.steps:
        message = stopping.message(progress["step"], config.steps)
        if signal.SIGINT in stop:
            raise KeyboardInterrupt("" if distributed.rank() else message)  # the same Ctrl-C came to every rank
        _log("%s", message)
        return False
    return True


def _learner(
    config: PretrainConfig, out: Path, dataset: ShardDataset, earlier: Pretraining | None, *, begun: bool
) -> Pretraining:
    """The earlier run's, or one of initial weights; rank 0 leaves the tokenizer in `out`, which its run keeps."""
    tokenizer = out / "tokenizer.json"
    kept = begun and tokenizer.exists() and not earlier  # a failed run may have left another
    if not kept and not distributed.rank():
        made = earlier.model.tokenizer if earlier else pretraining.make_tokenizer(config, dataset)
        with atomic.replacing(tokenizer) as partial:
            made.save(str(partial))
    return earlier or Pretraining(config, load_tokenizer(tokenizer))


def _tell_of_hardware(config: PretrainConfig, device: torch.device) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        _log("the CPU computes, though there is a GPU: pretrain --set device=cuda takes it")
    cores = os.cpu_count() or 1
    if device.type == "cpu" and distributed.size() == 1 and cores > config.threads:
        faster = "a large model is faster with pretrain --set threads"
        _log("%d of %d cores compute: %s=%d", config.threads, cores, faster, cores)
    elif device.type == "cpu" and cores < config.threads:
        _log("%d threads wait for each other on %d cores: it is faster with fewer", config.threads, cores)


def _tell_what_learns_nothing(learner: Pretraining, corpus: Corpus, sampler: Sampler) -> None:
    config, items = learner.config, corpus.split("train")
    idle = objectives.idle(learner.objectives, items, config.steps, config.batch_size)
    for name, reason in idle.items():
        _log("%s learns nothing in this run: it %s", name, reason)
    for name in config.model.modalities:
        if not any(name in item.rows for item in items):
            _log("no training sample holds %s: its front end learns nothing in this run", name)
    if "contrastive" in learner.objectives.keys() - idle.keys() and (pairs := sampler.joined()) < 1:
        _log(
            "contrastive learns little in this run: a batch shows %.2g concepts in two modalities; "
            "it needs samples that hold both",
            pairs,
        )
    validation = corpus.split("validation")
    if config.evaluate_every and not held_out.batch_size(validation):
        found = held_out.distinct(validation)
        few = f"the split validation has {found} distinct items for {distributed.size()} processes"
        _log("evaluate_every does nothing in this run: %s", few if found else "no sample has the split validation")


def validate(learner: Pretraining, corpus: Corpus, step: int) -> dict[str, float]:
    """The objectives' figures on samples of the split validation, named validation/objective/figure.

    {} but after every config.evaluate_every steps and after the last.  The draws are the same each time, and no state
    of the run changes: with or without it, it ends with the same bits.
    """
    config, items = learner.config, corpus.split("validation")
    due = config.evaluate_every and (step % config.evaluate_every == 0 or step == config.steps)
    if not due or not held_out.batch_size(items):
        return {}
    with autocast(config.device, config.precision), sharding.whole(learner):
        found = held_out.figures(learner, corpus, items, batches=VALIDATION_BATCHES)
    losses = [f"{name.removesuffix('/loss')} {loss:.3f}" for name, loss in found.items() if name.endswith("/loss")]
    _log("step %d, on the split validation: %s", step, ", ".join(losses) or "nothing to learn from")
    return {f"validation/{name}": value for name, value in found.items() if held_out.is_score(name)}


def _run(config, out, learner, optimizer, progress, make: Callable, save: Callable, look: Callable, stop: list) -> None:
    """Steps until config.steps or a signal is in stop; progress counts them.  look: figures to add after a step."""
    first = not distributed.rank()
    device = next(learner.parameters()).device
    board = out / "tensorboard" if config.tensorboard else None
    metrics = MetricsFile(out / "metrics.jsonl", from_step=progress["step"], tensorboard=board) if first else None
    peak = distributed.size() * gemm_rate(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    skipped_in_a_row = 0
    with (
        closing(metrics) if first else nullcontext(),  # after an error too: figures wait for TensorBoard's thread
        distributed.wrapped(learner) as module,
        Progress(config.steps, progress["step"], shown=first) as bar,
        _ahead(make, progress["step"]) as batches,
    ):
        while progress["step"] < config.steps:
            before = time.perf_counter()
            batch, prepared = next(batches)
            waited = time.perf_counter() - before
            step = progress["step"]
            rate = update.set_learning_rate(optimizer, config, step)
            figures, stepped = update.train_step(module, optimizer, batch, update.reweighted(prepared, device), config)
            progress["step"] = step + 1
            skipped_in_a_row = 0 if stepped else skipped_in_a_row + 1
            progress["skipped"] += not stepped
            if skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                raise RunError(
                    f"train: more than {MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite"
                )
            figures |= batch_figures(batch, config.model.modalities, learner.model.computed_rows(batch))
            every = distributed.everyone(figures | {"stop": len(stop)})
            line = {"step": step + 1, **merged(every), "lr": rate, "skipped": progress["skipped"]}
            told_to_stop = line.pop("stop")  # all ranks stop after the same step
            line |= timings(line, time.perf_counter() - before, waited, peak)
            line |= look(step + 1)
            if first:
                metrics.write(line)
                bar.advance(line)
            if told_to_stop:
                break
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                save()


def _log(message: str, *values: Any) -> None:
    if not distributed.rank():
        logger.info(message, *values)


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
