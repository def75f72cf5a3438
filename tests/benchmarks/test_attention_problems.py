"""The attention benchmark's own parts: its oracle, its masks, its pair counts, and the adapters that a CPU can try."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, attention_pairs, harness, table
from benchmarks.attention_cases import MASKS, Case, cases
from benchmarks.harness import LEFT_OUT, Implementation, built, close
from benchmarks.peers import attention_flex, attention_sdpa_backends, attention_sdpa_padded, packed
from mmkernels import dispatch
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention.api import attention as attend

CPU = torch.device("cpu")


def tiny(mask="full", **options):
    return attention.from_case(Case("stamps", 3, mask, **{"heads": 2, "kv_heads": 2, "width": 16} | options), CPU, 0)


@pytest.mark.parametrize("mask", MASKS)
def test_oracle_by_sample_is_the_whole_reference(mask):
    """Each sample alone, with its own prefix, equals the dense computation on the whole batch."""
    problem = tiny(mask)
    leaves = [x.detach().double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    output = attend(*leaves, layout=problem.layout, mask=problem.mask, impl="reference")
    gradients = torch.autograd.grad(output, leaves, problem.grad_output.double())
    for ours, whole in zip(problem.oracle(), [output, *gradients], strict=True):
        torch.testing.assert_close(ours, whole.detach())


@pytest.mark.parametrize("mask", MASKS)
def test_every_query_of_every_case_sees_something(mask):
    """Dense peers have no answer for a row that sees nothing, and would be excluded as wrong."""
    plan = MaskPlan.lower(tiny(mask).layout, tiny(mask).mask)
    for query in range(plan.layout.total_tokens):
        bits = plan.k_bits[plan.kv_lo[query] : plan.kv_hi[query]]
        assert ((bits & plan.q_bits[query]) != 0).any(), query


def test_cases():
    """Quick is a part of full; the list of issue 3 is there: shapes that repeat, every mask, both widths, groups."""
    for device in ("cpu", "cuda"):
        quick, full = list(cases("quick", device)), list(cases("full", device))
        assert set(quick) <= set(full)
        assert len(set(full)) == len(full)
        assert {case.mask for case in full} == set(MASKS)
    assert {"stamps", "repeats", "uniform", "longtail"} == {case.workload for case in cases("quick", "cpu")}
    assert {64, 128} == {case.width for case in cases("quick", "cpu")}
    assert any(case.kv_heads < case.heads for case in cases("quick", "cpu"))
    lengths = {(case.width, case.mask): set() for case in cases("quick", "cuda") if case.length}
    for case in cases("quick", "cuda"):
        if case.length:
            lengths[case.width, case.mask].add(case.length)
            assert case.samples * case.length == 16384
    assert all({128, 1024, 16384} <= found for found in lengths.values())
    # whom FlexAttention is compiled for comes last: minutes, of which nothing else should want for time
    slow = [attention_flex.FLEX in attention._peers("quick", case, "cuda") for case in cases("quick", "cuda")]
    assert slow == [False] * (len(slow) - 3) + [True] * 3
    rest = set(cases("full", "cuda")) - set(cases("quick", "cuda"))
    assert {(case.dtype, case.width) for case in rest} == {("fp32", 64), ("fp32", 128), ("bf16", 32), ("bf16", 256)}
    # the stage attention_more has those, and both directions in one of what the stage attention has one by one
    later = attention.more_problems(torch.device("cuda"), 0)
    assert {each.case for each in later if "fwd" not in each.directions} == {
        each.case for each in attention.problems("quick", torch.device("cuda"), 0) if "fwd+bwd" not in each.directions
    }
    assert len(lengths) == 4


def test_quick_cases_on_a_gpu_meet_who_may_be_the_fastest():
    """Every case, at less cost: no cuDNN kernel compiled twice for a shape, Flex on the masks of one batch."""
    everyone = {peer.NAME for peer in attention.PEERS}
    costly = {"sdpa_padded", "sdpa_dense", "sdpa_loop", "flex", "flex_with_mask"}
    for deferred in attention.problems("quick", torch.device("cuda"), 0):
        case = next(part for part in deferred.build.args if isinstance(part, Case))
        peers = {peer.NAME for peer in attention._peers("quick", case, "cuda")}
        assert everyone - costly <= peers
        assert ("flex" in peers) == (case.workload == "stamps" and case.mask in ("prefix", "bidirectional", "visible"))
        assert ("sdpa_dense" in peers) == (case.mask not in ("full", "causal"))
        assert ("sdpa_padded" in peers) == ("fwd+bwd" in deferred.directions) == (case.workload != "uniform")
        assert {peer.NAME for peer in attention._peers("full", case, "cuda")} == everyone
    on_cpu = {peer.NAME for peer in attention._peers("quick", Case("stamps", 32, "prefix"), "cpu")}
    assert on_cpu == everyone - {"flex", "flex_with_mask"}
    assert attention._peers("full", Case("stamps", 32, "prefix"), "cpu") == attention.PEERS


def test_who_is_left_out_of_a_quick_case_has_a_row_that_says_so():
    rows = {row.name: row for row in tiny().implementations()}
    assert {peer.NAME for peer in attention.PEERS} <= rows.keys()
    assert rows["flex"].reason == rows["flex_with_mask"].reason == LEFT_OUT


def test_deferred_problems_are_what_they_say():
    """Case, dtype and directions are known before the inputs are drawn, and stay."""
    for deferred in attention.problems("quick", CPU, 0):
        problem = built(deferred)
        assert (problem.case, problem.dtype, problem.directions) == (deferred.case, deferred.dtype, deferred.directions)
        assert built(problem) is problem


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("impl", ["cpp", "torch", "triton"])
def test_pairs_computed(impl, mask):
    """Never less than what is visible, and no more than the tiles or the squares of the samples."""
    if impl == "cpp" and dispatch.missing("attention", "cpp", device=torch.device("cpu"), dtype=torch.float32):
        pytest.skip("the C++ extension is not built")
    plan = tiny(mask).plan
    lengths = plan.layout.cu_seqlens.diff().tolist()
    pairs = attention_pairs.computed(plan, impl, torch.float32, 16)
    assert pairs >= plan.visible_pairs
    assert pairs <= sum((-(-n // 128) * 128) ** 2 for n in lengths)
    if impl != "triton":
        assert pairs <= sum(n * n for n in lengths)
    if impl == "torch" and mask in ("full", "causal"):
        assert pairs == plan.visible_pairs


def test_rows_name_what_auto_takes(capsys):
    problem = tiny()
    ours = [i for i in problem.implementations() if isinstance(i, Implementation) and i.name.startswith("mm.")]
    assert sum("auto" in i.extra for i in ours) == 1
    row = {"op": "attention", "case": "c", "direction": "fwd", "dtype": "fp32", "impl": "mm.x", "median_ms": 1.0}
    row |= {"spread": 0.0, "rate": 1.0, "rate_unit": "TFLOP/s", "percent_of_limit": None, "speedup_over": {}}
    skipped = {key: row[key] for key in ("op", "case", "direction", "dtype")}
    table.print_rows(
        [
            row | {"extra": {"auto": True, "pairs_computed_over_visible": 1.25}},
            row | {"direction": "bwd", "impl": "mm.x"},
            *(skipped | {"impl": "a", "direction": d, "skipped": "no GPU"} for d in ("fwd", "bwd")),
            skipped | {"impl": "b", "skipped": "no GPU"},
        ]
    )
    shown = capsys.readouterr().out
    assert "mm.x (auto)" in shown
    assert "pairs 1.25" in shown
    assert "skipped: a, b (fwd): no GPU" in shown  # once, not once per direction


@pytest.mark.parametrize("mask", ["full", "prefix", "visible"])
def test_flex_adapter(mask):
    """Uncompiled on a CPU, where it has forward alone: its mask_mod says the same as our bounds and bits."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem = tiny(mask, kv_heads=1)
    for builds_mask in (False, True):
        flex = attention_flex.implementation("flex", problem, builds_mask, flex_attention, create_block_mask)
        assert flex.directions == ("fwd",)
        result = flex.packed(flex.forward())
        assert close([result], problem.oracle()[:1]) is None


