"""Masked language modelling: text tokens are hidden and read back from the whole sample, image and sound included.

K hidden tokens, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows
from mmmodel.configs import PretrainConfig
from mmmodel.frontends.text import SPECIAL_TOKENS


@dataclass(frozen=True)
class MaskedInputs:
    layout: PackedLayout  # of the first samples of the batch
    lengths: tuple[int, ...]  # rows of each stream that they take
    ids: Tensor  # int64 text stream, masked
    rows: Tensor  # int64 [K], packed rows of the hidden tokens
    targets: Tensor  # int64 [K]

    def to(self, device: torch.device) -> MaskedInputs:
        if device.type == "cpu":
            return self
        ids, rows, targets = (t.to(device, non_blocking=True) for t in (self.ids, self.rows, self.targets))
        return MaskedInputs(self.layout.to(device, non_blocking=True), self.lengths, ids, rows, targets)


class MaskedText(nn.Module):
    """BERT's head on the hidden tokens alone; the decoder shares the token table.

    The first `share` of a batch is read a second time, jointly: its streams are prefixes, so nothing is copied.
    """

    def __init__(self, config: PretrainConfig, tokenizer) -> None:
        super().__init__()
        self.weight = config.mlm_weight
        self.share, self.probability = config.mlm_share, config.mask_probability
        self.text = config.model.modalities.index("text")
        self.mask_id, self.vocab_size = tokenizer.token_to_id("[MASK]"), tokenizer.get_vocab_size()
        width = config.model.width
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(self.vocab_size))

    def prepare(self, batch, rng: np.random.Generator) -> MaskedInputs:
        samples = batch.segments[: max(1, round(self.share * len(batch.segments)))]
        layout = PackedLayout.from_segments(
            samples, num_modalities=batch.layout.num_modalities, special_tokens=batch.special_tokens
        )
        captions = [shape for parts in samples for m, shape in parts if m == self.text]
        ids = batch.inputs["text"][0][: sum(captions)].numpy()
        masked, hidden = mask_text(
            ids, captions, rng, probability=self.probability, mask_id=self.mask_id, vocab_size=self.vocab_size
        )
        # packed row of each row of the text stream: its tokens stand in the packed order in the same order
        text_rows = np.flatnonzero((layout.modality_ids.numpy() == self.text) & (layout.source_rows.numpy() >= 0))
        return MaskedInputs(
            layout=layout,
            lengths=layout.stream_lengths,
            ids=torch.from_numpy(masked),
            rows=torch.from_numpy(text_rows[hidden]),
            targets=torch.from_numpy(ids[hidden]),
        )

    def forward(
        self, model, streams: Sequence[Tensor], batch, inputs: MaskedInputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not len(inputs.targets):  # no captions among these samples
            return 0 * self.bias.sum(), {}
        inputs = inputs.to(self.bias.device)
        streams = [stream[:n] for stream, n in zip(streams, inputs.lengths, strict=True)]
        streams[self.text] = inputs.ids
        packed = model.encode(streams, inputs.layout)
        return self.loss(gather_rows(packed, inputs.rows), inputs.targets, model.token_table)

    def loss(self, hidden: Tensor, targets: Tensor, token_table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [K, E], targets int64 [K] -> nats per hidden token."""
        hidden = self.norm(F.gelu(self.dense(hidden), approximate="tanh"))
        logits = F.linear(hidden, token_table, self.bias)
        return F.cross_entropy(logits, targets), {"accuracy": (logits.argmax(1) == targets).float().mean()}


def mask_text(
    ids: np.ndarray,
    lengths: Sequence[int],
    rng: np.random.Generator,
    *,
    probability: float,
    mask_id: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Masked copy of the stream `ids` and the rows that were hidden: at least one per caption, never its first, [CLS].

    Of the hidden tokens 80 % become [MASK], 10 % a random token, 10 % stay, as in BERT.
    """
    rows, start = [], 0
    for length in lengths:
        if length > 1:
            count = max(1, round((length - 1) * probability))
            rows.append(start + 1 + np.sort(rng.choice(length - 1, size=count, replace=False)))
        start += length
    hidden = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    draw = rng.random(len(hidden))
    masked = ids.copy()
    masked[hidden[draw < 0.8]] = mask_id
    swapped = hidden[(draw >= 0.8) & (draw < 0.9)]
    masked[swapped] = rng.integers(len(SPECIAL_TOKENS), vocab_size, size=len(swapped))
    return masked, hidden
