"""Inputs for the modality_embed tests, and the two computations that results are judged by.

T tokens, E width, M modalities, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed import reference
from mmkernels.ops.modality_embed.api import modality_embed
from mmkernels.ops.modality_embed.dropout import keep_mask
from mmkernels.ops.modality_embed.inputs import Inputs as OperatorInputs
from mmkernels.ops.modality_embed.inputs import Options
from mmkernels.testing import poisoned_empty


@dataclass(frozen=True)
class Case:
    """samples: per sample (modality, length) as in PackedLayout.from_segments.  axes: position tables per modality."""

    name: str
    samples: list
    width: int
    axes: tuple[int, ...]
    ids: tuple[int, ...] = ()  # modalities whose stream holds token ids
    special: tuple | None = None
    vocab: int | None = None
    norm: str | None = "layernorm"
    weight: bool = True
    bias: bool = True
    absent_as_none: bool = True
    dropout_p: float = 0.0

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout.from_segments(self.samples, num_modalities=len(self.axes), special_tokens=self.special)


def ragged(seed: int, num_samples: int, kinds: str, longest: int = 12) -> list:
    """Interleaved segments.  kinds: per modality "p" plain, "g" grid, "v" video grid, "-" never there."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        parts = []
        for m in rng.permutation(len(kinds) * 2) % len(kinds):
            if kinds[m] == "-" or rng.random() < 0.3:
                continue
            size = {"p": 1, "g": 2, "v": 3}[kinds[m]]
            length = tuple(int(n) for n in rng.integers(1, longest // size + 1, size))
            parts.append((int(m), length[0] if size == 1 else length))
        samples.append(parts)
    return samples


DROPOUT_SEED = 7  # what torch's generator is set to before each call that drops out

MIXED = {"axes": (1, 2, 1), "ids": (0,), "special": (2, 1, None), "vocab": 9}

CASES = [
    # x + W_m and nothing else, one modality: the smallest form
    Case("plain", [[(0, 5)], [], [(0, 2)]], 8, (0,), norm=None),
    Case("plain of three", ragged(1, 4, "ppp"), 24, (0, 0, 0), norm=None),
    # odd widths have a vector tail; 769 also spills over a power of two
    Case("norm without parameters", ragged(2, 4, "pp"), 13, (0, 0), weight=False, bias=False),
    Case("norm weight only", ragged(3, 3, "pp"), 17, (1, 0), bias=False),
    Case("norm bias only", ragged(4, 3, "pp"), 31, (0, 1), weight=False),
    Case("everything", ragged(5, 5, "pgp"), 64, **MIXED),
    Case("everything, no norm", ragged(6, 5, "pgp"), 40, norm=None, **MIXED),
    Case("everything, 769 wide", ragged(7, 3, "pgp"), 769, **MIXED),
    Case("everything, rmsnorm", ragged(5, 5, "pgp"), 64, norm="rmsnorm", bias=False, **MIXED),
    Case("rmsnorm without weight", ragged(2, 4, "pp"), 13, (0, 1), norm="rmsnorm", weight=False, bias=False),
    # 37 columns: whole groups of four words, and one of which a single word counts
    Case("everything, dropout", ragged(5, 5, "pgp"), 37, dropout_p=0.3, **MIXED),
    Case("dropout alone", ragged(1, 4, "pp"), 96, (0, 0), norm=None, dropout_p=0.5),
    Case("rmsnorm and dropout", ragged(6, 5, "pgp"), 64, norm="rmsnorm", bias=False, dropout_p=0.1, **MIXED),
    # more rows than fit one chunk of the C++ backward, and ids that repeat hundreds of times
    Case("many rows", ragged(8, 60, "pgp", 30), 16, **MIXED),
    Case("video", ragged(9, 3, "pv"), 24, (1, 3), ids=(0,), vocab=5),
    Case(
        "eight modalities, three missing", ragged(10, 3, "pgp-p-p-"), 32, (1, 2, 0, 2, 1, 0, 0, 1), (0, 4, 5), vocab=6
    ),
    Case("missing as empty", ragged(11, 3, "p-p"), 16, (1, 2, 1), absent_as_none=False),
    # a batch without images has one position axis, but the image tables have two
    Case("grid tables, no grid", [[(0, 3)], [(0, 1), (1, 4)]], 16, (2, 3), special=(0, None), vocab=1),
    Case("one token", [[], [(1, 1)]], 16, (0, 1)),
    Case("only a special token", [[(1, 0)]], 16, (0, 1), special=(None, 3), vocab=4),
    Case("no token", [[], []], 16, (1, 2), ids=(0,), vocab=4),
]
BY_NAME = {case.name: case for case in CASES}
needs_cpp = pytest.mark.skipif(dispatch.cpp_missing() is not None, reason=str(dispatch.cpp_missing()))
IMPLS = ["reference", "torch", pytest.param("cpp", marks=needs_cpp)]


@dataclass
class Inputs:
    """Leaves of one call, and the gradient that comes back from above."""

    layout: PackedLayout
    streams: list[Tensor | None]
    modality_weight: Tensor
    token_weight: Tensor | None
    position_weights: list[tuple[Tensor, ...] | None]
    norm: str | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    grad_out: Tensor
    eps: float = 1e-5
    dropout_p: float = 0.0
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def arguments(self) -> dict:
        names = ("modality_weight", "token_weight", "position_weights", "norm", "norm_weight", "norm_bias", "eps")
        return {name: getattr(self, name) for name in (*names, "dropout_p")}

    def operator_arguments(self) -> tuple[OperatorInputs, Options]:
        """What the registered operator takes, with the rng that api.py draws after `seed_dropout`."""
        layout, width = self.layout, self.modality_weight.shape[1]
        tables = [tables or () for tables in self.position_weights]
        given = OperatorInputs(
            [self.modality_weight.new_empty(0, width) if s is None else s for s in self.streams],
            self.modality_weight,
            self.token_weight,
            [t for ts in tables for t in ts],
            [len(ts) for ts in tables],
            self.norm_weight,
            self.norm_bias,
            layout.modality_ids,
            layout.source_rows,
            layout.positions,
            drawn_rng() if self.dropout_p else None,
        )
        return given, Options(self.norm or "none", self.eps, self.dropout_p)

    def to(self, dtype: torch.dtype, params: torch.dtype | None = None) -> Inputs:
        """A copy with fresh leaves; ids stay."""
        params = params or dtype
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, tensor: Tensor | None, to: torch.dtype) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            leaves[name] = tensor.detach().to(to).clone().requires_grad_()
            return leaves[name]

        return Inputs(
            self.layout,
            [leaf(f"stream {m}", s, dtype) for m, s in enumerate(self.streams)],
            leaf("modality_weight", self.modality_weight, params),
            leaf("token_weight", self.token_weight, params),
            [
                None if tables is None else tuple(leaf(f"table {m}.{j}", t, params) for j, t in enumerate(tables))
                for m, tables in enumerate(self.position_weights)
            ],
            self.norm,
            leaf("norm_weight", self.norm_weight, params),
            leaf("norm_bias", self.norm_bias, params),
            self.grad_out.to(dtype),
            self.eps,
            self.dropout_p,
            leaves,
        )


def make(case: Case, dtype: torch.dtype, params: torch.dtype | None = None, seed: int = 0) -> Inputs:
    """Random inputs of a case, rounded to `dtype`."""
    g = torch.Generator().manual_seed(seed)
    layout, E = case.layout, case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    streams: list[Tensor | None] = []
    for m, rows in enumerate(layout.stream_lengths):
        if m in case.ids:
            streams.append(torch.randint(case.vocab, (rows,), generator=g))
        else:
            streams.append(None if rows == 0 and case.absent_as_none else normal(rows, E))
    longest = int(layout.positions.max()) + 1 if layout.total_tokens else 1
    normed = case.norm is not None
    return Inputs(
        layout,
        streams,
        normal(len(case.axes), E),
        None if case.vocab is None else normal(case.vocab, E),
        [tuple(normal(longest + j, E) for j in range(k)) if k else None for k in case.axes],
        case.norm,
        1 + 0.3 * normal(E) if normed and case.weight else None,
        normal(E) if normed and case.bias else None,
        normal(layout.total_tokens, E),
        dropout_p=case.dropout_p,
    ).to(dtype, params)


def seed_dropout() -> None:
    torch.manual_seed(DROPOUT_SEED)


def drawn_rng() -> Tensor:
    """What modality_embed draws after `seed_dropout`."""
    return torch.randint(2**63 - 1, (2,), generator=torch.Generator().manual_seed(DROPOUT_SEED))


def run(inputs: Inputs, impl: str) -> dict[str, Tensor]:
    """Result and gradients by one implementation, on poisoned fresh memory."""
    seed_dropout()
    with poisoned_empty():
        out = modality_embed(inputs.streams, inputs.layout, impl=impl, **inputs.arguments())
        grads = _gradients(out, inputs)
    return {"out": out.detach(), **grads}


def oracle(inputs: Inputs) -> dict[str, Tensor]:
    """float64, differentiated by torch: independent of every hand-written backward."""
    inputs = inputs.to(torch.float64)
    out, _, _ = reference.forward(*inputs.operator_arguments(), torch.float64)
    return {"out": out.detach(), **_gradients(out, inputs)}


def torch_same(inputs: Inputs) -> dict[str, Tensor]:
    """What one writes in PyTorch, all in the dtype of the streams: cat, index, add, F.layer_norm, autograd."""
    dtype = inputs.grad_out.dtype
    inputs = inputs.to(dtype, inputs.modality_weight.dtype)
    layout, width = inputs.layout, inputs.modality_weight.shape[1]
    cast = {name: leaf.to(dtype) for name, leaf in inputs.leaves.items()}
    rows, starts = [cast.get("token_weight", torch.zeros(0, width, dtype=dtype))], []
    for m, stream in enumerate(inputs.streams):
        starts.append(sum(len(r) for r in rows))
        if stream is not None:
            rows.append(cast[f"stream {m}"] if stream.is_floating_point() else cast["token_weight"][stream])
    modality, source = layout.modality_ids.long(), layout.source_rows.long()
    index = torch.where(source < 0, -(source + 1), source + torch.tensor(starts)[modality])
    x = torch.cat(rows)[index] + cast["modality_weight"][modality]
    for m, tables in enumerate(inputs.position_weights):
        tokens = (modality == m).nonzero().squeeze(1)
        for j in range(len(tables or ())):
            axis = layout.axes - len(tables) + j
            where = layout.positions[axis, tokens].long() if axis >= 0 else torch.zeros_like(tokens)
            x = x.index_add(0, tokens, cast[f"table {m}.{j}"][where])
    if inputs.norm == "rmsnorm":
        x = F.rms_norm(x, (width,), cast.get("norm_weight"), inputs.eps)
    elif inputs.norm is not None:
        x = F.layer_norm(x, (width,), cast.get("norm_weight"), cast.get("norm_bias"), inputs.eps)
    if inputs.dropout_p:
        keep = keep_mask(drawn_rng(), *x.shape, inputs.dropout_p)
        x = torch.where(keep, x / (1 - inputs.dropout_p), 0)
    return {"out": x.detach(), **_gradients(x, inputs)}


def _gradients(out: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    names = list(inputs.leaves)
    grads = torch.autograd.grad(
        out, [inputs.leaves[n] for n in names], inputs.grad_out.to(out.dtype), allow_unused=True
    )
    return {
        f"d {name}": torch.zeros_like(inputs.leaves[name]) if grad is None else grad
        for name, grad in zip(names, grads, strict=True)
    }
