"""A training step on padded batches, the ViLT layout.   B samples, L slots of a sample, L_m of modality m, E width.

Every modality is padded to its longest in the batch and the padded modalities stand one after another, [B, L, E]; SDPA
gets the key padding as a mask.  Where modalities may not see one another each goes by itself, [B_m, L_m, E], only the
samples that have it: less work than a mask over all.  Pictures go through the CNN padded to the tallest and widest of
the batch, sound padded to the longest, as a user of ViLT would; the padding of sound is set to zero before each
convolution, or it would leak into what is real.  Same parameters and losses as ours; heads and losses see real tokens
only, which favours this peer, and so does that a batch is padded and its masks are made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmmodel.frontends.image import CELL, DEVIATION, MEAN
from mmmodel.model import Block, Model, View


class PaddedModel(Model):
    """Same parameters as Model, same packed results from encode, padded inside.  pads_inputs: the front ends too."""

    def __init__(self, config, tokenizer, *, pads_inputs: bool = True) -> None:
        super().__init__(config, tokenizer)
        if pads_inputs:
            for name, pad, forward in (("image", pad_images, images), ("audio", pad_clips, clips)):
                if name in self.front_ends:
                    _replace_forward(self.front_ends[name], pad, forward)

    def encode(self, streams: Sequence[Tensor], layout: PackedLayout, mask: AttentionMask | None = None) -> Tensor:
        isolated = mask == self.isolated()
        if mask is not None and not isolated:
            raise NotImplementedError(f"padded: mask is {mask}, this peer knows none and the isolated one")
        places = self._places(layout, isolated)
        results = [self._encode_group(streams, layout, group) for group in places.groups]
        return Gather.apply(torch.cat(results), places.rows)

    def encode_views(self, views: Sequence[View]) -> list[Tensor]:
        """Each padded to its own longest: together they would be padded to the longest of all."""
        return [self.encode(*view) for view in views]

    def _encode_group(self, streams, layout, group: Group) -> Tensor:
        """Padded states of the modalities of a group, flat [B L, E]."""
        own = self.embedding
        parts = [
            self._embedded(streams[m], layout, m, group.slots[m].to(streams[m].device), length, group.samples)
            for m, length in group.lengths.items()
        ]
        x = torch.cat(parts, dim=1)
        x = F.layer_norm(x, x.shape[-1:], own.norm_weight, own.norm_bias, own.eps)
        for block in self.blocks:
            x = padded_block(block, x, group.bias)
        return self.norm(x).flatten(0, 1)

    def _embedded(self, stream, layout, m: int, slots: Slots, length: int, samples: int) -> Tensor:
        """[B, L_m, E]: rows, special token, modality and positions of one modality, padding included."""
        own = self.embedding
        if stream.ndim == 1:
            ids = stream.new_zeros(samples * length).index_copy(0, slots.stream, stream).view(samples, length)
            x = F.embedding(ids, own.token_weight)
        else:
            x = Scatter.apply(stream, slots.stream, samples * length).view(samples, length, -1)
        x = x + own.modality_weight[m]
        special = None if layout.special_tokens is None else layout.special_tokens[m]
        if special is not None:  # its slot is 0 so far
            x = torch.cat([x[:, :1] + own.token_weight[special], x[:, 1:]], dim=1)
        tables = list(own.position_weights[m])
        if len(tables) == 1:
            return x + tables[0][:length]
        for table, index in zip(tables, slots.positions, strict=True):
            x = x + F.embedding(index, table)
        return x

    def _places(self, layout: PackedLayout, isolated: bool) -> Places:
        """Where the tokens of a layout stand when it is padded; kept on the layout, as a collator would send it."""
        kept = layout.cache.setdefault("padded peer", {})
        if isolated not in kept:
            kept[isolated] = find_places(layout, isolated, [len(t) for t in self.embedding.position_weights])
        return kept[isolated]


@dataclass(frozen=True)
class Slots:
    stream: Tensor  # int64 [N_m], slot of each row of the stream, in a flat [B L_m]
    positions: tuple[Tensor, ...]  # per position table int64 [B, L_m]; empty where there is one table

    def to(self, device) -> Slots:
        return Slots(self.stream.to(device), tuple(p.to(device) for p in self.positions))


@dataclass(frozen=True)
class Group:
    """Modalities that see one another."""

    samples: int
    lengths: dict[int, int]  # per modality L_m
    slots: dict[int, Slots]
    bias: Tensor  # [B, 1, 1, L], 0 at tokens, -inf at padding


@dataclass(frozen=True)
class Places:
    groups: list[Group]
    rows: Tensor  # int64 [T], where each packed token stands in the flat results of all groups


def find_places(layout: PackedLayout, isolated: bool, tables: Sequence[int]) -> Places:
    """tables: per modality, its number of position tables."""
    segments = layout.segments.astype(np.int64)
    positions, source_rows = layout.host.positions.numpy(), layout.host.source_rows.numpy()
    rows = np.zeros(layout.total_tokens, np.int64)
    present = [m for m in range(layout.num_modalities) if (segments[:, 1] == m).any()]
    groups, start = [], 0
    for members in [[m] for m in present] if isolated else [present]:
        samples = np.unique(segments[np.isin(segments[:, 1], members), 0])
        lengths = {m: int(segments[segments[:, 1] == m, 2].max()) for m in members}
        offset, total, slots = 0, sum(lengths.values()), {}
        real = np.zeros((len(samples), total), bool)
        for m, length in lengths.items():
            token, sample, slot = _tokens(layout, segments, m, samples)
            rows[token] = start + sample * total + offset + slot
            real[sample, offset + slot] = True
            # The rows of a stream stand in the packed sequence in the same order, special tokens between them.
            stream = torch.from_numpy((sample * length + slot)[source_rows[token] >= 0])
            grid = np.zeros((tables[m] if tables[m] > 1 else 0, len(samples), length), np.int64)
            grid[:, sample, slot] = positions[len(positions) - len(grid) :, token]
            slots[m] = Slots(stream, tuple(torch.from_numpy(grid))).to(layout.device)
            offset += length
        bias = torch.zeros(len(samples), 1, 1, total).masked_fill(~torch.from_numpy(real)[:, None, None], -torch.inf)
        groups.append(Group(len(samples), lengths, slots, bias.to(layout.device)))
        start += len(samples) * total
    return Places(groups, torch.from_numpy(rows).to(layout.device))


def _tokens(layout: PackedLayout, segments: np.ndarray, m: int, samples: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each token of modality m its place in the packed sequence, the number of its sample, and its slot in that."""
    own = segments[:, 1] == m
    if len(np.unique(segments[own, 0])) < own.sum():
        raise NotImplementedError("padded: a sample has two segments of one modality, expected at most one")
    counts = segments[own, 2]
    slot = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    first = layout.host.segment_cu_seqlens.numpy()[:-1][own]
    return np.repeat(first, counts) + slot, np.repeat(np.searchsorted(samples, segments[own, 0]), counts), slot


