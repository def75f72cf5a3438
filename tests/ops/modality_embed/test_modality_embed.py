"""modality_embed on CPU: every implementation against float64, and the contract around it."""

import functools

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from embed_cases import CASES, MIXED, Case, make, oracle, ragged, run, torch_same

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed import api, op
from mmkernels.ops.modality_embed.api import modality_embed
from mmkernels.testing import assert_error_rule

BY_NAME = {case.name: case for case in CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cpp = pytest.mark.skipif(dispatch.cpp_missing() is not None, reason=str(dispatch.cpp_missing()))
IMPLS = ["reference", "torch", pytest.param("cpp", marks=needs_cpp)]


# In fp32 both errors are a few roundings, and the largest of a handful is luck: judge many draws together.
SEEDS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


@functools.cache
def judges(name, dtype):
    """Inputs, float64 results and PyTorch's results of each draw."""
    draws = [make(BY_NAME[name], dtype, seed=seed) for seed in range(SEEDS[dtype])]
    return [(inputs, oracle(inputs), torch_same(inputs)) for inputs in draws]


def check(inputs, results):
    check_all([(results, oracle(inputs), torch_same(inputs))])


def check_all(triples):
    """The error rule over several draws of (ours, float64, PyTorch)."""
    assert all(triple[0].keys() == triple[1].keys() for triple in triples)
    for name in triples[0][0]:
        assert_error_rule(name, *(torch.stack([triple[i][name] for triple in triples]) for i in range(3)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case, dtype, impl):
    check_all([(run(inputs, impl), ref, same) for inputs, ref, same in judges(case.name, dtype)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_parameters_with_half_streams(dtype, impl):
    """What autocast brings: gradients of parameters are then fp32 too."""
    inputs = make(BY_NAME["everything"], dtype, torch.float32)
    results = run(inputs, impl)
    assert results["out"].dtype == results["d stream 1"].dtype == dtype
    assert results["d modality_weight"].dtype == results["d token_weight"].dtype == torch.float32
    check(inputs, results)


def test_reference_backward_by_finite_differences():
    inputs = make(Case("small", ragged(3, 2, "pgp", 4), 5, **MIXED), torch.float64)
    leaves = inputs.leaves
    names = list(leaves)

    def call(*values):
        at = dict(zip(names, values, strict=True))
        return modality_embed(
            [at.get(f"stream {m}", s) for m, s in enumerate(inputs.streams)],
            inputs.layout,
            modality_weight=at["modality_weight"],
            token_weight=at["token_weight"],
            position_weights=[
                tuple(at[f"table {m}.{j}"] for j in range(len(t))) for m, t in enumerate(inputs.position_weights)
            ],
            norm_weight=at["norm_weight"],
            norm_bias=at["norm_bias"],
        )

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("change", ["swapped modality", "missing bias", "scale", "position off by one", "lost id"])
def test_error_rule_bites(change):
    """Each of these mistakes must fail the rule in bf16, the dtype that forgives most."""
    case = BY_NAME["everything"]
    inputs = make(case, torch.bfloat16)
    wrong = inputs.to(torch.bfloat16)
    with torch.no_grad():
        if change == "swapped modality":
            wrong.modality_weight[:2] = wrong.modality_weight[:2].flip(0).clone()
        elif change == "missing bias":
            wrong.norm_bias.zero_()
        elif change == "scale":
            wrong.norm_weight.mul_(1.01)
        elif change == "position off by one":
            wrong.position_weights[2][0].copy_(wrong.position_weights[2][0].roll(1, 0))
        else:
            wrong.streams[0] = wrong.streams[0].clone()
            wrong.streams[0][0] = (wrong.streams[0][0] + 1) % case.vocab
    with pytest.raises(AssertionError, match="error"):
        check(inputs, run(wrong, "torch"))


# odd tails of every vector width and tile, and the widest row of the tuning table's promise
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [8, 15, 33, 100, 255, 1024, 2047, 4096])
def test_widths(width, impl):
    case = Case("width", ragged(14, 2, "pgp", 6), width, (1, 2, 1), (0,), (2, 1, None), 9, dropout_p=0.1)
    draws = [make(case, torch.float32, seed=seed) for seed in range(16 if width < 100 else 4)]
    check_all([(run(inputs, impl), oracle(inputs), torch_same(inputs)) for inputs in draws])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("modalities", range(1, 9))
def test_one_to_eight_modalities(modalities, impl):
    """From three on one is missing; each has the position tables that it can have, the first one ids."""
    kinds = "pg-ppgpp"[:modalities]
    axes = tuple({"p": 1, "g": 2, "-": 1}[kind] for kind in kinds)
    case = Case("modalities", ragged(16, 3, kinds, 6), 40, axes, ids=(0,), vocab=7)
    # As many as test_widths has of such a width: with 4, which rounds differently (the sanitizers' build) was luck.
    draws = [make(case, torch.float32, seed=seed) for seed in range(16)]
    check_all([(run(inputs, impl), oracle(inputs), torch_same(inputs)) for inputs in draws])


NORMS = [
    (None, False, False),
    *(("layernorm", weight, bias) for weight in (False, True) for bias in (False, True)),
    *(("rmsnorm", weight, False) for weight in (False, True)),
]
ROWS = [(), ("ids",), ("special",), ("ids", "special")]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("tables", [False, True], ids=["bare", "positions"])
@pytest.mark.parametrize("rows", ROWS, ids="+".join)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_every_combination_of_parts(norm, rows, tables, dropout_p, impl):
    """Each norm with and without its parameters, token ids, special tokens, position tables, dropout."""
    case = Case(
        "combination",
        ragged(15, 4, "pgp"),
        48,
        (1, 2, 1) if tables else (0, 0, 0),
        (0,) if "ids" in rows else (),
        (2, None, 1) if "special" in rows else None,
        9 if rows else None,
        norm=norm[0],
        weight=norm[1],
        bias=norm[2],
        dropout_p=dropout_p,
    )
    draws = [make(case, torch.float32, seed=seed) for seed in range(4)]
    check_all([(run(inputs, impl), oracle(inputs), torch_same(inputs)) for inputs in draws])


@pytest.mark.parametrize("impl", IMPLS)
def test_streams_of_several_dtypes(impl):
    """fp16 and fp32 rows in one batch: the result is what they promote to, gradients have their stream's dtype."""
    inputs = make(BY_NAME["everything"], torch.float16, torch.float32)
    same = run(inputs.to(torch.float32), impl)
    leaf = inputs.streams[2].detach().float().requires_grad_()
    inputs.streams[2] = inputs.leaves["stream 2"] = leaf
    mixed = run(inputs, impl)
    assert mixed["out"].dtype == mixed["d stream 2"].dtype == torch.float32
    assert mixed["d stream 1"].dtype == torch.float16
    for name in mixed:
        torch.testing.assert_close(mixed[name].float(), same[name], rtol=2e-3, atol=2e-3)


def test_dropout_is_one_mask_in_every_implementation():
    """Words from Philox decide, not who computes them; the fraction kept is 1 - p within 5 standard deviations."""
    layout = PackedLayout.from_counts([[700], [300]])
    ones = torch.ones(1000, 130)
    kept = []
    for impl in ("reference", "torch", *(["cpp"] if dispatch.cpp_missing() is None else [])):
        torch.manual_seed(5)
        out = modality_embed([ones], layout, modality_weight=torch.zeros(1, 130), norm=None, dropout_p=0.2, impl=impl)
        kept.append(out != 0)
        torch.testing.assert_close(out[kept[0]], torch.full((int(kept[0].sum()),), 1.25))
    assert all(torch.equal(kept[0], mask) for mask in kept)
    assert abs(kept[0].float().mean() - 0.8) < 5 * (0.2 * 0.8 / kept[0].numel()) ** 0.5


@needs_cpp
@pytest.mark.parametrize("norm", ["layernorm", None])
def test_cpp_gradients_are_bit_equal_between_runs_and_thread_counts(norm):
    """100 repeats.  Every chunk of rows full, repeated ids, every table; three column tasks of the table sums."""
    inputs = make(Case("long", ragged(12, 30, "pgp", 40), 600, norm=norm, **MIXED), torch.float32)
    assert inputs.layout.total_tokens > 1024
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(inputs, "cpp")
        for threads in [1] * 20 + [2] * 80:
            torch.set_num_threads(threads)
            again = run(inputs, "cpp")
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_row(impl):
    inputs = make(BY_NAME["everything"], torch.float32)
    clean = run(inputs, impl)
    layout = inputs.layout
    with torch.no_grad():
        inputs.streams[1][3] = float("nan")
    spoilt = run(inputs, impl)
    token = ((layout.modality_ids == 1) & (layout.source_rows == 3)).nonzero().item()
    others = torch.arange(layout.total_tokens) != token
    assert spoilt["out"][token].isnan().all()
    assert torch.equal(spoilt["out"][others], clean["out"][others])
    rows = torch.arange(len(inputs.streams[1])) != 3
    assert torch.equal(spoilt["d stream 1"][rows], clean["d stream 1"][rows])
    assert torch.equal(spoilt["d stream 2"], clean["d stream 2"])


@pytest.mark.parametrize("impl", IMPLS)
def test_only_wanted_gradients(impl):
    """Frozen parameters and data streams: the others' gradients do not change."""
    inputs = make(BY_NAME["everything"], torch.float32)
    every = run(inputs, impl)
    for frozen in ("modality_weight", "token_weight", "norm_bias", "table 1.0", "stream 1"):
        inputs.leaves.pop(frozen).requires_grad_(False)
    some = run(inputs, impl)
    assert set(every) - set(some) == {
        f"d {n}" for n in ("modality_weight", "token_weight", "norm_bias", "table 1.0", "stream 1")
    }
    assert all(torch.equal(some[name], every[name]) for name in some)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    """A stream that is a slice of a wider projection, and a transposed gradient."""
    inputs = make(BY_NAME["everything"], torch.float32)
    expected = run(inputs, impl)
    wide = torch.randn(len(inputs.streams[1]), 100)
    wide[:, 10:74] = inputs.streams[1].detach()
    inputs.streams[1] = inputs.leaves["stream 1"] = wide[:, 10:74].requires_grad_()
    inputs.grad_out = inputs.grad_out.t().contiguous().t()
    torch.testing.assert_close(run(inputs, impl), expected)


def fwd_arguments(case, impl, dtype=torch.float32):
    inputs = make(case, dtype)
    given, options = inputs.operator_arguments()
    return given, (*options, dtype, impl), inputs.grad_out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["plain", "everything", "everything, no norm", "rmsnorm and dropout", "no token"])
def test_opcheck(name, impl):
    common, rest, grad_out = fwd_arguments(BY_NAME[name], impl)
    torch.library.opcheck(torch.ops.mm.modality_embed_fwd, (*common, *rest))
    _, mean, rstd = op.modality_embed_fwd(*common, *rest)
    # half of the gradients wanted, in turn: both empty and full outputs are checked against the fake
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, common)
    present = [
        *(s.is_floating_point() for s in common[0]),
        True,
        common.token_weight is not None,
        *[i % 2 == 0 for i in range(len(common.tables))],
        common.norm_weight is not None,
        False,
    ]
    backward = (grad_out, *detached, *rest[:3], mean, rstd, present, impl)
    torch.library.opcheck(torch.ops.mm.modality_embed_bwd, backward)


@needs_cpp
def test_cpp_backward_of_several_blocks():
    """More rows than the 8 MiB of gradients that one block holds: table sums are carried from block to block."""
    case = Case("blocks", [[(0, 300), (1, (30, 30)), (2, 300)]] * 2, 1536, (1, 2, 1), (0,), vocab=40)
    assert case.layout.total_tokens * case.width * 4 > 2 * (8 << 20)
    inputs = make(case, torch.float32)
    check(inputs, run(inputs, "cpp"))


def test_other_layouts_do_not_compile_again():
    """Every batch has other lengths.  The second may compile, where two sizes of the first were equal by chance."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(modality_embed, fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for seed, samples in ((1, 3), (2, 5), (3, 8), (4, 6)):
        case = Case("batch", ragged(seed, samples, "pp", 20), 16, (0, 0), dropout_p=0.1)
        inputs = make(case, torch.float32)
        call(inputs.streams, inputs.layout, **inputs.arguments()).sum().backward()
        compiled.append(counter.frame_count)
    assert compiled[1] == compiled[-1] <= 3


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_compiles_without_a_graph_break(impl):
    inputs = make(BY_NAME["everything"], torch.float32)
    expected = run(inputs, impl)
    call = torch.compile(modality_embed, fullgraph=True, backend="aot_eager")
    out = call(inputs.streams, inputs.layout, impl=impl, **inputs.arguments())
    grads = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.grad_out)
    assert torch.equal(out, expected["out"])
    for name, grad in zip(inputs.leaves, grads, strict=True):
        assert torch.equal(grad, expected[f"d {name}"])


def test_result_dtype():
    """Autocast's, else the streams', else the parameters'."""
    layout = PackedLayout.from_counts([[2, 3]])
    ids, weight = torch.tensor([0, 1]), torch.randn(2, 8)
    kwargs = {"modality_weight": weight, "token_weight": torch.randn(4, 8)}
    rows = torch.randn(3, 8)
    assert modality_embed([ids, rows.bfloat16()], layout, **kwargs).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert modality_embed([ids, rows], layout, **kwargs).dtype == torch.bfloat16
    only_text = PackedLayout.from_counts([[2, 0]])
    assert modality_embed([ids, None], only_text, **kwargs).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert modality_embed([ids, None], only_text, **kwargs).dtype == torch.bfloat16


def test_without_a_norm_the_streams_are_not_kept():
    inputs = make(BY_NAME["plain"], torch.float32)
    out = modality_embed(inputs.streams, inputs.layout, **inputs.arguments())
    kept = {t.untyped_storage().data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    assert inputs.streams[0].untyped_storage().data_ptr() not in kept


def test_layout_from_bounds_takes_one_stream():
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, 2, 5], dtype=torch.int32), total_tokens=5, max_seqlen=3)
    weight, rows = torch.randn(1, 8), torch.randn(5, 8)
    out = modality_embed([rows], layout, modality_weight=weight, norm=None)
    torch.testing.assert_close(out, rows + weight)


