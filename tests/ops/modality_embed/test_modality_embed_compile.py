"""The Triton kernels of modality_embed compiled for sm_90 without a GPU: the default configurations, and real launches.

bf16 cannot run in the interpreter, so that it compiles in every specialisation is as far as a machine without GPU goes.
"""

import pytest
import torch
from embed_cases import CASES, Case, make, ragged

triton = pytest.importorskip("triton")

from mmkernels import inspect  # noqa: E402
from mmkernels.ops.modality_embed import configs, triton_kernels  # noqa: E402
from mmkernels.ops.modality_embed.kernel_specs import kernel_specs  # noqa: E402

# One width, and the narrowest, where a lane has the fewest columns, keep this short; the report has the others.
SPECS = [spec for spec in kernel_specs("sm_90") if spec.config["width"] in (64, 768) and spec.dtype == "bf16"]


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"{s.kernel}-{s.config['width']}-{s.config.get('norm', 'layernorm')}"
)
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
@pytest.mark.parametrize(
    "name",
    [
        "everything",
        "rmsnorm and dropout",
        "dropout alone",
        "one token",
        "norm bias only",
        "eight modalities, three missing",
    ],
)
def test_launches_compile_in_bf16(name, compiled_launches):
    case = next(c for c in CASES if c.name == name)
    inputs = make(case, torch.bfloat16, torch.float32)
    given, options = inputs.operator_arguments()
    given = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, given)
    _, mean, rstd = triton_kernels.forward(given, options, torch.bfloat16)
    needs = [
        *(s.is_floating_point() for s in given.streams),
        True,
        given.token_weight is not None,
        *[True] * len(given.tables),
        given.norm_weight is not None,
        given.norm_bias is not None,
    ]
    triton_kernels.backward(inputs.grad_out, given, options, mean, rstd, needs)
    names = [name for name, _ in compiled_launches]
    rows = ["modality_embed_fwd_kernel", "modality_embed_bwd_rows_kernel"]
    summed = given.tables or given.token_weight is not None
    tables = ["modality_embed_bwd_tables_kernel", "modality_embed_bwd_spans_kernel"]
    assert names == rows + tables * bool(summed) + ["modality_embed_bwd_walks_kernel"]
    assert all("bf16" in kernel.asm["ttir"] for _, kernel in compiled_launches[:2])


def test_another_batch_compiles_nothing_new(compiled_launches, monkeypatch):
    """Rows and tokens differ in every batch; a kernel specialised to them would compile again and again."""
    monkeypatch.setattr(configs, "NORMED_BACKWARD_WALKS", 1)  # so do the tiles of a walk
    compiled = set()
    for samples in (ragged(1, 3, "pp", 6), ragged(2, 4, "pp", 9), [[(0, 16), (1, 16)]]):
        inputs = make(Case("batch", samples, 64, (0, 0)), torch.bfloat16)
        given, options = inputs.operator_arguments()
        given = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, given)
        _, mean, rstd = triton_kernels.forward(given, options, torch.bfloat16)
        triton_kernels.backward(inputs.grad_out, given, options, mean, rstd, [True] * 3 + [False] + [True] * 2)
        compiled |= {(name, kernel.hash) for name, kernel in compiled_launches}
    assert len(compiled) == 3  # rows forward and backward, sums over walks