def padded_block(block: Block, x: Tensor, bias: Tensor) -> Tensor:
    """The block on [B, L, E], attention by SDPA."""
    batch, length, _ = x.shape
    q, k, v = block.project(x).view(batch, length, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    return block.mix(x, y.transpose(1, 2).flatten(2))


class Scatter(torch.autograd.Function):
    """Rows to their slots, zeros elsewhere; slots are distinct, so the gradient is a plain gather."""

    @staticmethod
    def forward(ctx, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Gather(torch.autograd.Function):
    """Scatter's inverse: torch's own index_select would add up the gradient row by row."""

    @staticmethod
    def forward(ctx, padded: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(padded)
        return padded.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


@dataclass(frozen=True)
class PaddedInputs:
    values: Tensor  # uint8 [B, 3, 16 rows, 16 cols] or float [B, mels, F]
    real: list[Tensor]  # bool, what is no padding: of the input of each convolution that would see it
    rows: Tensor  # int64 [N_m], the stream's rows in the flat output


def pad_images(order: Tensor, *chunks: Tensor) -> PaddedInputs:
    """All pictures of a batch in one tensor, from the front end's groups of equal shape; on the host."""
    device, order = order.device, order.cpu().numpy()
    pictures, starts, start = [], [], 0
    for chunk in chunks:
        for picture in chunk.cpu():
            pictures.append(picture)
            starts.append(start)
            start += picture.shape[1] * picture.shape[2] // CELL**2
    in_order, place = [], 0
    while place < len(order):  # the stream's next picture begins at order[place]
        in_order.append(pictures[int(np.searchsorted(starts, order[place], side="right")) - 1])
        place += in_order[-1].shape[1] * in_order[-1].shape[2] // CELL**2
    high, wide = max(p.shape[1] for p in in_order), max(p.shape[2] for p in in_order)
    values = torch.zeros(len(in_order), 3, high, wide, dtype=torch.uint8)
    real = torch.zeros(len(in_order), high // CELL, wide // CELL, dtype=torch.bool)
    for i, picture in enumerate(in_order):
        h, w = picture.shape[1:]
        values[i, :, :h, :w] = picture
        real[i, : h // CELL, : w // CELL] = True
    rows = real.flatten().nonzero().squeeze(1)
    return PaddedInputs(values.contiguous(memory_format=torch.channels_last).to(device), [], rows.to(device))


def images(front_end: nn.Module, padded: PaddedInputs) -> Tensor:
    # Nothing need be set to zero: a convolution of width 2 p + 1 and stride > p, on a size that the stride divides,
    # reads p places to the left and above, but none past the last on the right and below, where the padding is.
    x = padded.values.to(front_end.stages[0].conv.weight.dtype).sub_(MEAN).div_(DEVIATION)
    for stage in front_end.stages:
        x = stage(x)
    return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, padded.rows)


def pad_clips(frames: Tensor, half: Tensor, quarter: Tensor, order: Tensor) -> PaddedInputs:
    """All clips of a batch, [B, mels, F], from the front end's one row with gaps; on the host."""
    device = frames.device
    frames, half, order = frames.cpu(), half.cpu(), order.cpu().numpy()
    firsts = np.flatnonzero(np.diff(order, prepend=-2) != 1)  # between two clips there is a gap
    counts = np.diff(np.append(firsts, len(order)))
    steps = int(counts.max(initial=1))
    values = torch.zeros(len(firsts), frames.shape[1], 4 * steps)
    real = [torch.zeros(len(firsts), 1, 4 * steps // n, dtype=torch.bool) for n in (1, 2, 4)]
    for i, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        begin = int(order[first])
        halves = int(half[2 * begin : 2 * (begin + count)].sum())
        values[i, :, : 2 * halves] = frames[4 * begin : 4 * begin + 2 * halves].t()
        for mask, length in zip(real, (2 * halves, halves, int(count)), strict=True):
            mask[i, :, :length] = True
    rows = real[-1].flatten().nonzero().squeeze(1)
    return PaddedInputs(values.to(device), [mask.to(device) for mask in real], rows.to(device))


def clips(front_end: nn.Module, padded: PaddedInputs) -> Tensor:
    x = padded.values.to(front_end.convs[0].weight.dtype)
    for conv, norm, real in zip(front_end.convs, front_end.norms, padded.real, strict=True):
        x = conv(x * real).transpose(1, 2)
        x = F.gelu(norm(x), approximate="tanh").transpose(1, 2)
    return x.transpose(1, 2).flatten(0, 1).index_select(0, padded.rows)


def _replace_forward(front_end: nn.Module, pad: Callable[..., PaddedInputs], forward: Callable) -> None:
    """The front end takes its usual inputs, pads them when it first sees them, and computes on what is padded."""
    known: dict[int, tuple] = {}

    def padded_forward(*inputs: Tensor) -> Tensor:
        key = id(inputs[0])
        if key not in known:
            known[key] = inputs, (pad(*inputs) if len(inputs[-1]) else None)
        padded = known[key][1]
        return type(front_end).forward(front_end, *inputs) if padded is None else forward(front_end, padded)

    front_end.forward = padded_forward
