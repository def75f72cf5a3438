"""nn.Modules that hold parameters and call the operators.   T tokens, E width, M modalities, V token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmkernels.arguments import as_list, at_least_one, one_of
from mmkernels.dispatch import IMPLS
from mmkernels.layout import PackedLayout
from mmkernels.layout_tables import MAX_MODALITIES
from mmkernels.multihead import MultiheadAttention, replace_attention
from mmkernels.ops.modality_embed.api import MAX_TABLES, check_options, modality_embed

__all__ = ["ModalityEmbedding", "MultiheadAttention", "replace_attention"]

NAME = "ModalityEmbedding"
INIT_STD = 0.02


class ModalityEmbedding(nn.Module):
    """The input of a packed encoder: dropout(norm(row + modality_weight[m] + position rows)), [T, E], in one pass.

    width           E
    num_modalities  M
    vocab_size      V: rows of token_weight, for streams of token ids and for special tokens; None: no token table
    positions       per modality: None; P, a table over the last position axis; or (P_1, ..., P_k), one table for each
                    of the last k axes (rows, columns of an image), summed.  A modality with special tokens needs one
                    position more than its longest segment
    norm            "layernorm", "rmsnorm" or None
    bias            whether the layernorm has a bias
    dropout         fraction of the result that is set to 0 while training
    impl            which implementation runs; see mmkernels.explain()

    Parameters: modality_weight [M, E], token_weight [V, E], position_weights.{m}.{j} [P_j, E], norm_weight and
    norm_bias [E].  Tables start normal with std 0.02, the norm as the identity.

    Raises ValueError naming the argument that does not fit.
    """

    def __init__(
        self,
        width: int,
        num_modalities: int,
        *,
        vocab_size: int | None = None,
        positions: Sequence[int | Sequence[int] | None] | None = None,
        norm: str | None = "layernorm",
        bias: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width, num_modalities = at_least_one(NAME, "width", width), at_least_one(NAME, "num_modalities", num_modalities)
        if num_modalities > MAX_MODALITIES:
            raise ValueError(
                f"{NAME}: num_modalities is {num_modalities}, expected 1 to {MAX_MODALITIES}; the number of token ids "
                "is vocab_size"
            )
        if vocab_size is not None:
            vocab_size = at_least_one(NAME, "vocab_size", vocab_size, " or None")
        check_options(NAME, norm, eps, dropout, "dropout")
        one_of(NAME, "impl", impl, IMPLS)
        self.width, self.num_modalities, self.impl = width, num_modalities, impl
        self.norm, self.eps, self.dropout = norm, eps, dropout
        lengths = _table_rows(positions, num_modalities)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.modality_weight = table(num_modalities, width)
        self.token_weight = None if vocab_size is None else table(vocab_size, width)
        self.position_weights = nn.ModuleList(nn.ParameterList(table(n, width) for n in axes) for axes in lengths)
        self.norm_weight = None if norm is None else table(width)
        self.norm_bias = table(width) if norm == "layernorm" and bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name == "norm_weight":
                parameter.fill_(1.0)
            elif name == "norm_bias":
                parameter.zero_()
            else:
                parameter.normal_(std=INIT_STD)

    def forward(self, streams: Sequence[Tensor | None], layout: PackedLayout) -> Tensor:
        """Packed rows [T, E].  streams: per modality floats [N_m, E], token ids [N_m], or None where absent.

        Raises as `modality_embed` does.
        """
        return modality_embed(
            streams,
            layout,
            modality_weight=self.modality_weight,
            token_weight=self.token_weight,
            position_weights=[tuple(tables) for tables in self.position_weights],
            norm=self.norm,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        vocab = "none" if self.token_weight is None else self.token_weight.shape[0]
        positions = [tuple(table.shape[0] for table in tables) for tables in self.position_weights]
        return (
            f"{self.width}, {self.num_modalities}, vocab_size={vocab}, positions={positions}, norm={self.norm!r}, "
            f"bias={self.norm_bias is not None}, dropout={self.dropout}, eps={self.eps}"
        )


def _table_rows(positions, num_modalities: int) -> list[list[int]]:
    """Per modality the rows of each of its position tables."""
    if positions is None:
        return [[]] * num_modalities
    positions = as_list(NAME, "positions", positions, f"one entry for each of {num_modalities}")
    if len(positions) != num_modalities:
        raise ValueError(f"{NAME}: positions has {len(positions)} entries, expected one for each of {num_modalities}")
    found = []
    for m, entry in enumerate(positions):
        try:
            axes = [] if entry is None else list(entry)
        except TypeError:  # one number, as an array or a tensor too
            axes = [entry]
        if len(axes) > MAX_TABLES:
            raise ValueError(
                f"{NAME}: positions[{m}] has {len(axes)} tables, expected at most {MAX_TABLES}, the most axes that a "
                "layout has"
            )
        found.append([at_least_one(NAME, f"positions[{m}]", rows, " for each table, or None") for rows in axes])
    return found
