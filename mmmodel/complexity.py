"""What a configuration costs before anything is trained: parameters, FLOPs and memory, part by part.

B samples in a step, T tokens, E width, F mlp width, H heads, D = E / H, P common width, V vocabulary, K hidden tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.table import Table
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmmodel import limits
from mmmodel.configs import ConfigError, ModelConfig, PretrainConfig
from mmmodel.frontends import special_names
from mmmodel.frontends.audio import HOP, SAMPLE_RATE, STRIDE
from mmmodel.frontends.image import CELL
from mmmodel.objectives.matching import named_pairs
from mmmodel.pretraining import Pretraining, check_vocabulary
from mmmodel.progress import Console

FLOAT = 4  # bytes; under bf16 autocast activations take between half of this and all of it
STATE = 4 * FLOAT  # bytes per parameter: weight, gradient and AdamW's two averages


@dataclass(frozen=True)
class SampleShape:
    """One sample that has every modality: word ids, image cells (rows, cols), mel frames; 0 or (0, 0): it lacks it."""

    text: int
    image: tuple[int, int]
    audio: int

    @classmethod
    def longest(cls, config: ModelConfig) -> SampleShape:
        """What no sample exceeds: the bound that a run must fit in."""
        limits.check(config, "config", "model.")
        rows = math.isqrt(config.image.max_tokens)
        return cls(
            text=config.text.max_tokens,
            image=(rows, config.image.max_tokens // rows),
            audio=int(config.audio.max_seconds * SAMPLE_RATE / HOP),
        )

    @property
    def cells(self) -> int:
        return self.image[0] * self.image[1]

    def tokens(self, name: str) -> int:
        """Packed tokens of a modality, its special token included ([CLS] is among the word ids)."""
        if name == "text":
            return self.text
        if name == "image":
            return self.cells + 1 if self.cells else 0
        return -(-self.audio // STRIDE) + 1 if name == "audio" and self.audio else 0


@dataclass
class Cost:
    """Of one part, over one training step; None: not known."""

    part: str
    parameters: int = 0
    frozen: int = 0  # of the parameters, those that do not learn
    forward: float | None = 0.0  # FLOPs
    backward: float | None = 0.0
    saved: float | None = 0.0  # bytes kept from the forward pass for the backward pass


@dataclass
class Complexity:
    config: PretrainConfig
    shape: SampleShape
    costs: list[Cost] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(cost.parameters for cost in self.costs)

    @property
    def forward(self) -> float:
        return sum(cost.forward or 0 for cost in self.costs)

    @property
    def step(self) -> float:
        """FLOPs of forward and backward."""
        return sum((cost.forward or 0) + (cost.backward or 0) for cost in self.costs)

    @property
    def state_bytes(self) -> int:
        return STATE * self.parameters - (STATE - FLOAT) * sum(cost.frozen for cost in self.costs)

    @property
    def saved_bytes(self) -> float:
        return sum(cost.saved or 0 for cost in self.costs)


def complexity(config: PretrainConfig, shape: SampleShape | None = None) -> Complexity:
    """The cost of a step on B samples of this shape, by default the longest there can be, with every objective.

    Parameters are exact where the tokenizer has vocab_size ids: a small corpus may end below, a language model's gets
    the special tokens that it lacks.  FLOPs count products, 2 per multiplication, as torch.utils.flop_counter does;
    front ends are counted on tensors without memory, encoder and heads by formula.  Memory is that of fp32 without
    checkpointing, the batch in one chunk.  Raises ConfigError for a shape beyond the configuration's limits.
    """
    limits.check(config, "config")
    check_vocabulary(config)
    shape = shape or SampleShape.longest(config.model)
    _check(config.model, shape)
    with torch.device("meta"):
        learner = Pretraining(config, _vocabulary(config.model.text.vocab_size, special_names(config.model.modalities)))
    report = Complexity(config, shape)
    counts, passes = _passes(config)
    for name, front_end in learner.model.front_ends.items():
        report.costs.append(_front_end(name, front_end, shape, counts.get(name, 1.0), config.batch_size))
    report.costs += _encoder(config, shape, passes, learner.model)
    for name, objective in learner.objectives.items():
        forward, backward, saved = _HEADS[name](config, shape) if name in _HEADS else (None, None, None)
        report.costs.append(Cost(f"objective: {name}", _size(objective), 0, forward, backward, saved))
    return report


def show(report: Complexity, console: Console | None = None) -> None:
    """Print the report as a table that fits 80 columns, and what it leaves out."""
    config, shape = report.config, report.shape
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    bound = "At most: a" if shape == SampleShape.longest(config.model) else "A"
    table.title = (
        f"{bound} step on {config.batch_size} samples of {shape.text} word pieces, {shape.image[0]} x {shape.image[1]} "
        f"image cells, {shape.audio * HOP / SAMPLE_RATE:g} s of sound"
    )
    table.add_column("part", no_wrap=True)
    for heading in ("parameters", "forward\nGFLOP", "step\nGFLOP", "kept for\nbackward, MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in report.costs:
        step = None if cost.forward is None else cost.forward + cost.backward
        figures = [_scaled(cost.forward, 1e9), _scaled(step, 1e9), _scaled(cost.saved, 1e6)]
        table.add_row(cost.part, f"{cost.parameters:,}", *figures)
    total = (_scaled(report.forward, 1e9), _scaled(report.step, 1e9), _scaled(report.saved_bytes, 1e6))
    table.add_row("total", f"{report.parameters:,}", *total, style="bold")
    console = console or Console()
    console.print(table)
    console.print(
        f"memory of a step in fp32: {report.state_bytes / 1e6:,.0f} MB of weights, gradients and AdamW averages + "
        f"{report.saved_bytes / 1e6:,.0f} MB kept for backward"
    )
    lighter = {
        "bf16": config.precision == "bf16",
        "chunk_tokens": config.chunk_tokens,
        "checkpointing": config.checkpointing,
    }
    if named := [name for name, used in lighter.items() if used]:
        console.print(f"less than that is kept for backward with this configuration's {' and '.join(named)}")
    if unknown := [cost.part for cost in report.costs if cost.forward is None]:
        console.print(f"not counted: FLOPs and memory of {', '.join(unknown)}")
    if absent := [name for name in config.model.modalities if not shape.tokens(name)]:
        console.print(f"no tokens in this sample: {', '.join(absent)}")


def _check(config: ModelConfig, shape: SampleShape) -> None:
    most = SampleShape.longest(config)
    for name, found, limit in (
        ("text", shape.text, most.text),
        ("image", shape.cells, config.image.max_tokens),
        ("audio", shape.audio, most.audio),
    ):
        if not 0 <= found <= limit:
            raise ConfigError(f"complexity: {name} has {found} tokens or frames, expected 0 to {limit}")


def _vocabulary(size: int, special: tuple[str, ...]) -> Tokenizer:
    """A tokenizer with the special tokens and as many ids as asked for."""
    names = [*special, *(f"piece{i}" for i in range(size - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _passes(config: PretrainConfig) -> tuple[dict[str, float], list[tuple[float, bool, tuple]]]:
    """How often each front end reads the batch; and the encoder's passes: (samples, isolated, modalities)."""
    objectives, names, batch = config.objectives, config.model.modalities, config.batch_size
    counts = dict.fromkeys(names, 1.0)
    passes: list[tuple[float, bool, tuple]] = []
    if objectives.contrastive.weight:
        passes.append((batch, True, names))  # each modality alone
    hidden = [name for name in names if getattr(objectives, f"masked_{name}", None) is not None]
    hidden = [name for name in hidden if getattr(objectives, f"masked_{name}").weight]
    if hidden:
        samples = _masked_samples(config)
        passes.append((samples, False, names))
        for name in hidden:
            counts[name] += samples / batch
    if objectives.matching.weight:
        for pair in named_pairs(config):
            passes.append((3 * _anchors(config), False, pair))
    return counts, passes


