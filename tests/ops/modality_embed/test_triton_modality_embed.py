"""The Triton kernels of modality_embed through the interpreter: values and every gradient against float64.

bf16 is owed to a GPU: the interpreter computes it wrongly, and dispatch refuses it.
"""

import contextlib
import dataclasses

import pytest
import torch
from embed_cases import MIXED, Case, make, oracle, ragged, run, torch_same
from triton.runtime import interpreter

from mmkernels.ops.modality_embed import configs, triton_kernels
from mmkernels.ops.modality_embed.api import modality_embed
from mmkernels.testing import assert_error_rule

pytestmark = pytest.mark.interpreter

CHUNK = 8  # of the table sums; configs.CHUNK would take as many more tokens to cross

# Wide rows cost the interpreter nothing, and make errors in fp32 a matter of many values, not of luck.
CASES = [
    Case("plain", [[(0, 5)], [], [(0, 2)]], 72, (0,), norm=None),
    # an odd width has masked lanes, and no alignment to rely on
    Case("everything", ragged(5, 2, "pgp", 5), 301, **MIXED),
    Case("everything, no norm", ragged(6, 2, "pgp", 5), 144, norm=None, **MIXED),
    # without a norm a row wider than 256 is several programs', the last with masked lanes; keys are written by one
    Case("everything, no norm, wide", ragged(6, 2, "pgp", 5), 700, norm=None, dropout_p=0.2, **MIXED),
    # two ids over 30 tokens: runs of one key cover several chunks of the table sums, and end at their edges
    Case("long runs", [[(0, 20), (1, 3)], [(0, CHUNK)]], 136, (1, 1), ids=(0,), vocab=2),
    Case("bias only, video", ragged(9, 2, "pv", 4), 192, (1, 3), ids=(0,), vocab=5, weight=False),
    Case(
        "eight modalities, three missing", ragged(10, 1, "pgp-p-p-", 4), 160, (1, 2, 0, 2, 1, 0, 0, 1), (0, 4), vocab=6
    ),
    Case("grid tables, no grid", [[(0, 3)], [(0, 1), (1, 4)]], 128, (2, 3), special=(0, None), vocab=1),
    Case("rmsnorm, dropout", ragged(5, 2, "pgp", 5), 100, norm="rmsnorm", bias=False, dropout_p=0.3, **MIXED),
    Case("dropout alone", ragged(1, 3, "pp", 5), 64, (0, 0), norm=None, dropout_p=0.5),
    Case("dropout and tables", ragged(5, 2, "pgp", 5), 600, dropout_p=0.2, **MIXED),
    Case("one token", [[], [(1, 1)]], 256, (0, 1)),
    Case("no token", [[], []], 16, (1, 2), ids=(0,), vocab=4),
]
BY_NAME = {case.name: case for case in CASES}