@pytest.mark.parametrize("mask", ["full", "prefix", "visible"])
def test_beside_flex_with_mask_is_a_row_of_ours_that_makes_its_own(mask, monkeypatch):
    """Like with like: its layout and plan are new in each call, and what it computes is right."""
    problem = tiny(mask)
    assert not any(row.name.endswith("_with_mask") and row.name.startswith("mm.") for row in problem.implementations())
    problem.peers = (attention_flex.FLEX_WITH_MASK,)
    rows = {row.name: row for row in problem.implementations() if isinstance(row, Implementation)}
    (kept,) = [row for row in rows.values() if "auto" in row.extra]
    anew = rows[f"{kept.name}_with_mask"]
    assert anew.directions == rows["flex_with_mask"].directions == ("fwd",)  # a CPU's FlexAttention has no backward
    assert [harness.makes_mask(vars(row)) for row in (kept, anew, rows["flex_with_mask"])] == [False, True, True]
    assert problem.check("fwd", [kept.forward().detach()]) is None  # lowers what the oracle needs, and kept's own
    lowered, made = [], MaskPlan.__init__

    def counted(plan, layout, *rest):
        lowered.append(layout)
        made(plan, layout, *rest)

    monkeypatch.setattr(MaskPlan, "__init__", counted)
    for row, times in ((anew, 3), (kept, 0)):
        lowered.clear()
        assert [harness.checked_call(problem, row, "fwd")[1] for _ in range(3)] == [None] * 3
        assert len({id(layout) for layout in lowered}) == len(lowered) == times


