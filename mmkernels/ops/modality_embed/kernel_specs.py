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
    modality_embed_bwd_walks_kernel,
)
from mmkernels.ops.modality_embed.triton_forward import modality_embed_fwd_kernel

WIDTHS = (64, 256, 512, 768, 1024, 2048)
_M, _AXES, _VOCABULARY = 3, 2, 32768
_STREAMS = (-2, 1, 1)
_TABLES = (0, 2, 3, -1, 1, -1)  # [q * M + m]: text 128 rows, image 32 + 32, audio 64
_ROWS_OF = (128, 32, 32, 64)
_FIRST = (0, 128, 160, 192, 256)
_GRADIENTS = ("d_weight_ptr", "d_bias_ptr", "d_modality_ptr")
_PARAMETERS = ("modality_weight_ptr", "token_weight_ptr", "norm_weight_ptr", "norm_bias_ptr")
_FP32 = ("mean_ptr", "rstd_ptr", "dx_ptr", "partial_ptr", "head_ptr", "tail_ptr")
_TYPES = {
    **dict.fromkeys((*_PARAMETERS, *_GRADIENTS, *_FP32), "*fp32"),
    **dict.fromkeys(("source_rows_ptr", "positions_ptr", "keys_ptr"), "*i32"),
    **dict.fromkeys(("T", "TILES", "N", "W", "E"), "i32"),
    **dict.fromkeys(("rng_ptr", "order_ptr"), "*i64"),
    **dict.fromkeys(("eps", "keep_scale"), "fp32"),
    "modality_ids_ptr": "*u8",
    "threshold": "i64",
    "sizes": ("i32",) * _M,
    "tables": ("*fp32",) * len(_ROWS_OF),
    "outs": ("*fp32",) * len(_FIRST),
}


def kernel_specs(arch: str) -> list[KernelSpec]:
    """Forward and backward kernels, per width and dtype; at one width without a norm, and with dropout and RMSNorm."""
    specs = []
    for dtype in ("bf16", "fp32"):
        for width in WIDTHS:
            specs += _of_width(width, dtype)
        specs += _of_width(768, dtype, norm=2, dropout=True)
        specs += _plain(768, dtype)
    shown, warps = {"width": 768, "rows": configs.CHUNK}, configs.tables().warps
    spans = _sums(768) | {"R": configs.SPANS}
    specs.append(_spec("modality_embed_bwd_spans", modality_embed_bwd_spans_kernel, "fp32", shown, spans, warps))
    rows, columns, warps = configs.WALK_SUMS
    walks, shown = {"N": _M + 2, "R": rows, "COLUMNS": columns}, {"width": 768, "rows": rows}
    specs.append(_spec("modality_embed_bwd_walks", modality_embed_bwd_walks_kernel, "fp32", shown, walks, warps))
    return specs


def _of_width(width: int, dtype: str, *, norm: int = 1, dropout: bool = False) -> list[KernelSpec]:
    reads = {
        "E": width,
        "M": _M,
        "A": _AXES,
        "V": _VOCABULARY,
        "STREAMS": _STREAMS,
        "TOKENS": 1 if dtype == "fp32" else -1,
        "TABLES": _TABLES,
        "ROWS_OF": _ROWS_OF,
    }
    reads |= {"NORM": norm} | ({} if dropout else {"rng_ptr": None, "threshold": 0, "keep_scale": 1.0})
    reads |= {"mean_ptr": None, "norm_bias_ptr": None} if norm == 2 else {}
    shown = {"width": width, **({"norm": "rmsnorm", "dropout": 0.1} if dropout else {})}
    warps = configs.tables().warps
    table_spec = {**shown, "rows": configs.CHUNK, "warps": warps}
    name, kernel = "modality_embed_bwd_tables", modality_embed_bwd_tables_kernel
    return [
        *_of_rows(width, dtype, shown, reads, {"WANTED": (0, 1, 1), "NORM_SUMS": 1, "FIRST": _FIRST}),
        _spec(name, kernel, dtype, table_spec, _sums(width), warps),
    ]


def _sums(width: int) -> dict:
    """Constants of the tables' sums."""
    config = configs.tables()
    constants = {"E": width, "SLOTS": len(_TABLES) // _M + 1, "FIRST": _FIRST, "SUMMED": (1,) * len(_FIRST)}
    return constants | {"CHUNK": configs.CHUNK, "R": config.rows, "COLUMNS": config.columns}


def _plain(width: int, dtype: str) -> list[KernelSpec]:
    """x + W_m on three float streams."""
    reads = {"E": width, "M": _M, "A": _AXES, "V": 0, "STREAMS": (0, 0, 0), "TOKENS": -1, "TABLES": (), "ROWS_OF": ()}
    reads["NORM"] = 0
    reads |= {"rng_ptr": None, "threshold": 0, "keep_scale": 1.0, "eps": 0.0}
    reads |= dict.fromkeys((*_PARAMETERS[1:], "mean_ptr", "rstd_ptr", "dx_ptr", "keys_ptr"))
    backward = {"WANTED": (1, 1, 1), "NORM_SUMS": 0, "FIRST": (0,)}
    return _of_rows(width, dtype, {"width": width, "norm": None}, reads, backward)


def _of_rows(width: int, dtype: str, shown: dict, reads: dict, backward: dict) -> list[KernelSpec]:
    """The forward, and the backward's pass over rows."""
    specs, facts = [], (width, 4 if dtype == "fp32" else 2, reads["NORM"] > 0)
    for name, kernel, config, more in (
        ("fwd", modality_embed_fwd_kernel, configs.forward(*facts), {}),
        ("bwd_rows", modality_embed_bwd_rows_kernel, configs.backward(*facts), backward),
    ):
        tile = {"R": config.rows, "COLUMNS": config.columns, **more}
        tile |= {"MODALITY_SUMS": 1} if more else {}
        told = {**shown, "rows": config.rows, "warps": config.warps}
        limits = config.warps, config.registers
        specs.append(_spec(f"modality_embed_{name}", kernel, dtype, told, {**reads, **tile}, *limits))
    return specs


def _spec(name, fn, dtype: str, shown: dict, constexprs: dict, warps: int, registers=None) -> KernelSpec:
    streams = tuple("*i64" if kind == -2 else f"*{dtype}" for kind in constexprs.get("STREAMS", ()))
    types = {
        **_TYPES,
        **dict.fromkeys(("grad_ptr", "out_ptr"), f"*{dtype}"),
        **dict.fromkeys(("streams", "d_streams"), streams),
    }
    constants = {arg: value for arg, value in constexprs.items() if arg in fn.arg_names}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in fn.arg_names}
    divisible = []
    for arg, kind in signature.items():
        members = [(arg, kind)] if isinstance(kind, str) else [(f"{arg}.{i}", k) for i, k in enumerate(kind)]
        divisible += [member for member, k in members if k.startswith("*") or member == "E"]
    options = warps, 2, registers or 0
    return KernelSpec("modality_embed", name, dtype, shown, fn, signature, constants, tuple(divisible), *options)
