"""The shared encoder: streams -> packed tokens -> blocks.   T tokens, E width, H heads, D = E / H.

Nothing is padded: every operator works on packed [T, E] and a PackedLayout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.modules import ModalityEmbedding
from mmkernels.ops.attention.api import MAX_HEAD_DIM, MIN_HEAD_DIM, attention_qkvpacked, prepare_attention
from mmmodel import frontends, limits, recompute
from mmmodel.batches import Batch, samples_of
from mmmodel.configs import ConfigError, ModelConfig

# streams, layout and mask of a batch, as `encode` takes them
View = tuple[Sequence[Tensor], PackedLayout, AttentionMask | None]
ACTIVATIONS = {"gelu_tanh": "tanh", "gelu": "none"}  # torch's names of the approximation


class Model(nn.Module):
    """Front ends, modality embedding and encoder; heads belong to the objectives."""

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__()
        limits.check(config, "config", "model.")
        self.config, self.tokenizer = config, tokenizer
        self.front_ends = frontends.build(config, tokenizer)
        self.special_tokens = frontends.special_tokens(self.front_ends, tokenizer)
        self.embedding = ModalityEmbedding(
            config.width,
            len(config.modalities),
            vocab_size=tokenizer.get_vocab_size(),
            positions=[front_end.positions for front_end in self.front_ends.values()],
            eps=config.norm_eps,
            impl=config.impl,
        )
        # The embedding ends in a norm, which the first pre-norm block reads as its own.
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()
        self.recompute = recompute.Recompute()  # what backward computes again to save memory; nothing

    def forward(self, batch: Batch, mask: AttentionMask | None = None) -> Tensor:
        """Packed hidden states [T, E] of a batch, on the model's device; rows in the order of batch.layout.segments.

        Without a mask each token sees its whole sample; with `isolated()` each modality itself alone.
        """
        return self.encode(self.streams(batch), batch.layout, mask)

    @property
    def token_table(self) -> Tensor:
        return self.embedding.token_weight

    def streams(self, batch: Batch) -> list[Tensor]:
        """Per modality the rows of all samples: token ids int64 [N_0] for text, [N_m, E] for the others."""
        return [front_end(*batch.inputs[name]) for name, front_end in self.front_ends.items()]

    def encode(self, streams: Sequence[Tensor], layout: PackedLayout, mask: AttentionMask | None = None) -> Tensor:
        """`forward`, from streams that are there already."""
        x = self.embedding(streams, layout)
        if mask == self.isolated() and (apart := segments_apart(layout)) is not None:
            layout, mask = apart, None
        return self.through_blocks(x, layout, mask)

    def encode_views(self, views: Sequence[View]) -> list[Tensor]:
        """encode of each (streams, layout, mask): in one pass where samples alone can say who sees whom.

        A pass is some five hundred operators of base, whatever its length, and one of more rows fills a GPU better.
        """
        samples = [samples_apart(layout, isolated=mask == self.isolated()) for _, layout, mask in views]
        if None in samples or any(mask not in (None, self.isolated()) for _, _, mask in views):
            return [self.encode(*view) for view in views]
        embedded = [self.embedding(streams, layout) for streams, layout, _ in views]
        joined = _of_samples([sample for of_view in samples for sample in of_view], views[0][1])
        states = self.through_blocks(torch.cat(embedded), joined, None)
        return list(states.split([len(x) for x in embedded]))

    def through_blocks(self, x: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
        """Embedded rows [T, E] to hidden states."""
        return self.norm(recompute.run(self.blocks, x, layout, mask, self.recompute))

    def computed_rows(self, batch: Batch) -> dict[str, int]:
        """Rows that each front end computes for a batch, gaps between clips included."""
        return {name: front_end.computed_rows(*batch.inputs[name]) for name, front_end in self.front_ends.items()}

    def isolated(self) -> AttentionMask:
        """Each modality as if it were alone: three unimodal encoders in one pass."""
        return AttentionMask.isolated(len(self.config.modalities))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), both on packed [T, E].

    norm "post" is BERT's order, norm(x + attention(x)), then norm(x + mlp(x)), so that its weights can be loaded.
    """

    def __init__(self, config: ModelConfig, *, first: bool) -> None:
        super().__init__()
        width = config.width
        if width % config.heads:
            raise ConfigError(f"model: width is {width}, expected a multiple of heads, {config.heads}")
        if not MIN_HEAD_DIM <= width // config.heads <= MAX_HEAD_DIM:
            raise ConfigError(
                f"model: width is {width}, expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM} times heads, {config.heads}"
            )
        self.heads, self.impl = config.heads, config.impl
        self.post, self.approximate = config.norm == "post", ACTIVATIONS[config.activation]
        identity = first and not self.post
        self.norm_attention = nn.Identity() if identity else nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=config.norm_eps)
        self.up = nn.Linear(width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, width)
        # The sum of 2 * layers branches keeps the variance of one.
        for layer, std in (
            (self.qkv, width**-0.5),
            (self.up, width**-0.5),
            (self.out, width**-0.5 / math.sqrt(2 * config.layers)),
            (self.down, config.mlp_width**-0.5 / math.sqrt(2 * config.layers)),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
        # one projection, viewed [T, 3, H, D]: the kernels take strided q, k, v and write one gradient, without a copy
        qkv = self.project(x).view(x.shape[0], 3, self.heads, -1)
        return self.mix(x, attention_qkvpacked(qkv, layout=layout, mask=mask, impl=self.impl).flatten(1))

    def project(self, x: Tensor) -> Tensor:
        """q, k and v side by side, [T, 3 E]."""
        return self.qkv(x if self.post else self.norm_attention(x))

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block, given attention's result [T, E]."""
        x = x + self.out(attended)
        if self.post:
            x = self.norm_attention(x)
            return self.norm_mlp(x + self._mlp(x))
        return x + self._mlp(self.norm_mlp(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def segments_apart(layout: PackedLayout) -> PackedLayout | None:
    """The same tokens with every segment a sample of its own; None where a sample has two segments of one modality.

    For attention that is the isolated mask said otherwise: there is nothing left to mask, and a segment's tiles begin
    where it begins, so that each modality gets bit by bit what it gets alone.
    """
    if "segments_apart" not in layout.cache:
        rows = samples_apart(layout, isolated=True)
        layout.cache["segments_apart"] = None if rows is None else _of_samples(rows, layout)
    return layout.cache["segments_apart"]


def samples_apart(layout: PackedLayout, *, isolated: bool) -> list[list[tuple[int, int]]] | None:
    """(modality, length) of what sees itself whole: the samples, or with `isolated` each segment by itself.

    None where that is no answer: segments of one modality in one sample see each other, and of bounds that only a
    device knows there are no segments.
    """
    segments = layout.segments
    if segments is None or (isolated and len(np.unique(segments[:, :2], axis=0)) != len(segments)):
        return None
    samples = samples_of(layout)
    return [[segment] for sample in samples for segment in sample] if isolated else samples


def _of_samples(samples: list[list[tuple[int, int]]], like: PackedLayout) -> PackedLayout:
    """For attention alone: special tokens count in the lengths, and positions are forgotten."""
    return PackedLayout.from_segments(samples, num_modalities=like.num_modalities).to(like.device, non_blocking=True)


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Trainable parameters by top-level part, and "total"."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    return {**counts, "total": sum(p.numel() for p in module.parameters())}


def autocast(device: str, precision: str) -> torch.autocast:
    """What a training step's forward runs under.  bf16 has the range of fp32, so gradients need no scaling."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def check_impl(impl: str, device: torch.device | str, precision: str = "fp32") -> None:
    """Raises UnavailableError for an implementation that cannot run there, which the first batch would come to know.

    By attention's word: modality_embed asks for no more.
    """
    if impl == "auto":  # finds one anywhere
        return
    layout = PackedLayout.from_counts([[1]]).to(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    prepare_attention(layout, dtype=dtype, head_dim=MIN_HEAD_DIM, impl=impl)