LAYOUT = PackedLayout.from_segments([[(0, 3), (1, (2, 2))]], num_modalities=2, special_tokens=(1, None))
GOOD = {
    "streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 8)],
    "layout": LAYOUT,
    "modality_weight": torch.zeros(2, 8),
    "token_weight": torch.zeros(5, 8),
    "position_weights": [torch.zeros(4, 8), (torch.zeros(2, 8), torch.zeros(2, 8))],
}
BAD = [
    ({"streams": [torch.tensor([0, 1, 2])], "position_weights": None}, ValueError, "for 1 streams, expected"),
    ({"streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 7)]}, ValueError, r"stream 1 is \(4, 7\)"),
    ({"streams": [torch.tensor([0, 1, 2]), torch.zeros(3, 8)]}, ValueError, "stream 1 has 3 rows, the layout takes 4"),
    ({"streams": [torch.tensor([0, 1, 2]), None]}, ValueError, "stream 1 has 0 rows, the layout takes 4"),
    ({"streams": [torch.tensor([0, 1, 2], dtype=torch.int16), torch.zeros(4, 8)]}, ValueError, "int32 or int64 ids"),
    ({"streams": [torch.tensor([0, 1, 5]), torch.zeros(4, 8)]}, IndexError, "ids from 0 to 5, token_weight has 5 rows"),
    ({"streams": [torch.tensor([0, -1, 2]), torch.zeros(4, 8)]}, IndexError, "ids from -1"),
    ({"token_weight": None}, ValueError, "stream 0 holds token ids, but token_weight is None"),
    (
        {"streams": [torch.zeros(3, 8), torch.zeros(4, 8)], "token_weight": None},
        ValueError,
        "special token 1, but token_weight is None",
    ),
    ({"token_weight": torch.zeros(5, 9)}, ValueError, r"token_weight is \(5, 9\)"),
    (
        {"token_weight": torch.zeros(5, 8).double()},
        ValueError,
        "token_weight is torch.float64, expected torch.float32 like",
    ),
    ({"streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 8).double()]}, ValueError, "float64 is for both or neither"),
    ({"position_weights": [None]}, ValueError, "position_weights has 1 entries"),
    (
        {"position_weights": [torch.zeros(3, 8), None]},
        ValueError,
        "table 0 of modality 0 has 3 rows, the layout needs 4",
    ),
    (
        {"position_weights": [None, (torch.zeros(2, 8), torch.zeros(1, 8))]},
        ValueError,
        "table 1 of modality 1 has 1 rows",
    ),
    ({"position_weights": [None, [torch.zeros(2, 8)] * 4]}, ValueError, "at most 3"),
    ({"norm": "batchnorm"}, ValueError, "norm is 'batchnorm'"),
    ({"norm": None, "norm_bias": torch.zeros(8)}, ValueError, "norm is None, but norm_weight or norm_bias is given"),
    ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight is \(7,\), expected \[8\]"),
    ({"norm_weight": torch.zeros(8, device="meta")}, ValueError, "norm_weight is on meta, expected cpu"),
    (
        {"position_weights": [torch.zeros(4, 8, device="meta"), None]},
        ValueError,
        "position table 0 is on meta, expected cpu",
    ),
    ({"modality_weight": torch.zeros(2, 8).int()}, ValueError, "modality_weight is torch.int32, expected one of"),
    ({"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number >= 0"),
    ({"norm": "rmsnorm", "norm_bias": torch.zeros(8)}, ValueError, "norm is 'rmsnorm', which has no bias"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, expected a number, 0 <= dropout_p < 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1, expected"),
    ({"impl": "fast"}, ValueError, "impl is 'fast'"),
    ({"eps": None}, ValueError, "eps is None, expected a finite number"),
    ({"dropout_p": "0.1"}, ValueError, "dropout_p is '0.1', expected a number"),
    ({"layout": None}, ValueError, "layout is NoneType, expected PackedLayout"),
    ({"modality_weight": np.zeros((2, 8), np.float32)}, ValueError, "modality_weight is ndarray, expected a tensor"),
    ({"token_weight": np.zeros((4, 8), np.float32)}, ValueError, "token_weight is ndarray, expected a tensor or None"),
    ({"streams": [np.zeros(3), None]}, ValueError, "stream 0 is ndarray, expected a tensor or None"),
    ({"streams": [[0, 1, 2], None]}, ValueError, "stream 0 is list, expected a tensor or None"),
    ({"streams": None}, ValueError, "streams is NoneType, expected one tensor or None per modality"),
    ({"modality_weight": torch.tensor(1.0)}, ValueError, r"modality_weight is \(\), expected \[M, E\]"),
    ({"position_weights": 5}, ValueError, "position_weights is int, expected one table"),
    ({"position_weights": torch.zeros(3, 8)}, ValueError, "position_weights has 3 entries, expected one per stream"),
    ({"position_weights": [5, None]}, ValueError, r"position_weights\[0\] is int, expected a table"),
    ({"position_weights": [[None], None]}, ValueError, r"position_weights\[0\] holds NoneType, expected tensors"),
    ({"eps": True}, ValueError, "eps is True, expected a finite number"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_errors_say_what_was_expected(change, error, message):
    modality_embed(**GOOD)
    with pytest.raises(error, match=message):
        modality_embed(**{**GOOD, **change})


def test_generators_of_streams_and_tables_are_taken():
    lazily = {name: (x for x in GOOD[name]) for name in ("streams", "position_weights")}
    assert torch.equal(modality_embed(**{**GOOD, **lazily}), modality_embed(**GOOD))

    class Mine(torch.Tensor):  # what the short way refuses, after it has seen the tables
        pass

    tables = [iter([t] if torch.is_tensor(t) else t) for t in GOOD["position_weights"]]
    weight = GOOD["modality_weight"].as_subclass(Mine)
    found = modality_embed(**{**GOOD, "position_weights": tables, "modality_weight": weight})
    assert torch.equal(found.as_subclass(torch.Tensor), modality_embed(**GOOD))


def test_float64_stays_under_autocast():
    weight, rows = torch.randn(1, 8).double(), torch.randn(3, 8).double()
    layout = PackedLayout.from_counts([[3]])
    expected = modality_embed([rows], layout, modality_weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modality_embed([rows], layout, modality_weight=weight), expected)


def test_a_device_without_kernels_is_named():
    layout, rows = PackedLayout.from_counts([[3]]).to("meta"), torch.zeros(3, 8, device="meta")
    with pytest.raises(RuntimeError, match="modality_embed: nothing can run on meta float32"):
        modality_embed([rows], layout, modality_weight=rows[:1])


@pytest.mark.parametrize("impl", IMPLS)
def test_second_order_gradients_are_refused(impl):
    leaf = torch.randn(4, 8, requires_grad=True)
    out = modality_embed(**{**GOOD, "streams": [torch.tensor([0, 1, 2]), leaf], "impl": impl})
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="modality_embed: only first-order"):
        gradient.sum().backward()


@needs_cpp
@pytest.mark.parametrize("which", ["row", "token", "position", "modality"])
def test_cpp_never_reads_outside_its_arrays(which):
    """Under torch.compile the checks of api.py are skipped; the C++ path still refuses, forward and backward."""
    common, rest, grad_out = fwd_arguments(BY_NAME["everything"], "cpp")
    *tensors, modality_ids, source_rows, positions, rng = torch.utils._pytree.tree_map_only(
        torch.Tensor, torch.clone, common
    )
    _, mean, rstd = op.modality_embed_fwd(*common, *rest)
    if which == "row":
        source_rows[-1] = 1000
    elif which == "token":
        source_rows[0] = -1000
    elif which == "position":
        positions[:, 1] = -5
    else:
        modality_ids[1] = 200
    indices = (modality_ids, source_rows, positions, rng)
    with pytest.raises(RuntimeError, match="points outside"):
        op.modality_embed_fwd(*tensors, *indices, *rest)
    needs = [False, True, True, *[True] * (len(tensors[3]) + 4)]
    with pytest.raises(RuntimeError, match="points outside"):
        torch.ops.mm.modality_embed_bwd(grad_out, *tensors, *indices, *rest[:3], mean, rstd, needs, "cpp")


def test_another_device_is_never_offered_to_the_cpp_path(monkeypatch):
    """A refusal costs more than a kernel's launch, and dropout would draw from the CPU's numbers."""
    monkeypatch.setattr(op, "modality_embed_fwd", lambda *args: pytest.fail("offered"))
    layout = PackedLayout.from_counts([[3, 2]])
    streams = [torch.empty(rows, 8, device="meta") for rows in (3, 2)]
    weight = torch.empty(2, 8, device="meta")
    assert api._quick(streams, layout, weight, None, None, None, None, None, 1e-5, 0.5) is None
