"""Whole pretraining steps: packed, and in the layouts that others train in.   B samples in a batch, T real tokens.

A step is forward, losses, backward, clipping and AdamW with the parameters, draws and batches of `mmmodel pretrain`.
The learning rate is 0: all of the work is done, and the weights stay where every implementation has the same loss.
Bucketing changes which samples share a batch, so implementations are compared by real tokens per second; each one's
losses are checked on its own batches against the packed model, and losses and gradients of all on one small batch
against the float64 reference.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import LEFT_OUT, PREFIX, Deferred, Implementation, Missing, Work
from benchmarks.peers import train_packed
from benchmarks.peers.train_padded import PaddedModel
from benchmarks.train_step_cases import Case, cases
from benchmarks.train_step_data import Samples, bucketed, spread, vocabulary
from benchmarks.train_step_memory import peak_memory
from mmmodel import configs, update
from mmmodel.batches import Batch
from mmmodel.configs import PretrainConfig
from mmmodel.flops import StepFlops
from mmmodel.model import Model, autocast
from mmmodel.pretraining import Prepared, Pretraining

DTYPES_USED = {"cpu": ["fp32"], "cuda": ["bf16"]}
SECONDS = {"quick": 100, "full": 900}
POOLS = (8, 50)  # batches that are sorted by length together
# Losses are means over thousands of terms and agree to a few units of the last place; a gradient passes through a dozen
# layers whose sums are ordered otherwise.  Both bounds are about ten times what was seen of correct implementations
# (tests/benchmarks/test_train_step.py), and the mildest of the wrong ones there misses them ten times over.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
GRADIENT_TOLERANCE = {"fp32": 3e-5, "bf16": 1e-1}
# Of a GPU's memory, beside a padded layout's activations: all implementations' models, and the allocator.
HELD_GB = 25.0
SMALL = 4  # samples in the batch whose gradients are checked, a long one among them


@dataclass
class Step:
    """An implementation's steps over its batches; calling it is one timed call."""

    learner: Pretraining
    batches: list[tuple[Batch, Prepared]]
    expected: list[float]  # losses of the packed model
    config: PretrainConfig
    padded: bool  # its masks came with the batch; else they are lowered in each step
    extra: dict[str, Any]
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = update.make_optimizer(self.learner, dataclasses.replace(self.config, lr=0.0))

    def __call__(self) -> Step:
        measured = max(self.batches, key=lambda pair: pair[0].layout.total_tokens)
        first = not self.losses  # the first call is the one that is checked, and not timed
        self.losses = []
        for pair in self.batches:
            if first and pair is measured:
                memory = peak_memory(functools.partial(self._step, *pair), next(self.learner.parameters()).device)
                self.extra["peak_memory_mb"] = round(memory / 1e6)
            else:
                self._step(*pair)
        return self

    def _step(self, batch: Batch, prepared: Prepared) -> None:
        if not self.padded:
            for layout in (batch.layout, *([prepared.masked.layout] if prepared.masked else [])):
                for side in (layout, layout.host):
                    side.cache.clear()
                    side.calls.clear()  # by which a call that was met before goes past its plan
        figures, made = update.train_step(self.learner, self.optimizer, batch, prepared, self.config)
        if not made:
            raise FloatingPointError(f"the loss or a gradient is not finite: {figures}")
        self.losses.append(figures["loss"])

    def gradients(self, batch: Batch, prepared: Prepared) -> tuple[float, list[Tensor]]:
        """Loss and gradients on a batch."""
        return gradients(self.learner, batch, prepared, autocast(self.config.device, self.config.precision))


