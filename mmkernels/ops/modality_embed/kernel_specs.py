"""What the inspector compiles: the modality_embed kernels at common widths, with typical argument types.

Three modalities: token ids with one position axis, images with two, audio with one.  Parameters are fp32, as under
autocast; `dtype` is that of the streams and the result.
"""

from __future__ import annotations

from mmkernels.kernel_spec import KernelSpec
from mmkernels.ops.modality_embed import configs
from mmkernels.ops.modality_embed.triton_backward import (
    modality_embed_bwd_rows_kernel,
    modality_embed_bwd_spans_kernel,
    modality_embed_bwd_tables_kernel,
)
from mmkernels.ops.modality_embed.triton_forward import modality_embed_fwd_kernel

WIDTHS = (64, 256, 512, 768, 1024, 2048)
TOKENS = 65536  # decides only how many tiles a backward program takes
_M, _AXES, _VOCABULARY = 3, 2, 32768
_STREAMS = (-2, 1, 1)
_TABLES = (0, 2, 3, -1, 1, -1)  # [q * M + m]: text 128 rows, image 32 + 32, audio 64
_ROWS_OF = (128, 32, 32, 64)
_FIRST = (0, 128, 160, 192, 256)
_PARAMETERS = ("modality_weight_ptr", "token_weight_ptr", "norm_weight_ptr", "norm_bias_ptr")
_FP32 = ("mean_ptr", "rstd_ptr", "means_ptr", "norm_partial_ptr", "modality_partial_ptr", "head_ptr", "tail_ptr")
_TYPES = {
    **dict.fromkeys((*_PARAMETERS, *_FP32), "*fp32"),
    **dict.fromkeys(("source_rows_ptr", "positions_ptr", "keys_ptr"), "*i32"),
    **dict.fromkeys(("T", "N", "E"), "i32"),
    **dict.fromkeys(("rng_ptr", "order_ptr"), "*i64"),
    **dict.fromkeys(("eps", "keep_scale"), "fp32"),
    "modality_ids_ptr": "*u8",
    "threshold": "i64",
    "sizes": ("i32",) * _M,
    "tables": ("*fp32",) * len(_ROWS_OF),
    "outs": ("*fp32",) * len(_FIRST),
}


def kernel_specs(arch: str) -> list[KernelSpec]:
    """Forward and the three backward kernels, per width and dtype; at one width with dropout and RMSNorm too."""
    specs = []
    for dtype in ("bf16", "fp32"):
        for width in WIDTHS:
            specs += _of_width(width, dtype)
        specs += _of_width(768, dtype, norm=2, dropout=True)
    columns, warps = configs.table_columns(768)
    spans = {"FIRST": _FIRST, "SUMMED": (1,) * len(_FIRST), "CHUNK": configs.CHUNK, "COLUMNS": columns}
    shown = {"width": 768, "rows": configs.CHUNK}
    specs.append(_spec("modality_embed_bwd_spans", modality_embed_bwd_spans_kernel, "fp32", shown, spans, warps))
    return specs


def _of_width(width: int, dtype: str, *, norm: int = 1, dropout: bool = False) -> list[KernelSpec]:
    block, (columns, table_warps) = configs.block(width), configs.table_columns(width)
    fwd, bwd = configs.forward(width), configs.backward(width)
    reads = {"M": _M, "A": _AXES, "V": _VOCABULARY, "STREAMS": _STREAMS, "TABLES": _TABLES, "ROWS_OF": _ROWS_OF}
    reads |= {"NORM": norm} | ({} if dropout else {"rng_ptr": None, "threshold": 0, "keep_scale": 1.0})
    reads |= {"mean_ptr": None, "norm_bias_ptr": None} if norm == 2 else {}
    tables = {"FIRST": _FIRST, "SUMMED": (1,) * len(_FIRST), "CHUNK": configs.CHUNK, "COLUMNS": columns}
    tiles = configs.tiles_per_program(TOKENS, bwd.rows)
    rows = {"WANTED": (0, 1, 1), "FIRST": _FIRST, "TILES": tiles, "R": bwd.rows, "BLOCK_E": block}
    extra = {"width": width} | ({"norm": "rmsnorm", "dropout": 0.1} if dropout else {})

    def spec(name, fn, constexprs, rows_of_tile, warps):
        shown = {**extra, "rows": rows_of_tile, "warps": warps}
        return _spec(f"modality_embed_{name}", fn, dtype, shown, {**reads, **constexprs}, warps)

    return [
        spec("fwd", modality_embed_fwd_kernel, {"R": fwd.rows, "BLOCK_E": block}, fwd.rows, fwd.warps),
        spec("bwd_rows", modality_embed_bwd_rows_kernel, rows, bwd.rows, bwd.warps),
        spec("bwd_tables", modality_embed_bwd_tables_kernel, tables, configs.CHUNK, table_warps),
    ]


def _spec(name, fn, dtype: str, shown: dict, constexprs: dict, warps: int) -> KernelSpec:
    types = {
        **_TYPES,
        **dict.fromkeys(("grad_ptr", "out_ptr"), f"*{dtype}"),
        "streams": ("*i64", f"*{dtype}", f"*{dtype}"),
        "d_streams": (f"*{dtype}",) * _M,
    }
    constants = {arg: value for arg, value in constexprs.items() if arg in fn.arg_names}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in fn.arg_names}
    divisible = []
    for arg, kind in signature.items():
        members = [(arg, kind)] if isinstance(kind, str) else [(f"{arg}.{i}", k) for i, k in enumerate(kind)]
        divisible += [member for member, k in members if k.startswith("*") or member == "E"]
    return KernelSpec("modality_embed", name, dtype, shown, fn, signature, constants, tuple(divisible), warps, 2)
