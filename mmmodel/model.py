"""The shared encoder: streams -> packed tokens -> blocks.   T tokens, E width, H heads, D = E / H.

Nothing is padded: every operator works on packed [T, E] and a PackedLayout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.modules import ModalityEmbedding
from mmkernels.ops.attention.api import attention_qkvpacked
from mmmodel import frontends, recompute
from mmmodel.batches import Batch
from mmmodel.configs import ConfigError, ModelConfig

ACTIVATIONS = {"gelu_tanh": "tanh", "gelu": "none"}  # torch's names of the approximation


class Model(nn.Module):
    """Front ends, modality embedding and encoder; heads belong to the objectives."""

    def __init__(self, config: ModelConfig, tokenizer) -> None:
        super().__init__()
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
        if config.norm not in ("pre", "post"):
            raise ConfigError(f"model: norm is {config.norm!r}, expected pre or post")
        # The embedding ends in a norm, which the first pre-norm block reads as its own.
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()
        self.recompute = recompute.Recompute()  # what backward computes again to save memory; nothing

    @property
    def token_table(self) -> Tensor:
        return self.embedding.token_weight

    def streams(self, batch: Batch) -> list[Tensor]:
        """Per modality the rows of all samples: token ids int64 [N_0] for text, [N_m, E] for the others."""
        return [front_end(*batch.inputs[name]) for name, front_end in self.front_ends.items()]

    def encode(self, streams: Sequence[Tensor], layout: PackedLayout, mask: AttentionMask | None = None) -> Tensor:
        """Packed hidden states [T, E].  Without a mask each token sees its whole sample."""
        x = self.embedding(streams, layout)
        if mask == self.isolated() and (apart := segments_apart(layout)) is not None:
            layout, mask = apart, None
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
        if config.activation not in ACTIVATIONS:
            raise ConfigError(f"model: activation is {config.activation!r}, expected {' or '.join(ACTIVATIONS)}")
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
        segments = layout.segments
        # Unknown where only bounds on a device are; segments of one modality in one sample see each other.
        apart = segments is not None and len(np.unique(segments[:, :2], axis=0)) == len(segments)
        rows = [[(modality, length)] for _, modality, length, _ in segments.tolist()] if apart else None
        made = apart and PackedLayout.from_segments(rows, num_modalities=layout.num_modalities)
        layout.cache["segments_apart"] = made.to(layout.device, non_blocking=True) if apart else None
    return layout.cache["segments_apart"]


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Trainable parameters by top-level part, and "total"."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    return {**counts, "total": sum(p.numel() for p in module.parameters())}
