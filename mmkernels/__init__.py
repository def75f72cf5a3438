"""Fused attention and modality embedding for packed text, image and audio.

    layout = PackedLayout.from_counts([[5, 12], [3, 0]])  # two samples: 5 text and 12 image tokens; 3 text tokens
    qkv = torch.randn(layout.total_tokens, 3, 8, 64)  # [T, 3, heads, head_dim], no padding
    out = attention(*qkv.unbind(1), layout=layout, mask=AttentionMask.isolated(2))  # [T, heads, head_dim]

who sits where     PackedLayout; plan_packs, PackStream, balance_ranks decide it
masks              AttentionMask, KeyIntervals; MaskPlan is what kernels read
operators          attention, attention_qkvpacked, prepare_attention, modality_embed and its module ModalityEmbedding
moving rows        pack, unpack, pad, unpad, gather_rows, segment_mean
what runs here     explain(), or `python -m mmkernels`; UnavailableError where nothing that was asked for can
drop-ins           mmkernels.compat, and mmkernels.modules for nn.MultiheadAttention
"""

from typing import TYPE_CHECKING

from mmkernels.dispatch import UnavailableError, explain
from mmkernels.layout import PackedLayout

if TYPE_CHECKING:  # _LAZY for editors and type checkers, which take "X as X" for a public name
    from mmkernels.masks import AttentionMask as AttentionMask
    from mmkernels.masks import KeyIntervals as KeyIntervals
    from mmkernels.masks import MaskPlan as MaskPlan
    from mmkernels.modules import ModalityEmbedding as ModalityEmbedding
    from mmkernels.ops.attention.api import attention as attention
    from mmkernels.ops.attention.api import attention_qkvpacked as attention_qkvpacked
    from mmkernels.ops.attention.api import prepare_attention as prepare_attention
    from mmkernels.ops.modality_embed.api import modality_embed as modality_embed
    from mmkernels.ops.packing.api import gather_rows as gather_rows
    from mmkernels.ops.packing.api import pack as pack
    from mmkernels.ops.packing.api import pad as pad
    from mmkernels.ops.packing.api import segment_mean as segment_mean
    from mmkernels.ops.packing.api import unpack as unpack
    from mmkernels.ops.packing.api import unpad as unpad
    from mmkernels.pack_stream import PackStream as PackStream
    from mmkernels.packs import PackPlan as PackPlan
    from mmkernels.packs import plan_packs as plan_packs
    from mmkernels.ranks import balance_ranks as balance_ranks

__all__ = ["PackedLayout", "UnavailableError", "explain"]
__version__ = "0.1.0"

# Operators register themselves with torch when first used, so that `import mmkernels` stays quick; and a module that
# this package had imported could not be run by `python -m mmkernels.masks` without a warning.
_LAZY = {
    "AttentionMask": "mmkernels.masks",
    "KeyIntervals": "mmkernels.masks",
    "MaskPlan": "mmkernels.masks",
    "attention": "mmkernels.ops.attention.api",
    "attention_qkvpacked": "mmkernels.ops.attention.api",
    "prepare_attention": "mmkernels.ops.attention.api",
    "ModalityEmbedding": "mmkernels.modules",
    "modality_embed": "mmkernels.ops.modality_embed.api",
    "pack": "mmkernels.ops.packing.api",
    "unpack": "mmkernels.ops.packing.api",
    "pad": "mmkernels.ops.packing.api",
    "unpad": "mmkernels.ops.packing.api",
    "gather_rows": "mmkernels.ops.packing.api",
    "segment_mean": "mmkernels.ops.packing.api",
    "plan_packs": "mmkernels.packs",
    "PackPlan": "mmkernels.packs",
    "PackStream": "mmkernels.pack_stream",
    "balance_ranks": "mmkernels.ranks",
}
__all__ = sorted({*__all__, *_LAZY})


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")
