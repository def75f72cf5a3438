"""What the inspector compiles: the modality_embed kernels at common widths, with typical argument types.

M = 3 modalities: token ids with one position axis, images with two, audio with one.  Parameters are fp32, as under
autocast; `dtype` is that of the streams and the result.
"""

from __future__ import annotations

import triton

from mmkernels.kernel_spec import KernelSpec
from mmkernels.ops.modality_embed import configs
from mmkernels.ops.modality_embed.triton_backward import (
    modality_embed_bwd_rows_kernel,
    modality_embed_bwd_spans_kernel,
    modality_embed_bwd_tables_kernel,
)
from mmkernels.ops.modality_embed.triton_forward import modality_embed_fwd_kernel

WIDTHS = (512, 768, 1024, 2048)
TOKENS = 65536  # decides only how many rows a backward program takes
_STREAMS = (2, 1, 1)
_TABLES = (0, 160, 192, -1, 128, -1)  # [q * M + m]: text 128 rows, image 32 + 32, audio after them


def kernel_specs(arch: str) -> list[KernelSpec]:
    """Forward and the three backward kernels, per width and dtype."""
    specs = []
    for dtype in ("bf16", "fp32"):
        for width in WIDTHS:
            rows = {"M": 3, "A": 2, "STREAMS": _STREAMS, "TABLES": _TABLES, "BLOCK_E": triton.next_power_of_2(width)}
            fwd, bwd = configs.forward(width), configs.backward(width, TOKENS)
            specs.append(_spec("modality_embed_fwd", modality_embed_fwd_kernel, dtype, width, rows, fwd))
            specs.append(_spec("modality_embed_bwd_rows", modality_embed_bwd_rows_kernel, dtype, width, rows, bwd))
    width = 768
    tables = {"CHUNK": configs.CHUNK, "BLOCK_E": configs.TABLE_BLOCK_E}
    config = configs.Config(rows=configs.CHUNK, warps=4)
    specs.append(_spec("modality_embed_bwd_tables", modality_embed_bwd_tables_kernel, "fp32", width, tables, config))
    specs.append(_spec("modality_embed_bwd_spans", modality_embed_bwd_spans_kernel, "fp32", width, tables, config))
    return specs


def _spec(name, fn, dtype: str, width: int, constexprs: dict, config: configs.Config) -> KernelSpec:
    absent = {f"{letter}{m}_ptr": None for letter in "sd" for m in range(8) if m >= 3 or (letter == "d" and m == 0)}
    constants = {**constexprs, **absent, "ROWS": config.rows}
    constants = {arg: value for arg, value in constants.items() if arg in fn.arg_names}
    signature = {arg: "constexpr" if arg in constants else _type(arg, dtype) for arg in fn.arg_names}
    divisible = tuple(arg for arg in signature if (arg.endswith("_ptr") or arg == "E") and arg not in constants)
    shown = {"width": width, "rows": config.rows, "warps": config.warps}
    return KernelSpec("modality_embed", name, dtype, shown, fn, signature, constants, divisible, config.warps, 2)


def _type(arg: str, dtype: str) -> str:
    if arg in ("T", "E"):
        return "i32"
    if arg == "eps":
        return "fp32"
    if arg in ("s0_ptr", "order_ptr"):
        return "*i64"
    if arg == "modality_ids_ptr":
        return "*u8"
    if arg in ("source_rows_ptr", "positions_ptr", "keys_ptr"):
        return "*i32"
    return f"*{dtype}" if arg in ("s1_ptr", "s2_ptr", "d1_ptr", "d2_ptr", "grad_ptr", "out_ptr") else "*fp32"