def _masked_samples(config: PretrainConfig) -> int:
    return max(1, round(config.objectives.masked_share * config.batch_size))


def _anchors(config: PretrainConfig) -> int:
    return max(1, round(config.objectives.matching.share * config.batch_size))


def _front_end(name: str, front_end: nn.Module, shape: SampleShape, reads: float, batch: int) -> Cost:
    frozen = sum(parameter.numel() for parameter in front_end.parameters() if not parameter.requires_grad)
    cost = Cost(f"front end: {name}", _size(front_end), frozen)
    foreign = hasattr(front_end, "project")  # a Hugging Face encoder, which may do anything
    if name == "text" and not foreign:  # ids; the table belongs to the embedding
        return cost
    if name not in _FEATURES or foreign:
        cost.forward = cost.backward = cost.saved = None
        return cost
    if not shape.tokens(name):
        return cost
    feature = _FEATURES[name](front_end, shape)
    inputs = tuple(tensor.to("meta") for tensor in front_end.collate([feature]))
    saved = SavedBytes(front_end)
    with saved, FlopCounterMode(display=False) as forward:
        stream = front_end(*inputs)
    with FlopCounterMode(display=False) as backward:
        stream.sum().backward()
    times = reads * batch  # nothing is padded: a batch costs what its samples cost
    cost.forward = times * forward.get_total_flops()
    cost.backward = times * backward.get_total_flops()
    cost.saved = times * (saved.total + FLOAT * stream.numel())  # the embedding keeps the stream itself
    return cost


_FEATURES: dict[str, Callable[[nn.Module, SampleShape], np.ndarray]] = {
    "image": lambda front_end, shape: np.zeros((3, CELL * shape.image[0], CELL * shape.image[1]), np.uint8),
    "audio": lambda front_end, shape: np.zeros((shape.audio, front_end.mels), np.float16),
}