@pytest.mark.parametrize(("case", "masked"), [(Case("stamps", 3), True), (Case("uniform", 3, length=8), False)])
def test_padded_sdpa_has_no_mask_where_nothing_is_padded(monkeypatch, case, masked):
    """With one it would be held to kernels that take masks."""
    problem, given = attention.from_case(case, CPU, 0), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, **options):
        given.append(options.get("attn_mask"))
        return sdpa(*tensors, **options)

    padded = attention_sdpa_padded.build(problem)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert harness.checked_call(problem, padded, "fwd")[1] is None
    assert [mask is not None for mask in given] == [masked]


def test_varlen_adapter_drops_empty_samples():
    problem = tiny()
    problem.layout = type(problem.layout).from_segments([[(0, 4)], [], [(1, 3)]], num_modalities=3)
    seen = []
    packed.varlen("name", problem, lambda q, k, v, *rest: seen.extend(rest)).forward()
    assert seen[0].tolist() == [0, 4, 7]
    assert seen[1:] == [4, False]


def test_peers_say_why_not():
    """On a CPU, every peer of a GPU says so, and no peer that could be timed is left out."""
    reasons = {peer.NAME: peer.missing(tiny("visible")) for peer in attention.PEERS}
    assert reasons.pop("sdpa_dense") is None
    assert reasons.pop("sdpa_loop") is None
    assert reasons.pop("sdpa_padded") == "this mask needs a dense one: sdpa_dense"
    assert reasons.pop("flex") is None
    assert reasons.pop("flex_with_mask") is None
    assert set(reasons.values()) == {"runs on CUDA devices only"}
    assert attention.PEERS[0].missing(tiny("causal")) is None
    assert packed.installed("torch.nn.attention.varlen")
    assert not packed.installed("no_such_package.ops")


def test_who_takes_no_fp32_is_missing_and_has_not_failed():
    for peer, reason in (
        (attention_sdpa_backends.FLASH, "takes bfloat16, float16"),
        (attention_sdpa_backends.CUDNN, "takes bfloat16, float16"),
        (attention_sdpa_backends.EFFICIENT, None),
    ):
        problem = attention.from_case(Case("uniform", 2, "full", 1, 1, 16, "fp32", 8), torch.device("cpu"), 0)
        on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=problem.q.dtype, shape=problem.q.shape)
        seen = SimpleNamespace(q=on_gpu, k=on_gpu, plan=problem.plan, mask=problem.mask)
        assert peer.missing(seen) == reason
