"""The Triton kernels through the interpreter: isolation, strides, descriptors, device-side bounds, edges.

test_triton_random.py holds them to the error rule.  bf16 is refused in the interpreter and is owed to a GPU.
"""

import pytest
import torch
from attention_oracle import MASKS, NUM_MODALITIES, Case, Pool, check, make_qkv
from triton_cases import device_bounds, random_case

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention import configs, triton_kernels, triton_launch
from mmkernels.ops.attention.configs import Config
from mmkernels.testing import poisoned_empty, random_layout

pytestmark = pytest.mark.interpreter

# Unequal sides, so that rows and columns cannot be confused.
WIDE, TALL = Config(16, 32, 4, 1), Config(32, 16, 4, 1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """And tiles of few columns too walk whole blocks without a mask."""
    monkeypatch.setattr(triton_kernels, "JOINED", 0)
    with configs.override(fwd=TALL, dkdv=TALL, dq=WIDE):
        yield


def forward(case, **options):
    """out, lse and modality mass of a Case's inputs; nothing else is drawn from the generator."""
    q, k, v, bias = case.arguments(case.leaves)
    torch.manual_seed(case.seed)
    with torch.no_grad():
        return attention(
            q, k, v, layout=case.layout, k_layout=case.k_layout, mask=case.mask, pair_bias=bias,
            dropout_p=case.dropout_p, return_lse=True, return_modality_mass=True, impl="triton", **options,
        )  # fmt: skip


# Nothing; one token between empty samples; whole blocks exactly, and one token to either side.
@pytest.mark.parametrize("schedule", ["sample", "token"])
@pytest.mark.parametrize("counts", [[[0, 0]], [[0, 0], [1, 0], [0, 0]], [[31, 1], [33, 0], [0, 64]]], ids=str)
def test_edges(counts, schedule):
    mask = AttentionMask(causal=True, visible=[[1, 0], [1, 1]])
    with configs.override(schedule=schedule), poisoned_empty():
        check(PackedLayout.from_counts(counts), mask, impl="triton", heads=1, kv_heads=1, mass=True)


def test_full_tiles_run_unmasked_and_blind_rows_are_zero():
    layout = PackedLayout.from_counts([[64, 32, 32]])
    mask = AttentionMask(visible=[[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    spans = MaskPlan.lower(layout, mask).tiles("query", TALL.rows, TALL.cols).spans
    assert (spans[:, 2] == 0).all()  # this case takes the unmasked loop alone
    check(layout, mask, impl="triton", heads=1, kv_heads=1, mass=True)
    qkv = make_qkv(layout, 1, 1, 16, torch.float32, 0)
    with poisoned_empty():
        out, lse, mass = attention(
            *qkv.split(1, 1), layout=layout, mask=mask, return_lse=True, return_modality_mass=True, impl="triton"
        )
        (gradient,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert (out[96:] == 0).all()
    assert (lse[:, 96:] == float("-inf")).all()
    assert (mass[96:] == 0).all()
    torch.testing.assert_close(mass[:96].sum(2), torch.ones(96, 1))
    assert (gradient[96:] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_the_range_of_exp(sign):
    """Rows whose every score is near 200 or -200: exp of one is inf or 0, in whole blocks and in masked ones."""
    layout = PackedLayout.from_counts([[40]])
    k = 40 + torch.rand(40, 1, 16)
    q, v = sign * torch.full((40, 1, 16), 1.25), torch.randn(40, 1, 16)
    out = attention(q, k, v, layout=layout, impl="triton")
    torch.testing.assert_close(out, attention(q, k, v, layout=layout, impl="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["sample", "token"])
@pytest.mark.parametrize("block", range(4))
def test_samples_are_isolated_bit_for_bit(block, schedule):
    """40 layouts.  Finite poison under both schedules, the largest halves of fp16 there; NaN under sample tiles."""
    for seed in range(10 * block, 10 * block + 10):
        random = random_case(seed)
        options = {name: value for name, value in random.options.items() if name not in ("lse_gradient", "mass")}
        options |= {"heads": 1, "kv_heads": 1}  # heads never meet
        results = []
        layout = random.layout
        sample = int(layout.cu_seqlens.diff().argmax())
        rows = slice(*layout.cu_seqlens[sample : sample + 2].tolist())
        poisons = [None, 1e30 if options["dtype"] == torch.float32 else 3e4]
        if schedule == "sample":
            poisons.append(float("nan"))
        for poison in poisons:
            case = Case(layout, random.mask, k_layout=random.k_layout, **options)
            keys = slice(*case.keys.cu_seqlens[sample : sample + 2].tolist())
            if poison is not None:
                for leaf, own in zip(case.leaves[:2], (rows, keys) if case.k_layout else (rows,), strict=False):
                    leaf[: own.start], leaf[own.stop :] = poison, poison
            layout.cache.clear()  # schedules are kept on the layout, and another test's may be there
            with configs.override(schedule=schedule, fwd=random.kernels["fwd"]), poisoned_empty():
                out, lse, mass = forward(case)
            results.append((out[rows], lse[:, rows], mass[rows]))
        for spoilt in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], spoilt, strict=True)), seed


@pytest.mark.parametrize("tma", [False, True])
def test_device_side_bounds_take_token_tiles(tma):
    """Values only: what the schedule reads is a matter for the GPU stage, which forbids syncs."""
    pool = Pool()
    for seed, kind in enumerate(("document", "causal", "visible_causal")):
        layout = device_bounds(random_layout(seed, num_samples=3, num_modalities=NUM_MODALITIES, max_length=14))
        mask = MASKS[kind](layout, seed)
        assert MaskPlan.lower(layout, mask).schedules == ("token",)
        with configs.override(fwd=Config(32, 16, 4, 1, tma=tma)), poisoned_empty():
            check(layout, mask, impl="triton", heads=1, kv_heads=1, mass=True, seed=seed, pool=pool)
    pool.check()


def test_strided_views_of_one_projection():
    layout = random_layout(1, num_samples=3, max_length=16)
    projection = torch.randn(layout.total_tokens, 3, 2, 16)
    for tma in (False, True):
        layout.cache.clear()
        with configs.override(fwd=Config(32, 16, 4, 1, tma=tma)):
            strided = attention(*projection.unbind(1), layout=layout, impl="triton")
            copied = attention(*(t.contiguous() for t in projection.unbind(1)), layout=layout, impl="triton")
        assert torch.equal(strided, copied)


def test_descriptors_and_pointers_agree_bit_for_bit(monkeypatch):
    """A width that the tile pads, so that a descriptor which read on would read the next head."""
    made = []
    monkeypatch.setattr(triton_launch, "TensorDescriptor", counting(triton_launch.TensorDescriptor, made))
    results = []
    for tma in (False, True):
        layout = PackedLayout.from_counts([[40, 0], [9, 20]])
        case = Case(layout, AttentionMask(causal=True), width=24, dtype=torch.float16)
        with configs.override(fwd=Config(32, 16, 4, 1, tma=tma)):
            results.append(forward(case))
        assert len(made) == (2 if tma else 0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def counting(function, calls):
    def wrapper(*args):
        calls.append(args)
        return function(*args)

    return wrapper


def test_no_descriptor_where_the_hardware_takes_none():
    base = torch.zeros(40, 2, 40, dtype=torch.float16)
    assert triton_launch.descriptor(base, 16) is not None
    assert triton_launch.descriptor(base[:, :, :24], 16) is not None
    assert triton_launch.descriptor(base[:, :, 1:25], 16) is None  # starts at 2 bytes
    assert triton_launch.descriptor(base[:1].expand(40, 2, 40), 16) is None  # stride 0
    assert triton_launch.descriptor(torch.zeros(40, 2, 33, dtype=torch.float16), 16) is None  # strides of 66 bytes
    assert triton_launch.descriptor(base[:0], 16) is None


def test_odd_widths_fall_back_to_pointers():
    with configs.override(fwd=Config(32, 16, 4, 1, tma=True)):
        check(random_layout(4, num_samples=2, max_length=14), None, impl="triton", width=33, dtype=torch.float16)


def test_default_tiles_give_the_same_numbers():
    """The table's own blocks, of two architectures, rather than this file's."""
    mask = AttentionMask(causal=True)
    q, k, v = torch.randn(79, 3, 1, 16).unbind(1)
    results = []
    for fwd in (configs.select("sm_80", "fp32", 16).fwd[0], configs.select("sm_90", "bf16", 64).fwd[0]):
        layout = PackedLayout.from_counts([[50, 20], [0, 9]])  # schedules are kept on the layout
        with configs.override(fwd=fwd):
            results.append(attention(q, k, v, layout=layout, mask=mask, impl="triton"))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_dropout_keeps_what_it_promises_on_average():
    """The mean over many pairs is 1 within five standard deviations."""
    layout = PackedLayout.from_counts([[64], [61]])
    q = k = torch.zeros(125, 1, 8)
    v = torch.ones(125, 1, 8)
    out = attention(q, k, v, layout=layout, dropout_p=0.3, impl="triton")
    pairs = 64 * 64 + 61 * 61
    assert abs(float(out[:, :, 0].mean()) - 1) < 5 * (0.3 / 0.7 / pairs) ** 0.5


def test_tf32_follows_torchs_switch():
    q = torch.zeros(1)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, expected in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert triton_launch.precision(q) == expected
            assert triton_launch.precision(q.half()) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_bf16_is_refused():
    layout = PackedLayout.from_counts([[4]])
    q = torch.randn(4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bf16"):
        attention(q, q, q, layout=layout, impl="triton")


def test_more_than_half_may_be_dropped():
    """The threshold then has its highest bit, which a signed comparison would take for a sign."""
    layout = PackedLayout.from_counts([[40]])
    q, k, v = torch.randn(40, 3, 2, 16).unbind(1)
    found = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        found.append(attention(q, k, v, layout=layout, dropout_p=0.8, impl=impl))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
