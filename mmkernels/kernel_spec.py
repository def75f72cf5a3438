"""What it takes to compile one configuration of one Triton kernel without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """One default configuration of one kernel.  The inspector, the tuner and the tests walk lists of these.

    op               operator name, such as "attention"
    kernel           kernel name; contains "fwd" or "bwd"
    dtype            data type of the main operands: "bf16", "fp16" or "fp32"
    config           what distinguishes this configuration, for people: {"head_dim": 64, "block_q": 128, ...}
    fn               the triton.JITFunction
    signature        argument name -> Triton type: "*bf16", "*i32", "i32", "fp32" or "constexpr"; a tuple argument has a
                     tuple of them
    constexprs       values of the constexpr arguments
    divisible_by_16  arguments known to be multiples of 16 (pointers' alignment, strides); "streams.1" is the second
                     member of a tuple argument
    """

    op: str
    kernel: str
    dtype: str
    config: dict[str, Any]
    fn: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 0  # of a thread; 0: as the compiler wants
