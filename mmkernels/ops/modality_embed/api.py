"""modality_embed: what the user calls, with its checks.

T tokens, E width, M modalities, N_m rows of modality m's stream, V token ids, P position rows, A position axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmkernels import arguments, dispatch, tracing, transforms
from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed import op
from mmkernels.ops.modality_embed.inputs import Inputs, Options

NORMS = ("layernorm", "rmsnorm", None)
MAX_TABLES = 3  # the most axes that a layout has
_PLAIN = {*tracing.PLAIN_TENSORS, type(None)}
PositionTables = Tensor | Sequence[Tensor] | None


def modality_embed(
    streams: Sequence[Tensor | None],
    layout: PackedLayout,
    *,
    modality_weight: Tensor,
    token_weight: Tensor | None = None,
    position_weights: Sequence[PositionTables] | None = None,
    norm: str | None = "layernorm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """dropout(norm(row + modality_weight[m] + position rows)) for every token, packed: [T, E], in one pass.

    streams           per modality: floats [N_m, E]; or token ids [N_m], int32 or int64, looked up in token_weight; or
                      None (or anything empty) where the batch has no row of it
    layout            says which row each token is; special tokens come from token_weight too
    modality_weight   [M, E]
    token_weight      [V, E]
    position_weights  per modality: None, a table [P, E] read on the last position axis, or a tuple of k tables read on
                      the last k axes and summed.  An axis that the layout does not have counts as 0
    norm              "layernorm" over E with optional norm_weight [E] and norm_bias [E]; "rmsnorm" with optional
                      norm_weight; or None: the plain sum
    dropout_p         fraction of elements set to 0, the rest divided by 1 - dropout_p.  By Philox on (seed, offset,
                      token, column), seed and offset drawn from torch's generator of the device: one mask in forward
                      and backward, the same in every implementation, another in every call and every graph replay

    fp32, bf16 or fp16; streams may differ in dtype, and parameters from them (fp32 parameters, bf16 streams).  The
    result has the autocast dtype where autocast is on (fp64 stays), else what the float streams promote to, else that
    of the parameters.  Sums and statistics are in fp32.  First-order gradients, all deterministic.

    Raises ValueError for shapes and dtypes that do not fit, and for row counts and position tables that do not fit the
    layout (read on the host, without a sync).  An id outside the token table raises IndexError on CPU; on a GPU it is
    the caller's promise, asserted on the device in Triton's debug mode, and no row outside a table is read.  Under
    torch.compile what the layout asks for is not checked here; the C++ path still refuses to read outside its arrays.
    """
    check_options("modality_embed", norm, eps, dropout_p)
    if norm is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError("modality_embed: norm is None, but norm_weight or norm_bias is given")
    if norm == "rmsnorm" and norm_bias is not None:
        raise ValueError("modality_embed: norm is 'rmsnorm', which has no bias, but norm_bias is given")
    streams = arguments.as_list("modality_embed", "streams", streams, "one tensor or None per modality")
    if position_weights is not None:
        position_weights = arguments.as_list(
            "modality_embed", "position_weights", position_weights, "one table, tuple of tables or None per modality"
        )
        position_weights = [_tables_of(entry, m) for m, entry in enumerate(position_weights)]
    if impl in ("auto", "cpp"):
        found = _quick(
            streams, layout, modality_weight, token_weight, position_weights, norm, norm_weight, norm_bias, eps,
            dropout_p,
        )  # fmt: skip
        if found is not None:
            return found
    _check_types(streams, layout, modality_weight, token_weight, norm_weight, norm_bias)
    streams = _present(streams, modality_weight)
    tables, table_counts = _flatten(position_weights, len(streams))
    out_dtype = _check_tensors(streams, layout, modality_weight, token_weight, tables, norm_weight, norm_bias)
    device = modality_weight.device
    chosen = dispatch.resolve("modality_embed", impl, device=device, dtype=out_dtype)
    if not torch.compiler.is_compiling():
        _check_rows(streams, layout)
        _check_indices(streams, layout, token_weight, tables, table_counts)
    rng = torch.randint(2**63 - 1, (2,), device=device) if dropout_p > 0.0 else None
    inputs = Inputs(
        streams, modality_weight, token_weight, list(tables.values()), table_counts, norm_weight, norm_bias,
        layout.modality_ids, layout.source_rows, layout.positions, rng,
    )  # fmt: skip
    return op.modality_embed_fwd(inputs, Options(norm or "none", eps, dropout_p), out_dtype, chosen)[0]


def _quick(
    given, layout, modality_weight, token_weight, position_weights, norm, norm_weight, norm_bias, eps, dropout_p
) -> Tensor | None:
    """What C++ makes of a plain call on CPU tensors, unchecked before: it checks.  None where it cannot or will not.

    The caller goes on with all checks then, which say what is wrong.  On a short batch they would cost as much as the
    kernel.
    """
    if (
        dispatch.cpp_missing() is not None
        or type(layout) is not PackedLayout
        or type(modality_weight) not in tracing.PLAIN_TENSORS
        or torch.compiler.is_compiling()
        or not modality_weight.is_cpu  # not left to a refusal, which on a GPU would cost every call
        or transforms.active()
        or tracing.traced()
        or layout.segments is None
        or len(given) != layout.num_modalities
        or modality_weight.dtype is torch.float64
    ):
        return None
    try:
        if modality_weight.ndim != 2 or not modality_weight.shape[1]:
            return None
        tables, table_counts = [], [0] * len(given)
        if position_weights is not None:
            if len(position_weights) != len(given):
                return None
            for m, own in enumerate(position_weights):
                table_counts[m] = len(own)
                tables += own
        if not _PLAIN.issuperset(map(type, (*given, modality_weight, token_weight, *tables, norm_weight, norm_bias))):
            return None
        streams = []
        for stream, rows in zip(given, layout.stream_lengths, strict=True):
            if stream is None or (rows == 0 and stream.numel() == 0):
                stream = _without_rows(stream, modality_weight)
            if stream.shape[:1] != (rows,):
                return None
            streams.append(stream)
        out_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        rng = torch.randint(2**63 - 1, (2,), device="cpu") if dropout_p > 0.0 else None
        inputs = Inputs(
            streams, modality_weight, token_weight, tables, table_counts, norm_weight, norm_bias, layout.modality_ids,
            layout.source_rows, layout.positions, rng,
        )  # fmt: skip
        return op.plain_modality_embed_fwd(inputs, Options(norm or "none", eps, dropout_p), out_dtype, "cpp")[0]
    except RuntimeError:  # C++'s, and a nested tensor's that is asked for its shape
        return None


def check_options(function: str, norm, eps, dropout, dropout_name: str = "dropout_p") -> None:
    if norm not in NORMS:
        raise ValueError(f"{function}: norm is {norm!r}, expected 'layernorm', 'rmsnorm' or None")
    if not (arguments.is_finite(eps) and eps >= 0):
        raise ValueError(f"{function}: eps is {eps!r}, expected a finite number >= 0")
    if not arguments.is_dropout(dropout):
        raise ValueError(f"{function}: {dropout_name} is {dropout!r}, expected a number, 0 <= {dropout_name} < 1")


def _check_types(streams, layout, modality_weight, token_weight, norm_weight, norm_bias) -> None:
    if not isinstance(layout, PackedLayout):
        raise ValueError(f"modality_embed: layout is {type(layout).__name__}, expected PackedLayout")
    if not isinstance(modality_weight, Tensor):
        raise ValueError(f"modality_embed: modality_weight is {type(modality_weight).__name__}, expected a tensor")
    tracing.refuse_unstrided("modality_embed", "modality_weight", modality_weight)
    tracing.refuse_numberless("modality_embed", "modality_weight", modality_weight)
    if modality_weight.ndim != 2 or not modality_weight.shape[1]:
        raise ValueError(
            f"modality_embed: modality_weight is {tuple(modality_weight.shape)}, expected [M, E] with E at least 1"
        )
    if not modality_weight.shape[0] == len(streams) == layout.num_modalities:
        raise ValueError(
            f"modality_embed: modality_weight is {tuple(modality_weight.shape)} for {len(streams)} streams, expected "
            f"[M, E] and M streams with the layout's M = {layout.num_modalities}"
        )
    named = [(f"stream {m}", stream) for m, stream in enumerate(streams)]
    named += [("token_weight", token_weight), ("norm_weight", norm_weight), ("norm_bias", norm_bias)]
    for name, value in named:
        if not isinstance(value, Tensor | None):
            raise ValueError(f"modality_embed: {name} is {type(value).__name__}, expected a tensor or None")
        if value is not None:
            tracing.refuse_unstrided("modality_embed", name, value)
            tracing.refuse_numberless("modality_embed", name, value)


def _present(streams: Sequence[Tensor | None], modality_weight: Tensor) -> list[Tensor]:
    """Streams, with a float stream of no rows in place of each that is None or empty."""
    return [
        _without_rows(stream, modality_weight) if stream is None or stream.numel() == 0 else stream
        for stream in streams
    ]


def _without_rows(stream: Tensor | None, modality_weight: Tensor) -> Tensor:
    """[0, E] in the parameters' dtype; the stream itself where it is that in some dtype, for it may learn."""
    shape = (0, modality_weight.shape[-1])
    if stream is None or stream.shape != shape:
        return modality_weight.new_empty(shape)
    return stream if stream.dtype is modality_weight.dtype else stream.to(modality_weight.dtype)


