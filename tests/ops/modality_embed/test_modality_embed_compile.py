"""The Triton kernels of modality_embed compiled for sm_90 without a GPU: the default configurations, and real launches.

bf16 cannot run in the interpreter, so that it compiles in every specialisation is as far as a machine without GPU goes.
"""

import pytest
import torch
from embed_cases import CASES, make

triton = pytest.importorskip("triton")

from mmkernels import inspect  # noqa: E402
from mmkernels.ops.modality_embed import triton_kernels  # noqa: E402
from mmkernels.ops.modality_embed.inputs import Inputs as OperatorInputs  # noqa: E402
from mmkernels.ops.modality_embed.kernel_specs import kernel_specs  # noqa: E402

# One width keeps this short; the inspector's report has the others.
SPECS = [spec for spec in kernel_specs("sm_90") if spec.config["width"] == 768]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kernel}-{s.dtype}")
def test_default_configurations_do_not_spill_and_use_wide_accesses(spec):
    row = inspect.inspect_spec(spec, "sm_90")
    assert row["spill_bytes"] == 0
    assert row["vector_bits"] == 128


class NoGpu:
    """A Triton driver for a GPU that is not there: enough to specialise and compile a launch."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled_launches(monkeypatch):
    """Every launch compiles with the arguments it is given, as warmup does, instead of running."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoGpu())
    return launched


# sizes of 1 become constants, an odd width has no alignment, and absent modalities leave holes among the pointers
@pytest.mark.parametrize("name", ["everything", "one token", "norm bias only", "eight modalities, three missing"])
def test_launches_compile_in_bf16(name, compiled_launches):
    case = next(c for c in CASES if c.name == name)
    inputs = make(case, torch.bfloat16, torch.float32)
    layout, width = inputs.layout, case.width
    common = torch.utils._pytree.tree_map_only(
        torch.Tensor,
        torch.Tensor.detach,
        (
            [torch.empty(0, width) if s is None else s for s in inputs.streams],
            inputs.modality_weight,
            inputs.token_weight,
            [t for tables in inputs.position_weights for t in tables or ()],
            list(case.axes),
            inputs.norm_weight,
            inputs.norm_bias,
            layout.modality_ids,
            layout.source_rows,
            layout.positions,
        ),
    )
    _, mean, rstd = triton_kernels.forward(OperatorInputs(*common), "layernorm", 1e-5, torch.bfloat16)
    needs = [
        *(s.is_floating_point() for s in common[0]),
        True,
        case.vocab is not None,
        *[True] * len(common[3]),
        case.weight,
        case.bias,
    ]
    triton_kernels.backward(inputs.grad_out, OperatorInputs(*common), mean, rstd, "layernorm", needs)
    names = [name for name, _ in compiled_launches]
    assert names[:2] == ["modality_embed_fwd_kernel", "modality_embed_bwd_rows_kernel"]
    table_sums = max(case.axes) + (case.vocab is not None)
    assert names[2:] == ["modality_embed_bwd_tables_kernel", "modality_embed_bwd_spans_kernel"] * table_sums
    assert all("bf16" in kernel.asm["ttir"] for _, kernel in compiled_launches[:2])
