"""What the inspector compiles: every default configuration of the attention kernels, with typical argument types."""

from __future__ import annotations

from mmkernels.kernel_spec import KernelSpec
from mmkernels.ops.attention import configs
from mmkernels.ops.attention.configs import Config
from mmkernels.ops.attention.triton_backward import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from mmkernels.ops.attention.triton_forward import attention_fwd_kernel

HEAD_DIMS = (64, 128)
OTHER_HEAD_DIMS = (32, 96, 256)  # compiled for bf16 only: reported, with no promise
DTYPES = ("bf16", "fp16", "fp32")

_FP32_ARGS = ("lse_ptr", "delta_ptr", "bias_ptr", "mass_ptr")
_INT32_ARGS = (
    "q_table_ptr",
    "k_table_ptr",
    "kv_lo_ptr",
    "kv_hi_ptr",
    "q_lo_ptr",
    "q_hi_ptr",
    "q_bits_ptr",
    "k_bits_ptr",
    "tiles_ptr",
    "spans_ptr",
)


def kernel_specs(arch: str) -> list[KernelSpec]:
    """Forward, dK/dV and dQ, each with and without modality visibility, for every default configuration."""
    shapes = [(dtype, D) for dtype in DTYPES for D in HEAD_DIMS] + [("bf16", D) for D in OTHER_HEAD_DIMS]
    specs = []
    for dtype, D in shapes:
        found = configs.select(arch, dtype, D)
        for visible in (False, True):
            specs += [forward_spec(dtype, D, config, visible) for config in found.fwd]
            specs += [dkdv_spec(dtype, D, config, visible) for config in found.dkdv]
            specs += [dq_spec(dtype, D, config, visible) for config in found.dq]
    return specs


def forward_spec(dtype: str, head_dim: int, config: Config, visible: bool, extras: tuple[str, ...] = ()) -> KernelSpec:
    """extras: any of "bias", "dropout" and "mass"."""
    constexprs = {
        "D": head_dim,
        "BLOCK_D": configs.padded(head_dim),
        "BLOCK_Q": config.rows,
        "BLOCK_K": config.cols,
        "BLOCK_M": 16 if "mass" in extras else 0,
        "HAS_VISIBLE": visible,
        "ALIGNED": False,
        "PRECISION": "ieee",
    }
    present = {"bias_ptr": "bias" in extras, "rng_ptr": "dropout" in extras, "mass_ptr": "mass" in extras}
    present |= {"k_desc": config.tma, "v_desc": config.tma}
    constexprs |= {arg: None for arg, there in present.items() if not there}
    shown = {"head_dim": head_dim, "block_q": config.rows, "block_k": config.cols, "warps": config.warps}
    shown |= {"stages": config.stages, "visible": visible, "tma": config.tma, "extras": "+".join(extras)}
    fn = attention_fwd_kernel
    return _spec("attention_fwd", fn, dtype, shown, constexprs, config.warps, config.stages)


def dkdv_spec(dtype: str, head_dim: int, config: Config, visible: bool) -> KernelSpec:
    return _tiled(
        "attention_bwd_dkdv", attention_bwd_dkdv_kernel, dtype, head_dim, config, visible, "BLOCK_K", "BLOCK_Q"
    )


def dq_spec(dtype: str, head_dim: int, config: Config, visible: bool) -> KernelSpec:
    return _tiled("attention_bwd_dq", attention_bwd_dq_kernel, dtype, head_dim, config, visible, "BLOCK_Q", "BLOCK_K")


def _tiled(name, fn, dtype: str, head_dim: int, config: Config, visible: bool, rows: str, cols: str) -> KernelSpec:
    constexprs = {
        "D": head_dim,
        "BLOCK_D": configs.padded(head_dim),
        rows: config.rows,
        cols: config.cols,
        "HAS_VISIBLE": visible,
        "PRECISION": "ieee",
    }
    if "dlse_ptr" in fn.arg_names:
        constexprs["dlse_ptr"] = None  # the usual case: nobody differentiates lse
    shown = {
        "head_dim": head_dim,
        rows.lower(): config.rows,
        cols.lower(): config.cols,
        "warps": config.warps,
        "stages": config.stages,
        "visible": visible,
    }
    return _spec(name, fn, dtype, shown, constexprs, config.warps, config.stages)


def _spec(name, fn, dtype: str, shown: dict, constexprs: dict, warps: int, stages: int) -> KernelSpec:
    block = f"{constexprs['BLOCK_K']}, 1, {constexprs['BLOCK_D']}"
    signature = {arg: "constexpr" if arg in constexprs else _type(arg, dtype, block) for arg in fn.arg_names}
    # Tensors from torch are aligned, and so are the strides of a [T, 3, H, D] projection.
    divisible = tuple(a for a in signature if a.endswith("_ptr") or a.startswith("stride_"))
    return KernelSpec("attention", name, dtype, shown, fn, signature, constexprs, divisible, warps, stages)


def _type(arg: str, dtype: str, block: str) -> str:
    if arg.endswith("_desc"):
        return f"tensordesc<{dtype}[{block}]>"
    if arg == "rng_ptr":
        return "*i64"
    if arg in _FP32_ARGS:
        return "*fp32"
    if arg in _INT32_ARGS:
        return "*i32"
    if arg.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if arg in ("scale", "scale_log2", "keep_scale") else "i32"
