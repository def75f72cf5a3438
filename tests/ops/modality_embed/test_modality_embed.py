"""modality_embed on CPU: values and gradients of every implementation against float64."""

import functools

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from embed_cases import BY_NAME, CASES, IMPLS, MIXED, Case, make, needs_cpp, oracle, ragged, run, torch_same

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed.api import modality_embed
from mmkernels.testing import assert_error_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


# one stream and three; the last in blocks, of which each adds to what those before have summed
@pytest.mark.parametrize(("rows", "streams", "width"), [(20000, 1, 64), (20000, 3, 64), (5000, 1, 4096)])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_of_many_rows_is_as_exact_as_torchs(impl, rows, streams, width):
    layout = PackedLayout.from_counts(np.full((5, streams), rows // (5 * streams)))
    weight, table = torch.zeros(streams, width, requires_grad=True), torch.zeros(rows, width, requires_grad=True)
    grad = torch.randn(layout.total_tokens, width)
    out = modality_embed(
        [torch.zeros(n, width) for n in layout.stream_lengths],
        layout,
        modality_weight=weight,
        position_weights=[table if width == 4096 else None, *[None] * (streams - 1)],
        norm=None,
        impl=impl,
    )
    (ours,) = torch.autograd.grad(out, weight, grad)
    of = [grad[layout.modality_ids == m] for m in range(streams)]
    assert_error_rule(
        "d modality_weight",
        ours,
        torch.stack([part.double().sum(0) for part in of]),
        torch.stack([part.sum(0) for part in of]),
    )


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


@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_numbers_may_be_of_any_kind_that_holds_them(impl):
    """numpy.float16 does not hold 2**32, of which dropout takes a share; nor does int64 every eps."""
    layout = PackedLayout.from_counts([[4]])
    ones, weight = torch.ones(4, 8), torch.zeros(1, 8)
    found = []
    for half in (0.5, np.float16(0.5)):
        torch.manual_seed(0)
        found.append(modality_embed([ones], layout, modality_weight=weight, norm=None, dropout_p=half, impl=impl))
    assert torch.equal(*found)
    assert (modality_embed([ones], layout, modality_weight=weight, eps=2**70, impl=impl) == 0).all()


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


@needs_cpp
def test_cpp_backward_of_several_blocks():
    """More rows than the 8 MiB of gradients that one block holds: table sums are carried from block to block."""
    case = Case("blocks", [[(0, 300), (1, (30, 30)), (2, 300)]] * 2, 1536, (1, 2, 1), (0,), vocab=40)
    assert case.layout.total_tokens * case.width * 4 > 2 * (8 << 20)
    inputs = make(case, torch.float32)
    check(inputs, run(inputs, "cpp"))