def _encoder(config: PretrainConfig, shape: SampleShape, passes: list, model: nn.Module) -> list[Cost]:
    """Embedding, then linear maps and attention of all blocks, over all passes."""
    c = config.model
    width, hidden, layers = c.width, c.mlp_width, c.layers
    tokens = pairs = 0.0
    for samples, isolated, names in passes:
        lengths = [shape.tokens(name) for name in names]
        tokens += samples * sum(lengths)
        pairs += samples * (sum(n * n for n in lengths) if isolated else sum(lengths) ** 2)
    linear = 2 * tokens * layers * (4 * width * width + 2 * width * hidden)
    products = 4 * pairs * width * layers  # q k^T and the sum of v, D each per head
    # Kept per token and block: inputs of two norms and four linear maps (the second's is attention's output), q, k, v,
    # the GELU's input, four norm statistics and a log-sum per head; the first block has no norm before attention.
    block = 8 * width + 2 * hidden + 4 + c.heads
    kept = layers * block - width + 2 * width + 4
    blocks = _size(model.blocks) + _size(model.norm)
    return [
        Cost("embedding", _size(model.embedding)),
        Cost("encoder: linear maps", blocks, 0, linear, 2 * linear, FLOAT * tokens * kept),
        Cost("encoder: attention", 0, 0, products, 2.5 * products, 0.0),
    ]


def _contrastive(config: PretrainConfig, shape: SampleShape) -> tuple[float, float, float]:
    """All M maps of every segment's mean, then products of the points of each pair of modalities."""
    c, batch = config.model, config.batch_size
    present = [name for name in c.modalities if shape.tokens(name)]
    segments = batch * len(present)
    kinds = len(present) * (len(present) - 1) / 2
    forward = 2 * segments * len(c.modalities) * c.width * c.embed_width + 2 * kinds * batch * batch * c.embed_width
    saved = segments * (c.width + (len(c.modalities) + 2) * c.embed_width) + kinds * 5 * batch * batch
    return forward, 2 * forward, FLOAT * saved


def _masked_text(config: PretrainConfig, shape: SampleShape) -> tuple[float, float, float]:
    c = config.model
    hidden = _hidden(config, "text", shape.text - 1)
    forward = 2 * hidden * (c.width * c.width + c.width * c.text.vocab_size)
    return forward, 2 * forward, FLOAT * hidden * (4 * c.width + c.text.vocab_size)


def _masked_cells(name: str) -> Callable:
    def cost(config: PretrainConfig, shape: SampleShape) -> tuple[float, float, float]:
        cells = shape.cells if name == "image" else shape.audio // STRIDE
        content = 48 if name == "image" else STRIDE * config.model.audio.mels
        hidden = _hidden(config, name, cells)
        forward = 2 * hidden * config.model.width * content
        return forward, 2 * forward, FLOAT * hidden * (config.model.width + 2 * content)

    return cost


def _meaning(config: PretrainConfig, shape: SampleShape) -> tuple[float, float, float]:
    """The map of every concept's vector, and its product with the points of each modality; concepts are as samples."""
    c, batch, teacher = config.model, config.batch_size, config.objectives.meaning.width
    kinds = sum(shape.tokens(name) > 0 for name in c.modalities)
    mapped, products = 2 * batch * teacher * c.embed_width, 2 * kinds * batch * batch * c.embed_width
    # The concepts' vectors are fixed: backward has the map's gradient alone.
    return (
        mapped + products,
        mapped + 2 * products,
        FLOAT * (batch * (teacher + 2 * c.embed_width) + kinds * 5 * batch * batch),
    )


def _matching(config: PretrainConfig, shape: SampleShape) -> tuple[float, float, float]:
    """The head on every pair; and, without a gradient, the products of all points, from which negatives are drawn."""
    pairs = 3 * _anchors(config) * len(named_pairs(config))
    c = config.model
    head = 2 * pairs * (3 * c.width * c.width + c.width)
    segments = config.batch_size * sum(shape.tokens(name) > 0 for name in c.modalities)
    scores = 2 * segments * segments * c.embed_width if config.objectives.contrastive.weight else 0
    return head + scores, 2 * head, FLOAT * pairs * 7 * c.width


_HEADS = {
    "contrastive": _contrastive,
    "masked_text": _masked_text,
    "masked_image": _masked_cells("image"),
    "masked_audio": _masked_cells("audio"),
    "meaning": _meaning,
    "matching": _matching,
}


def _hidden(config: PretrainConfig, name: str, length: int) -> int:
    """Hidden tokens of a batch."""
    share = getattr(config.objectives, f"masked_{name}").probability
    return _masked_samples(config) * max(1, round(length * share)) if length > 0 else 0


class SavedBytes:
    """Context manager; `total`: bytes of the distinct tensors that autograd keeps, without the module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self.kept: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)
        self.total = sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())
        self.kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.own:
            self.kept[key] = tensor  # held, so that its storage's address is not used again
        return tensor


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _scaled(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:,.2f}" if value < 100 * unit else f"{value / unit:,.0f}"