@dataclass
class StepProblem:
    case: str
    dtype: str
    config: PretrainConfig
    samples: Samples
    sizes: Case
    device: torch.device
    op: str = "train_step"
    directions: tuple[str, ...] = ("step",)
    _known: dict[bytes, tuple[float, float]] = field(default_factory=dict)

    def implementations(self) -> Iterator[Implementation | Missing]:
        lengths, batch_size = self.samples.lengths, self.sizes.batch_size
        unsorted = bucketed(lengths, batch_size, 1)
        plain = unsorted[: self.sizes.batches], unsorted[: max(POOLS)]
        sorted_pools = {}
        for pool, number in zip(POOLS, self.sizes.buckets, strict=True):
            batches = bucketed(lengths, batch_size, pool)[:pool]
            sorted_pools[f"bucketed_{pool}"] = spread(batches, number), batches
        yield self._implementation(f"{PREFIX}packed", Model, *plain)
        if self.sizes.compiled:
            yield self._implementation(f"{PREFIX}packed, compiled", Model, *plain, compiled=True)
            return
        yield from self._packed_peers(*plain)
        padded = {"vilt_padded": plain, **sorted_pools}
        for name, batches in padded.items():
            if reason := self.sizes.left_out.get(name) or self._too_large(batches[0]):
                yield Missing(name, reason)
            else:
                yield self._implementation(name, PaddedModel, *batches, padded=True)
        loop, behind_ours = "packed_sdpa_loop", ("vilt_padded", f"bucketed_{POOLS[0]}")
        if not self.sizes.every_peer:
            yield from (Missing(name, LEFT_OUT) for name in (loop, *(f"{n}, our front ends" for n in behind_ours)))
            return
        attend = functools.partial(train_packed.PackedModel, attend=train_packed.sdpa_loop)
        yield self._implementation(loop, attend, *plain)
        encoder_only = functools.partial(PaddedModel, pads_inputs=False)
        for name in behind_ours:
            yield self._implementation(f"{name}, our front ends", encoder_only, *padded[name], padded=True)

    def check(self, direction: str, results: list[Step]) -> str | None:
        step = results[0]
        for index, (loss, reference) in enumerate(zip(step.losses, step.expected, strict=True)):
            if not abs(loss - reference) <= LOSS_TOLERANCE[self.dtype] * abs(reference):  # also catches NaN
                return f"wrong: the loss of batch {index} is {loss:.7f}, the packed model's {reference:.7f}"
        loss, found = step.gradients(*self.small)
        reference, wanted = self.reference
        if not abs(loss - reference) <= LOSS_TOLERANCE[self.dtype] * abs(reference):
            return f"wrong: the loss of the small batch is {loss:.7f}, the reference's {reference:.7f}"
        error = relative_error(found, wanted)
        if not error <= GRADIENT_TOLERANCE[self.dtype]:
            return f"wrong: gradients have relative error {error:.1e}, allowed {GRADIENT_TOLERANCE[self.dtype]:.0e}"
        return None

    def work(self, direction: str) -> Work:
        raise NotImplementedError("train_step: work differs between implementations, each of which brings its own")

    @functools.cached_property
    def learner(self) -> Pretraining:
        return Pretraining(self.config, vocabulary(self.config.model.text.vocab_size)).to(self.device)

    @functools.cached_property
    def exact(self) -> Pretraining:
        """The packed model without autocast, on the same device.

        Nobody asks for its gradients: it holds no activations, which in fp32 would be twice those of what is timed.
        """
        learner = copy.deepcopy(self.learner)
        update.prepare_modules(learner, dataclasses.replace(self.config, checkpointing=True, compile=False))
        return learner

    @functools.cached_property
    def small(self) -> tuple[Batch, Prepared]:
        return self._made(self._small)

    @property
    def _small(self) -> np.ndarray:
        long = int(np.argsort(self.samples.lengths)[int(0.75 * len(self.samples.lengths))])
        return np.array([long, *(i for i in range(SMALL) if i != long)][:SMALL])

    @functools.cached_property
    def reference(self) -> tuple[float, list[Tensor]]:
        """Loss and gradients of the small batch in float64 by the reference of every operator."""
        config = dataclasses.replace(self.config, model=dataclasses.replace(self.config.model, impl="reference"))
        learner = Pretraining(config, self.learner.model.tokenizer).double().to(self.device)
        learner.load_state_dict(self.learner.state_dict())
        return gradients(learner, *self._made(self._small), nullcontext())

    def _packed_peers(self, plain, everything) -> Iterator[Implementation | Missing]:
        name = "packed_varlen_attn"
        reason = self.sizes.left_out.get(name) or train_packed.missing_varlen(self.device, self.dtype)
        attend = functools.partial(train_packed.PackedModel, attend=train_packed.varlen)
        yield Missing(name, reason) if reason else self._implementation(name, attend, plain, everything)
        reason = train_packed.missing_flex(self.device, self.dtype)
        if reason is None and not self.sizes.every_peer:
            reason = "compiles for minutes: among --shapes full"
        name = "packed_flex"
        if reason:
            yield Missing(name, reason)
            return
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention), torch.compile(create_block_mask)
        attend = functools.partial(train_packed.PackedModel, attend=train_packed.flex(*compiled))
        yield self._implementation(name, attend, plain, everything)

    def _implementation(self, name, make_model, timed, everything, *, padded=False, compiled=False) -> Implementation:
        """timed: sample numbers of the batches of a call; everything: of all batches that they stand for."""
        learner = copy.deepcopy(self.learner)  # drawing the weights of a large model anew takes seconds
        if make_model is not Model:
            learner.model = make_model(self.config.model, self.learner.model.tokenizer)
            learner.to(self.device).load_state_dict(self.learner.state_dict())
        update.prepare_modules(learner, dataclasses.replace(self.config, compile=compiled))
        batches = [self._made(chosen) for chosen in timed]
        known = [self._exactly(chosen, pair) for chosen, pair in zip(timed, batches, strict=True)]
        expected, flops = [loss for loss, _ in known], sum(flops for _, flops in known)
        tokens = sum(batch.layout.total_tokens for batch, _ in batches)
        extra: dict[str, Any] = {"slots_per_token": round(self._slots(everything) if padded else 1.0, 3)}
        step = Step(learner, batches, expected, self.config, padded, extra)
        work = Work(tokens, "tokens/s", 0, f"gemm_{self.dtype}", limit_amount=flops / 1e12)
        return Implementation(name, step, extra=extra, directions=("step",), work=work)

    def _exactly(self, chosen: np.ndarray, pair: tuple[Batch, Prepared]) -> tuple[float, float]:
        """Loss of a batch by the packed model without autocast, and FLOPs of a step on it; kept by its samples."""
        key = chosen.tobytes()
        if key not in self._known:
            with StepFlops(self.exact) as count:
                loss = float(self.exact(*pair)[0].detach())
            self._known[key] = loss, count.total
        return self._known[key]

    def _made(self, chosen: np.ndarray) -> tuple[Batch, Prepared]:
        """A batch and the objectives' draws for it, as the data thread of a run makes them."""
        batch = self.samples.batch(chosen, self.learner.model)
        every = [objective.config.every for objective in self.learner.objectives.values()]
        last = (self.config.steps - 1) // math.lcm(*every) * math.lcm(*every)  # a step at which all objectives count
        rng = np.random.default_rng([self.samples.seed, len(chosen), int(chosen[0])])
        prepared = self.learner.prepare(batch, rng, last)
        masked = prepared.masked and prepared.masked.to(self.device)  # a run does it in the step; the same for all
        return batch.to(self.device), dataclasses.replace(prepared, masked=masked)

    def _too_large(self, batches: list[np.ndarray]) -> str | None:
        """Why a padded layout of the largest of the batches cannot fit; None where it may, or nobody knows."""
        has = memory_gb(self.device)
        needs = self.sizes.slot_mb * max(self._slots_of(b) for b in batches) / 1e3 + HELD_GB
        if not self.sizes.slot_mb or has is None or needs <= has:
            return None
        return f"needs about {needs:.0f} GB, the GPU has {has:.0f}"

    def _slots_of(self, batch: np.ndarray) -> int:
        return len(batch) * self.samples.parts[batch].max(axis=0).sum()

    def _slots(self, batches: list[np.ndarray]) -> float:
        """Token slots of the padded encoder per real token, over the batches read in full."""
        slots = sum(self._slots_of(b) for b in batches)
        return float(slots / sum(self.samples.lengths[b].sum() for b in batches))