def _flatten(
    position_weights: list[tuple[Tensor, ...]] | None, num_modalities: int
) -> tuple[dict[str, Tensor], list[int]]:
    """All tables in one order, by the names that errors give them, and how many each modality has."""
    if position_weights is None:
        return {}, [0] * num_modalities
    if len(position_weights) != num_modalities:
        raise ValueError(
            f"modality_embed: position_weights has {len(position_weights)} entries, expected one per stream: "
            f"{num_modalities}"
        )
    tables = {
        f"position_weights[{m}]" + (f"[{j}]" if len(own) > 1 else ""): table
        for m, own in enumerate(position_weights)
        for j, table in enumerate(own)
    }
    for name, table in tables.items():
        tracing.refuse_unstrided("modality_embed", name, table)
        tracing.refuse_numberless("modality_embed", name, table)
    return tables, [len(own) for own in position_weights]


def _tables_of(entry: PositionTables, m: int) -> tuple[Tensor, ...]:
    if entry is None or isinstance(entry, Tensor):
        return () if entry is None else (entry,)
    name = f"position_weights[{m}]"
    tables = tuple(arguments.as_list("modality_embed", name, entry, "a table, a tuple of tables or None"))
    if len(tables) > MAX_TABLES:
        raise ValueError(
            f"modality_embed: {name} has {len(tables)} tables, expected at most {MAX_TABLES}, the most axes that a "
            "layout has"
        )
    for table in tables:
        if not isinstance(table, Tensor):
            raise ValueError(f"modality_embed: {name} holds {type(table).__name__}, expected tensors")
    return tables


