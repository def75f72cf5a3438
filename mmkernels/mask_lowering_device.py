"""AttentionMask to intervals, bits and token tiles where only device-side bounds are known: tensor code, no sync.

Tq queries, Tk keys, B samples, M modalities.  Shapes depend on Tq, Tk and the block shape alone, so a CUDA graph can
hold the lowering and be replayed with other bounds.  Equal to mask_lowering, which reads like the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import devices
from mmkernels.layout import PackedLayout
from mmkernels.mask_lowering import (
    check_bidirectional,
    host_interval,
    prefix_lengths,
    refuse_gap,
    refuse_interval,
    visible_bits,
)


def tables(layout: PackedLayout, k_layout: PackedLayout, mask) -> tuple[Tensor, Tensor]:
    """int32 [4, Tq]: kv_lo, kv_hi, q_bits, q_modality; int32 [4, Tk]: q_lo, q_hi, k_bits, k_modality."""
    lo, hi = _intervals(layout, k_layout, mask)
    keys = torch.arange(k_layout.total_tokens, device=lo.device, dtype=lo.dtype)
    q_hi = torch.searchsorted(lo, keys, right=True)
    q_lo = torch.minimum(torch.searchsorted(hi, keys, right=True), q_hi)
    q_modality, k_modality = layout.modality_ids.long(), k_layout.modality_ids.long()
    # Numbers in kernel arguments, not a table from the host: a graph capture must not copy from pageable memory.
    q_bits = torch.zeros_like(q_modality)
    for m, seen in enumerate(visible_bits(mask, layout.num_modalities, k_layout.num_modalities).tolist()):
        q_bits = torch.where(q_modality == m, seen, q_bits)
    k_bits = torch.ones_like(k_modality) << k_modality
    q_table = torch.stack([lo, hi, q_bits, q_modality]).to(torch.int32)
    k_table = torch.stack([q_lo, q_hi, k_bits, k_modality]).to(torch.int32)
    return q_table, k_table


def token_tiles(
    row_table: Tensor, col_table: Tensor, block_rows: int, block_cols: int, *, rows: str, has_visible: bool
) -> tuple[Tensor, Tensor]:
    """Tiles int32 [n, 4] and spans int32 [3 n, 3] of TileSchedule: per tile the blocks before, inside and after the
    columns that every row sees.  The inside is unmasked where modalities allow it; blocks that only modality bits hide
    are visited, masked.
    """
    lo, hi, row_bits, _ = (t.long() for t in row_table.unbind(0))
    col_bits = col_table[2].long()
    num_rows, num_cols, device = lo.numel(), col_bits.numel(), lo.device
    n = -(-num_rows // block_rows)
    first = torch.arange(n, device=device) * block_rows
    last = (first + block_rows - 1).clamp(max=num_rows - 1)
    seen_from, seen_to = lo[first], hi[last]
    begin = seen_from // block_cols * block_cols
    end = (-(-seen_to // block_cols) * block_cols).clamp(max=num_cols)
    end = torch.where(seen_to > seen_from, end, begin)
    full_from = -(-lo[last] // block_cols) * block_cols
    full_to = hi[first] // block_cols * block_cols  # whole blocks only
    if rows == "key":  # a short tile of keys has masked spans only
        full_to = torch.where(last - first + 1 == block_rows, full_to, 0)
    empty = full_to <= full_from
    full_from = torch.where(empty, begin, full_from)
    full_to = torch.where(empty, begin, full_to)
    masked = torch.zeros_like(first)
    if has_visible:
        masked = _bits_hide(row_bits, col_bits, first, full_from, full_to, block_rows, rows).long()
    one = torch.ones_like(first)
    spans = torch.stack(
        [
            torch.stack([begin, full_from, one], 1),
            torch.stack([full_from, full_to, masked], 1),
            torch.stack([full_to, end, one], 1),
        ],
        1,
    )
    index = torch.arange(n, device=device) * 3
    tiles = torch.stack([first, last + 1, index, index + 3], 1)
    return tiles.to(torch.int32), spans.reshape(-1, 3).to(torch.int32)


def _bits_hide(row_bits, col_bits, first, col_from, col_to, block_rows: int, rows: str) -> Tensor:
    """bool [n]: some query of the tile does not see the modality of some key in columns [col_from, col_to)."""
    shifts = torch.arange(32, device=row_bits.device).unsqueeze(1)

    def has(bits: Tensor) -> Tensor:  # bool [32, length]
        return ((bits.unsqueeze(0) >> shifts) & 1).bool()

    keys, queries = (row_bits, col_bits) if rows == "key" else (col_bits, row_bits)
    row_flag, col_flag = (has(keys), ~has(queries)) if rows == "key" else (~has(queries), has(keys))
    # Prefix sums over columns answer "is there one in this range"; padding completes the last tile's rows.
    before = torch.nn.functional.pad(col_flag.int().cumsum(1), (1, 0))
    in_cols = before[:, col_to] > before[:, col_from]
    padded = torch.nn.functional.pad(row_flag, (0, first.numel() * block_rows - row_bits.numel()))
    in_rows = padded.view(32, first.numel(), block_rows).any(2)
    return (in_rows & in_cols).any(0)


def _intervals(layout: PackedLayout, k_layout: PackedLayout, mask) -> tuple[Tensor, Tensor]:
    """kv_lo and kv_hi [Tq] of the mask without its modality visibility; mask_lowering._intervals in tensors."""
    device = layout.device
    cu_q, cu_k = layout.cu_seqlens.long(), k_layout.cu_seqlens.long()
    token = torch.arange(layout.total_tokens, device=device)
    sample = torch.searchsorted(cu_q, token, right=True) - 1
    start, stop = cu_k[sample], cu_k[sample + 1]
    own = token - cu_q[sample] + start
    if mask.align == "bottom_right":
        own = own + (cu_k.diff() - cu_q.diff())[sample]
    left, right = mask.window
    lo, hi = start, stop
    if mask.causal:
        segment_lo, segment_hi, prefix_hi = own, own + 1, start
        if mask.bidirectional:
            check_bidirectional(mask, layout.num_modalities)
            segment_lo, segment_hi = _segments(layout, mask.bidirectional, own)
        if mask.prefix is not None:
            lengths = prefix_lengths(mask.prefix, layout.num_samples)
            if len(set(mask.prefix)) == 1:
                prefix_hi = start + mask.prefix[0]  # a number in the kernel's arguments, which a captured graph keeps
            else:
                lengths = torch.from_numpy(lengths)
                prefix_hi = start + devices.sent("AttentionMask: prefix lengths", lengths, device)[sample]
        hi = torch.maximum(torch.maximum(own + 1, segment_hi), prefix_hi)
        if mask.window_scope == "causal":
            if left >= 0:
                shortest = min((n for n in mask.prefix or () if n > 0), default=layout.max_seqlen)
                if layout.max_seqlen - 1 - left > shortest:
                    refuse_gap("may begin, as far as the host knows the bounds,")
                lo = torch.maximum(lo, torch.minimum(own - left, segment_lo))
                lo = torch.where(prefix_hi > start, start, lo)
            left = right = -1
    if left >= 0:
        lo = torch.maximum(lo, own - left)
    if right >= 0:
        hi = torch.minimum(hi, own + right + 1)
    if mask.intervals is not None:
        given_lo, given_hi = _given(mask.intervals, layout, k_layout)
        lo, hi = torch.maximum(lo, start + given_lo), torch.minimum(hi, start + given_hi)
    lo, hi = torch.clamp(lo, start, stop), torch.clamp(hi, start, stop)
    return lo, torch.maximum(lo, hi)


def _given(intervals, layout: PackedLayout, k_layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Both bounds, int64 [Tq].  Their values stay unread, so that falling ones pass."""
    bounds = []
    for name, value in (("lo", intervals.lo), ("hi", intervals.hi)):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
            if value.shape != (layout.total_tokens,) or not whole:
                refuse_interval(name, value, layout.total_tokens)
            bounds.append(value.to(layout.device, torch.int64).clamp(0, k_layout.total_tokens))
        else:
            bound = torch.from_numpy(host_interval(name, value, layout.total_tokens, k_layout.total_tokens))
            bounds.append(devices.sent(f"AttentionMask: intervals.{name}", bound, layout.device))
    return bounds[0], bounds[1]


def _segments(layout: PackedLayout, modalities, own: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of each token's segment if its modality is among `modalities`, else of the token alone.

    Of bounds alone the layout knows no segments: a stretch of one modality in one sample is one to it.
    """
    ids, modality = layout.segment_ids, layout.modality_ids.long()
    begin, end = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)
    whole = torch.zeros_like(modality, dtype=torch.bool)
    for m in modalities:
        whole |= modality == m
    return torch.where(whole, begin, own), torch.where(whole, end, own + 1)
