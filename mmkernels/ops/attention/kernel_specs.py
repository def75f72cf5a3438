"""What the inspector compiles: every default configuration of the attention kernels, with typical argument types."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.kernel_spec import KernelSpec
from mmkernels.ops.attention import configs, tuned
from mmkernels.ops.attention.configs import Config
from mmkernels.ops.attention.triton_backward import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from mmkernels.ops.attention.triton_forward import attention_fwd_kernel
from mmkernels.ops.attention.triton_fused import attention_bwd_fused_kernel

HEAD_DIMS = (64, 128)
OTHER_HEAD_DIMS = (32, 96, 256)  # compiled for bf16 only: reported, with no promise
DTYPES = ("bf16", "fp16", "fp32")
MODALITIES = 3
EXTRAS = ("bias", "dropout", "mass")

KERNELS = {
    "fwd": attention_fwd_kernel,
    "dkdv": attention_bwd_dkdv_kernel,
    "dq": attention_bwd_dq_kernel,
    "fused": attention_bwd_fused_kernel,
}
_OF_KEYS = ("dkdv", "fused")  # a tile's rows are keys, its columns queries
# Arguments that are None unless an extra asks for them.
_OPTIONAL = {"bias_ptr": "bias", "partials_ptr": "bias", "rng_ptr": "dropout", "mass_ptr": "mass", "dlse_ptr": "dlse"}
_DESCRIPTORS = ("q_desc", "do_desc", "k_desc", "v_desc")
_TYPES = {"rng_ptr": "*i64"}
_TYPES |= dict.fromkeys(("lse_ptr", "delta_ptr", "bias_ptr", "mass_ptr", "partials_ptr", "dq_sum"), "*fp32")
_TYPES |= dict.fromkeys(("q_table_ptr", "k_table_ptr", "tiles_ptr", "spans_ptr"), "*i32")
_TYPES |= dict.fromkeys(("scale", "bias_scale", "keep_scale"), "fp32")


def kernel_specs(arch: str) -> list[KernelSpec]:
    """Every kernel, with and without modality visibility, and with all extras at once, the worst case for registers.

    Of the built-in table, and then what was measured to be faster on such a GPU, marked so.
    """
    shapes = [(dtype, D) for dtype in DTYPES for D in HEAD_DIMS] + [("bf16", D) for D in OTHER_HEAD_DIMS]
    specs = []
    for dtype, D in shapes:
        for visible, extras in ((False, ()), (True, ()), (True, EXTRAS)):
            found = configs.built_in(arch, 4 if dtype == "fp32" else 2, configs.bucket(D), bool(extras), visible)
            for kernel in KERNELS:
                specs += [spec(kernel, dtype, D, c, visible, extras) for c in getattr(found, kernel)]
    return specs + _measured(arch)


def _measured(arch: str) -> list[KernelSpec]:
    """Each configuration once, for the first kind of batch that it was measured on."""
    specs: dict[tuple, KernelSpec] = {}
    for entry in tuned.read(tuned.tuned_path()):
        visible, extras = entry["mask"] == "visible", EXTRAS if entry["extras"] else ()
        for dtype in ("bf16", "fp16") if entry["dtype"] == "bf16" else (entry["dtype"],):  # as tuned.lookup has it
            key = (entry["kernel"], dtype, entry["head_dim"], str(entry["config"]), visible, extras)
            if entry["arch"] == arch and key not in specs:
                made = spec(*key[:3], Config(**entry["config"]), visible, extras)
                specs[key] = replace(made, config=made.config | {"measured": True})
    return list(specs.values())


def spec(
    kernel: str, dtype: str, head_dim: int, config: Config, visible: bool, extras: tuple[str, ...] = ()
) -> KernelSpec:
    """One configuration of one of KERNELS.  extras: any of EXTRAS; those that the kernel does not have are nothing."""
    fn = KERNELS[kernel]
    block_d = configs.padded(head_dim)
    rows, cols = ("BLOCK_K", "BLOCK_Q") if kernel in _OF_KEYS else ("BLOCK_Q", "BLOCK_K")
    biased = "bias" in extras or (kernel == "fwd" and "mass" in extras)
    values = {
        "D": head_dim,
        "BLOCK_D": block_d,
        rows: config.rows,
        cols: config.cols,
        "MODALITIES": MODALITIES if biased else 0,
        "HAS_VISIBLE": visible,
        "ALIGNED": False,
        "PRECISION": "ieee",
        "TMA": config.tma,
        "LATE": config.late,
    }
    values |= {arg: None for arg, extra in _OPTIONAL.items() if extra not in extras}
    values |= {} if config.tma else dict.fromkeys(_DESCRIPTORS)
    constexprs = {arg: value for arg, value in values.items() if arg in fn.arg_names}
    block = f"[{config.cols}, 1, {block_d}]"
    types = _TYPES | dict.fromkeys(_DESCRIPTORS, f"tensordesc<{dtype}{block}>")
    if config.tma:
        types["dq_sum"] = f"tensordesc<fp32{block}>"
    signature = {}
    for arg in fn.arg_names:
        usual = f"*{dtype}" if arg.endswith("_ptr") else "i32"
        signature[arg] = "constexpr" if arg in constexprs else types.get(arg, usual)
    # Tensors from torch are aligned, and so are the strides of a [T, 3, H, D] projection.
    divisible = tuple(a for a in signature if a.endswith("_ptr") or a.startswith("stride_") or signature[a] == "*fp32")
    shown = {"head_dim": head_dim, rows.lower(): config.rows, cols.lower(): config.cols, "warps": config.warps}
    shown |= {"stages": config.stages, "tma": config.tma, "late": config.late}
    shown |= {"registers_limit": config.registers or "none", "visible": visible, "extras": "+".join(extras) or "none"}
    name = f"attention_{kernel}" if kernel == "fwd" else f"attention_bwd_{kernel}"
    options = config.warps, config.stages, config.registers
    return KernelSpec("attention", name, dtype, shown, fn, signature, constexprs, divisible, *options)