def check(inputs, results):
    ref, same = oracle(inputs), torch_same(inputs)
    assert results.keys() == ref.keys()
    for name, value in results.items():
        assert_error_rule(name, value, ref[name], same[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case, dtype, monkeypatch):
    monkeypatch.setattr(configs, "CHUNK", CHUNK)
    inputs = make(case, dtype)
    check(inputs, run(inputs, "triton"))


def test_kernels_are_launched_on_the_tensors_own_gpu(monkeypatch):
    """Which need not be the current one: Triton would launch them there."""
    entered, launched = [], []

    @contextlib.contextmanager
    def on_device(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert entered, self.kernel.__name__
            launched.append(self.kernel.__name__)
            return self.kernel[grid]

    monkeypatch.setattr(triton_kernels, "on_device", on_device)
    kernels = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(triton_kernels, name, Watched(getattr(triton_kernels, name)))
    run(make(BY_NAME["everything"], torch.float32), "triton")
    assert sorted(launched) == sorted(kernels)


def test_fp32_parameters_with_fp16_streams():
    inputs = make(BY_NAME["everything"], torch.float16, torch.float32)
    check(inputs, run(inputs, "triton"))


@pytest.mark.parametrize("case", ["everything", "everything, no norm, wide", "no token"])
def test_few_long_walks_and_many_short_ones(case, monkeypatch):
    """Partial sums over several walks, the last short; walks of several tiles whose rows are of several modalities."""
    monkeypatch.setattr(configs, "LEAST_ROWS", 4)
    inputs = make(BY_NAME[case], torch.float32)
    for walks in (2, 1000):
        for direction in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(configs, f"PLAIN_{direction}", (4, 1, walks))
            monkeypatch.setattr(configs, f"NORMED_{direction}_WALKS", walks)
        check(inputs, run(inputs, "triton"))


def test_table_sums_of_other_numbers_of_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(configs, "TABLES", (3, 2))
    monkeypatch.setattr(configs, "CHUNK", CHUNK)
    monkeypatch.setattr(configs, "SPANS", 2)  # a run of more chunks than are asked for at a time
    for name in ("everything", "long runs"):
        inputs = make(BY_NAME[name], torch.float32)
        check(inputs, run(inputs, "triton"))


def test_keys_past_sixteen_bits():
    """Vocabularies of 32,768 and more: most models'."""
    inputs = make(
        Case("wide vocabulary", [[(0, 9), (1, 3)], [(0, 4)]], 144, (1, 0), ids=(0,), vocab=2**15), torch.float32
    )
    check(inputs, run(inputs, "triton"))


def test_only_wanted_gradients():
    """Frozen parameters: no table sum at all, or only some; the rest does not change."""
    inputs = make(BY_NAME["everything"], torch.float32)
    every = run(inputs, "triton")
    for frozen in (("token_weight", "norm_weight", "table 1.0", "stream 1"), ("table 0.0", "table 1.1", "table 2.0")):
        for name in frozen:
            inputs.leaves.pop(name).requires_grad_(False)
        some = run(inputs, "triton")
        assert all(torch.equal(some[name], every[name]) for name in some)


def test_error_rule_bites():
    """Two swapped modalities must fail, so that the comparison above means something."""
    inputs = make(BY_NAME["everything"], torch.float16)
    wrong = inputs.to(torch.float16)
    with torch.no_grad():
        wrong.modality_weight[:2] = wrong.modality_weight[:2].flip(0).clone()
    with pytest.raises(AssertionError, match="error"):
        check(inputs, run(wrong, "triton"))


def test_a_nan_stays_in_its_row():
    inputs = make(BY_NAME["everything"], torch.float32)
    clean = run(inputs, "triton")
    layout = inputs.layout
    with torch.no_grad():
        inputs.streams[1][3] = float("nan")
    spoilt = run(inputs, "triton")
    others = ~((layout.modality_ids == 1) & (layout.source_rows == 3))
    assert spoilt["out"][~others].isnan().all()
    assert torch.equal(spoilt["out"][others], clean["out"][others])
    assert torch.equal(spoilt["d stream 2"], clean["d stream 2"])


def test_opcheck_of_the_registered_operator():
    inputs = make(BY_NAME["one token"], torch.float32)
    given, options = inputs.operator_arguments()
    torch.library.opcheck(torch.ops.mm.modality_embed_fwd, (*given, *options, torch.float32, "triton"))


@pytest.mark.parametrize("which", ["row", "token", "position"])
def test_an_index_outside_its_table_reads_zero_and_gets_no_gradient(which):
    """On a GPU nothing can raise without a sync; what matters is that no other memory is read or written."""
    inputs = make(BY_NAME["everything"], torch.float32)
    given, options = inputs.operator_arguments()
    given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), given)
    clean, mean, rstd = torch.ops.mm.modality_embed_fwd(*given, *options, torch.float32, "triton")
    if which == "row":
        bad = ((given.modality_ids == 1) & (given.source_rows >= 0)).nonzero()[0].item()
        given.source_rows[bad] = 10**9
    elif which == "token":
        given.streams[0][0] = 10**9
        bad = ((given.modality_ids == 0) & (given.source_rows == 0)).nonzero()[0].item()
    else:
        bad = (given.modality_ids == 2).nonzero()[0].item()
        given.positions[:, bad] = -5
    out, _, _ = torch.ops.mm.modality_embed_fwd(*given, *options, torch.float32, "triton")
    others = torch.arange(len(out)) != bad
    assert torch.equal(out[others], clean[others])
    assert out[bad].isfinite().all()
    assert not torch.equal(out[bad], clean[bad])
    needs = [s.is_floating_point() for s in given.streams] + [True] * (4 + len(given.tables))
    grads = torch.ops.mm.modality_embed_bwd(inputs.grad_out, *given, *options, mean, rstd, needs, "triton")
    assert all(g.isfinite().all() for g in torch.utils._pytree.tree_leaves(grads[1:]))


@pytest.mark.parametrize("which", ["row", "token", "position"])
def test_every_index_outside_its_table_reads_the_same_zero(which):
    """Just beyond its end and just before its beginning too, where other tensors lie."""
    inputs = make(BY_NAME["everything"], torch.float32)
    given, options = inputs.operator_arguments()
    given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), given)
    if which == "row":
        place = given.source_rows[((given.modality_ids == 1) & (given.source_rows >= 0)).nonzero()[0]]
        values = len(given.streams[1]), 2 * len(given.streams[1]), 10**9
        target, index = given.source_rows, ((given.modality_ids == 1) & (given.source_rows == place)).nonzero()[0]
    elif which == "token":
        values, target, index = (len(given.token_weight), -3, 10**9), given.streams[0], 0
    else:
        values, target = (-5, -2, 10**6), given.positions
        index = slice(None), (given.modality_ids == 2).nonzero()[0]
    found = []
    for value in values:
        target[index] = value
        found.append(torch.ops.mm.modality_embed_fwd(*given, *options, torch.float32, "triton")[0])
    assert all(torch.equal(one, found[-1]) for one in found)


@pytest.mark.parametrize("token_id", [-1, 10**9])  # -1 is what loaders mark padding by
def test_debug_mode_stops_at_a_token_id_outside_the_table(token_id, monkeypatch):
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    inputs = make(BY_NAME["everything"], torch.float32)
    given, options = inputs.operator_arguments()
    torch.ops.mm.modality_embed_fwd(*given, *options, torch.float32, "triton")
    given.streams[0][0] = token_id
    with pytest.raises(interpreter.InterpreterError, match="a token id is outside the token table"):
        torch.ops.mm.modality_embed_fwd(*given, *options, torch.float32, "triton")


def test_refusals():
    inputs = make(BY_NAME["plain"], torch.bfloat16)
    with pytest.raises(RuntimeError, match="bf16"):
        modality_embed(inputs.streams, inputs.layout, impl="triton", **inputs.arguments())
