"""Masked language modelling: text tokens are hidden and read back from the whole sample, image and sound included.

K hidden tokens, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.ops.packing.api import gather_rows
from mmmodel.configs import ObjectiveConfig, PretrainConfig
from mmmodel.features import Item
from mmmodel.frontends.text import special_ids
from mmmodel.objectives.hiding import draw_hidden
from mmmodel.objectives.views import Hidden, Views


class MaskedText(nn.Module):
    """loss = mean over hidden tokens t of -log softmax(W norm(gelu(A h_t + a)) + b)[id_t], W the token table.

    The head is BERT's (arXiv 1810.04805); which tokens are hidden is BERT's too, or SpanBERT's runs with span > 1.
    """

    hides = needs = "text"

    def __init__(self, config: PretrainConfig, model) -> None:
        super().__init__()
        self.config: ObjectiveConfig = config.objectives.masked_text
        tokenizer = model.tokenizer
        self.mask_id, self.special = tokenizer.token_to_id("[MASK]"), special_ids(tokenizer)
        self.vocab_size = tokenizer.get_vocab_size()
        width = config.model.width
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(self.vocab_size))

    def finds(self, items: Sequence[Item]) -> bool:
        return any(self.hides in item.rows for item in items)

    def hide(self, captions: Sequence[np.ndarray], front_end, rng: np.random.Generator) -> Hidden:
        """captions: ids of each, integers [n]."""
        lengths = [len(ids) for ids in captions]
        ids = np.concatenate([*captions, np.zeros(0, np.int32)]).astype(np.int64)
        masked, rows = mask_text(
            ids,
            lengths,
            rng,
            probability=self.config.probability,
            span=self.config.span,
            mask_id=self.mask_id,
            special=self.special,
            vocab_size=self.vocab_size,
        )
        return Hidden(np.split(masked, np.cumsum(lengths)[:-1]) if lengths else [], rows, ids[rows])

    def forward(self, views: Views, inputs: None) -> tuple[Tensor, dict[str, Tensor]]:
        masked = views.masked_batch
        targets = masked.targets["text"]
        if not len(targets):  # no captions among these samples
            return 0 * self.bias.sum(), {}
        return self.loss(gather_rows(views.masked, masked.packed_rows["text"]), targets, views.model.token_table)

    def loss(self, hidden: Tensor, targets: Tensor, token_table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [K, E], targets int64 [K], token_table [V, E] -> nats per hidden token."""
        hidden = self.norm(F.gelu(self.dense(hidden), approximate="tanh"))
        logits = F.linear(hidden, token_table, self.bias)
        return F.cross_entropy(logits, targets), {"accuracy": (logits.argmax(1) == targets).float().mean()}


def mask_text(
    ids: np.ndarray,
    lengths: Sequence[int],
    rng: np.random.Generator,
    *,
    probability: float,
    span: int,
    mask_id: int,
    special: np.ndarray,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Masked copy of the stream `ids` and the rows that were hidden: at least one per caption, never a special token.

    Of the hidden tokens 80 % become [MASK], 10 % a random token, 10 % stay, as in BERT: what stays is readable.
    """
    rows, start = [], 0
    for length in lengths:
        words = np.flatnonzero(~np.isin(ids[start : start + length], special))
        rows.append(start + words[draw_hidden(len(words), probability, span, rng)])
        start += length
    hidden = np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64)
    draw = rng.random(len(hidden))
    masked = ids.copy()
    masked[hidden[draw < 0.8]] = mask_id
    swapped = hidden[(draw >= 0.8) & (draw < 0.9)]
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    masked[swapped] = ordinary[rng.integers(len(ordinary), size=len(swapped))]
    return masked, hidden