def _check_tensors(
    streams: list[Tensor],
    layout: PackedLayout,
    modality_weight: Tensor,
    token_weight: Tensor | None,
    tables: dict[str, Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> torch.dtype:
    """Checks shapes, dtypes and devices; the result's dtype.  Runs at every call: cheap where all is well."""
    width, device, own = modality_weight.shape[1], modality_weight.device, modality_weight.dtype
    if own not in arguments.FLOATS:
        raise ValueError(f"modality_embed: modality_weight is {own}, expected {arguments.FLOAT_NAMES}")

    def check(name: str, tensor: Tensor, fits: bool, shape: str) -> None:
        if not fits:
            raise ValueError(f"modality_embed: {name} is {tuple(tensor.shape)}, expected [{shape}{width}]")
        if tensor.dtype != own:
            raise ValueError(
                f"modality_embed: {name} is {tensor.dtype}, expected {own} like modality_weight: parameters have one "
                "dtype"
            )
        if tensor.device != device:
            raise ValueError(f"modality_embed: {name} is on {tensor.device}, expected {device} like modality_weight")

    if token_weight is not None:
        check("token_weight", token_weight, token_weight.ndim == 2 and token_weight.shape[1] == width, "rows, ")
    for name, table in tables.items():
        check(name, table, table.ndim == 2 and table.shape[1] == width, "rows, ")
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            check(name, vector, tuple(vector.shape) == (width,), "")
    if layout.device != device:
        raise ValueError(f"modality_embed: the layout is on {layout.device}, expected {device}; move it by layout.to")
    found = _check_streams(streams, width, device, token_weight is not None)
    found = own if found is None else found
    if (found == torch.float64) != (own == torch.float64):
        raise ValueError(f"modality_embed: streams are {found} and parameters {own}; float64 is for both or neither")
    if own == torch.float64 or device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return found  # as torch's own attention does, float64 stays under autocast
    return torch.get_autocast_dtype(device.type)


def _check_streams(streams: list[Tensor], width: int, device: torch.device, has_tokens: bool) -> torch.dtype | None:
    """What the float streams that have rows promote to, or None without one."""
    found = None
    for m, stream in enumerate(streams):
        dtype = stream.dtype
        if stream.is_floating_point():
            if stream.ndim != 2 or stream.shape[1] != width:
                raise ValueError(f"modality_embed: stream {m} is {tuple(stream.shape)}, expected [N, {width}]")
            if dtype not in arguments.FLOATS:
                raise ValueError(f"modality_embed: stream {m} is {dtype}, expected {arguments.FLOAT_NAMES}")
            if stream.shape[0]:
                found = dtype if found is None or found == dtype else torch.promote_types(found, dtype)
        elif stream.ndim != 1 or dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"modality_embed: stream {m} is {dtype} {tuple(stream.shape)}, expected floats [N, {width}] or "
                "int32 or int64 ids [N]"
            )
        elif not has_tokens:
            raise ValueError(f"modality_embed: stream {m} holds token ids, but token_weight is None")
        if stream.device != device:
            raise ValueError(
                f"modality_embed: stream {m} is on {stream.device}, expected {device} like modality_weight"
            )
    return found


def _check_rows(streams: list[Tensor], layout: PackedLayout) -> None:
    """Rows of the streams against those that the layout takes."""
    if layout.segments is None:
        # Device-side bounds: one stream of T rows in order is all that such a layout describes.
        rows = sum(s.shape[0] for s in streams)
        if len(streams) > 1 or rows != layout.total_tokens:
            raise ValueError(
                f"modality_embed: {len(streams)} streams with {rows} rows; a layout from cu_seqlens takes one of "
                f"its {layout.total_tokens} tokens. Use from_counts or from_segments for more"
            )
    else:
        for m, (stream, length) in enumerate(zip(streams, layout.stream_lengths, strict=True)):
            if stream.shape[0] != length:
                raise ValueError(f"modality_embed: stream {m} has {stream.shape[0]} rows, the layout takes {length}")


def _check_indices(
    streams, layout: PackedLayout, token_weight, tables: dict[str, Tensor], table_counts: list[int]
) -> None:
    """Ids and positions against the tables they index.  Reads host data only: never syncs."""
    rows = 0 if token_weight is None else token_weight.shape[0]
    for m, special in _present_special_tokens(layout):
        if token_weight is None:
            raise ValueError(f"modality_embed: modality {m} has special token {special}, but token_weight is None")
        if special >= rows:
            raise IndexError(f"modality_embed: special token {special} of modality {m}, token_weight has {rows} rows")
    for m, stream in enumerate(streams):
        if stream.ndim == 1 and stream.shape[0] and stream.device.type == "cpu" and tracing.readable(stream):
            tracing.refuse_freed("modality_embed", f"stream {m}", stream)
            with torch._C._DisableFuncTorch():
                low, high = (int(x) for x in transforms.beneath(stream).aminmax())
            if low < 0 or high >= rows:
                raise IndexError(
                    f"modality_embed: stream {m} has ids from {low} to {high}, token_weight has {rows} rows"
                )
    extents = _extents(layout) if tables else None
    if extents is None:
        return
    named = iter(tables.items())
    for m, count in enumerate(table_counts):
        for j in range(count):
            name, table = next(named)
            axis = layout.axes - count + j
            need = extents[m][axis] if axis >= 0 else int(max(extents[m]) > 0)
            if table.shape[0] < need:
                raise ValueError(f"modality_embed: {name} has {table.shape[0]} rows, the layout needs {need}")


def _present_special_tokens(layout: PackedLayout) -> list[tuple[int, int]]:
    """(modality, token id) of each special token that the layout holds."""
    if layout.segments is None or layout.special_tokens is None:
        return []
    found = layout.cache.get("present_special_tokens")
    if found is None:
        special = enumerate(layout.special_tokens)
        found = [(m, token) for m, token in special if token is not None and (layout.segments[:, 1] == m).any()]
        layout.cache["present_special_tokens"] = found
    return found


def _extents(layout: PackedLayout) -> list[list[int]] | None:
    """[M][A]: one more than the largest position of each modality on each axis, 0 where it is absent."""
    host = layout.host
    if host is None or host.segments is None:
        return None
    extents = host.cache.get("position_extents")
    return _extents_anew(host) if extents is None else extents


@tracing.host_code("modality_embed: what a layout asks of position tables is not looked at in a graph")
def _extents_anew(host: PackedLayout) -> list[list[int]]:
    table = np.zeros((host.num_modalities, host.axes), np.int64)
    kept = host.segments[:, 2] > 0
    if kept.any():
        with torch._C._DisableFuncTorch():  # under torch.func what a layout makes has no data that numpy could read
            starts, positions = host.segment_cu_seqlens.numpy()[:-1][kept], host.positions.numpy()
        longest = np.maximum.reduceat(positions, starts, axis=1).T + 1  # [segments, A]
        np.maximum.at(table, host.segments[kept, 1], longest)
    extents = host.cache["position_extents"] = table.tolist()
    return extents
