"""What every implementation of modality_embed is given, in the schema's order.   T tokens, E width, M modalities."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels import tracing

NORM_CODES = {"none": 0, "layernorm": 1, "rmsnorm": 2}  # in the Triton kernels, and enum Norm of csrc


class Inputs(NamedTuple):
    streams: list[Tensor]  # [M]: floats [N_m, E], or token ids [N_m]
    modality_weight: Tensor  # [M, E]
    token_weight: Tensor | None  # [V, E]
    tables: list[Tensor]  # position tables [P, E], all modalities' in one list
    table_counts: list[int]  # [M]: how many of them each modality has
    norm_weight: Tensor | None  # [E]
    norm_bias: Tensor | None  # [E]
    modality_ids: Tensor  # uint8 [T]
    source_rows: Tensor  # int32 [T]
    positions: Tensor  # int32 [A, T], A axes
    rng: Tensor | None  # int64 [2]: seed and offset of dropout; None: no dropout

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient."""
        own = self.modality_weight, self.token_weight
        return *self.streams, *own, *self.tables, self.norm_weight, self.norm_bias

    def refuse_freed(self) -> None:
        """ValueError where the storage of one was freed, which torch's kernels would read."""
        names = [f"stream {m}" for m in range(len(self.streams))]
        names += ["modality_weight", "token_weight", *["a position table"] * len(self.tables)]
        for name, leaf in zip((*names, "norm_weight", "norm_bias"), self.leaves, strict=True):
            if leaf is not None:
                tracing.refuse_freed("modality_embed", name, leaf)


class Options(NamedTuple):
    norm: str  # "none", "layernorm" or "rmsnorm"
    eps: float
    dropout_p: float

    @property
    def normed(self) -> bool:
        return self.norm != "none"

    @property
    def centred(self) -> bool:
        return self.norm == "layernorm"