def memory_gb(device: torch.device) -> float | None:
    """What memory a GPU has; of a CPU nobody asks."""
    return torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[Deferred]:
    for case in cases(shapes, device.type):
        yield deferred(case, device, seed)


def build(case: Case, device: torch.device, seed: int, config: PretrainConfig | None = None) -> StepProblem:
    """config: instead of the preset's (tests)."""
    config = configs.preset(case.preset) if config is None else config
    dtype = DTYPES_USED[device.type][0]
    config = dataclasses.replace(config, batch_size=case.batch_size, device=device.type, precision=dtype)
    samples = Samples.draw(case.workload, config.model, max(POOLS) * case.batch_size, seed)
    return StepProblem(case.name, dtype, config, samples, case, device)


def deferred(case: Case, device: torch.device, seed: int) -> Deferred:
    """Built when its turn comes, and let go of behind it: a model and its batches take gigabytes."""
    return Deferred("train_step", case.name, DTYPES_USED[device.type][0], ("step",), lambda: build(case, device, seed))


def gradients(
    learner: Pretraining, batch: Batch, prepared: Prepared, precision: AbstractContextManager
) -> tuple[float, list[Tensor]]:
    """Loss, and gradients of all parameters (float64), zero where there is none."""
    learner.train()
    with precision:
        loss, _ = learner(batch, prepared)
    found = torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True)
    zeros = (torch.zeros_like(parameter) for parameter in learner.parameters())
    found = [zero if gradient is None else gradient for gradient, zero in zip(found, zeros, strict=True)]
    return float(loss.detach()), [gradient.double() for gradient in found]


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """RMS of the difference over RMS of what is wanted, all parameters together."""
    difference = sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))
    return math.sqrt(difference / sum(b.square().sum() for b in wanted))
