"""The Triton backward kernels through the interpreter: the deterministic pair and the fused kernel, all features.

Small blocks, so that short samples have full, partial and skipped tiles and tiles that cross samples.  The interpreter
takes a second or two per case, so CI runs each mask and each feature with some of the others; --extended mixes all.
The fused kernel's TMA body cannot run here: test_backward_compiles.py shows what it compiles to.
"""

from dataclasses import replace

import pytest
import torch
from attention_oracle import CROSS_MASKS, MASKS, Case, Pool, check, make_qkv, shared_layout

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.ops.attention import configs, triton_kernels, triton_launch_backward
from mmkernels.ops.attention.configs import Config
from mmkernels.testing import poisoned_empty, random_layout

pytestmark = pytest.mark.interpreter

# Unequal sides, so that rows and columns cannot be confused.
WIDE, TALL = Config(16, 32, 4, 1), Config(32, 16, 4, 1)
# On CPU the table has no fused configuration of its own, which test_which_kernels_run would notice.
PAIR, FUSED = {"fwd": TALL, "dkdv": TALL, "dq": WIDE}, {"fwd": WIDE, "fused": TALL}
DESCRIPTORS = {name: replace(config, tma=True) for name, config in PAIR.items()}
VARIANTS = {"pair": PAIR, "fused": FUSED}
# heads, kv_heads, width: MHA, GQA, MQA; powers of two and not, odd, below the tile's least width.
SHAPES = [(2, 2, 16), (4, 2, 24), (3, 1, 33), (1, 1, 8)]
FEATURES = [
    {},
    {"lse_gradient": True},
    {"dropout_p": 0.3},
    {"pair_bias": True},
    {"pair_bias": True, "dropout_p": 0.6, "lse_gradient": True},
]


@pytest.fixture(autouse=True)
def _spans_of_their_own(monkeypatch):
    """Tiles of few columns too walk whole blocks without a mask."""
    monkeypatch.setattr(triton_kernels, "JOINED", 0)


def override(variant, schedule=None):
    return configs.override(schedule=schedule, **VARIANTS[variant])


def run(pool, case, variant, schedule, dtype, seed, *, cross=False, max_length=9):
    """One case, chosen by its number: masks, shapes and features go round at different speeds."""
    masks = CROSS_MASKS if cross else MASKS
    heads, kv_heads, width = SHAPES[case % len(SHAPES)]
    layout = random_layout(seed, max_length=max_length)
    k_layout = random_layout(seed + 10_000, max_length=max_length) if cross else None
    mask = masks[list(masks)[case % len(masks)]](layout, seed)
    with override(variant, schedule), poisoned_empty():
        check(
            layout, mask, impl="triton", dtype=dtype, heads=heads, kv_heads=kv_heads, width=width, seed=seed,
            pool=pool, k_layout=k_layout, **FEATURES[case % len(FEATURES)],
        )  # fmt: skip


def finish(pool, variant, dtype):
    # A dozen numbers at the noise of fp32, and the fused delta: dbias has a bound of its own, below.
    if variant == "fused" or dtype == torch.float32:
        pool.results.pop("dbias", None)
    pool.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["sample", "token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_rule(variant, schedule, dtype):
    pool = Pool()
    first = 3 * (4 * (variant == "fused") + 2 * (schedule == "token") + (dtype == torch.float16))
    for case in range(first, first + 3):
        run(pool, case, variant, schedule, dtype, seed=case)
    finish(pool, variant, dtype)


@pytest.mark.parametrize("schedule", ["sample", "token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cross_attention(variant, schedule):
    pool = Pool()
    first = 4 * (variant == "fused") + 2 * (schedule == "token")
    for case in range(first, first + 2):
        run(pool, case, variant, schedule, torch.float32, seed=100 + case, cross=True)
    finish(pool, variant, torch.float32)


@pytest.mark.parametrize("mask", [None, AttentionMask(causal=True)], ids=["full", "causal"])
@pytest.mark.parametrize("heads", [(4, 2, 24), (2, 2, 16)], ids=str)
def test_whole_blocks_by_descriptors(heads, mask):
    """Bit for bit what pointers give: grouped heads, a width that is padded, views of one projection."""
    H, G, D = heads
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(110, H + 2 * G, D, generator=generator).half().requires_grad_()
    do = torch.randn(110, H, D, generator=generator).half()
    found = []
    for kernels in (PAIR, DESCRIPTORS):
        with configs.override(schedule="sample", **kernels):
            own = PackedLayout.from_counts([[40], [70]])
            out = attention(*qkv.split((H, G, G), 1), layout=own, mask=mask, impl="triton", deterministic=True)
            found.append((out, *torch.autograd.grad(out, qkv, do)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_that_no_query_sees(variant):
    """No query at all: gradients of keys and values are 0."""
    layout, keys = PackedLayout.from_counts([[0], [0]]), PackedLayout.from_counts([[20], [5]])
    q, k, v = (torch.randn(n, 1, 16, requires_grad=True) for n in (0, 25, 25))
    with override(variant), poisoned_empty():
        out = attention(q, k, v, layout=layout, k_layout=keys, impl="triton", deterministic=variant == "pair")
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(dq) == 0
    assert not dk.any()
    assert not dv.any()


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["sample", "token"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", range(6))
def test_error_rule_on_many(block, variant, schedule, dtype):
    pools = Pool(), Pool(max_ratio=4.0)  # without dropout, with it
    for case in range(22 * block, 22 * block + 22):
        pool = pools["dropout_p" in FEATURES[case % len(FEATURES)]]
        run(pool, case, variant, schedule, dtype, seed=1000 + case, cross=case % 4 == 3, max_length=14)
    for pool in pools:
        finish(pool, variant, dtype)


# Nothing; one token between empty samples; whole blocks exactly, and one token to either side.
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("counts", [[[0, 0]], [[0, 0], [1, 0], [0, 0]], [[31, 1], [17, 0], [0, 32]]], ids=str)
def test_edges(variant, counts):
    mask = AttentionMask(causal=True, visible=[[1, 0], [1, 1]])
    with override(variant), poisoned_empty():
        check(PackedLayout.from_counts(counts), mask, impl="triton", heads=1, kv_heads=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_without_keys_and_keys_without_queries(variant):
    layout, k_layout = PackedLayout.from_counts([[5], [0], [0]]), PackedLayout.from_counts([[0], [7], [0]])
    q, k, v = (torch.randn(t, 1, 8, requires_grad=True) for t in (5, 7, 7))
    with override(variant), poisoned_empty():
        out = attention(q, k, v, layout=layout, k_layout=k_layout, impl="triton")
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dbias_errs_by_no_more_than_its_terms(variant, dtype):
    # To first order ds rounds in fp32 as p (|do| |v| + |do| |out|) does, and delta = rowsum(do out) as out does in
    # its dtype.  The pair takes the second error out again, since a row of ds must sum to 0; a key tile alone cannot.
    layout = random_layout(5, max_length=9)
    case = Case(layout, MASKS["causal"](layout, 5), heads=4, kv_heads=2, width=24, dtype=dtype, pair_bias=True)
    q, k, v, bias = case.arguments([leaf.requires_grad_() for leaf in case.leaves])
    do = case.gradients[0]
    results = {}
    for impl in ("triton", "reference"):
        with override(variant):
            out = attention(q, k, v, layout=layout, mask=case.mask, pair_bias=bias, impl=impl)
        results[impl] = torch.autograd.grad(out, bias, do)[0].double()
    of = torch.nn.functional.one_hot(layout.modality_ids.long(), 3).double()
    k, v = (t.detach().double().repeat_interleave(2, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.detach().double(), k) * case.softmax_scale
    scores = scores + bias.detach().double()[:, layout.modality_ids.long()][:, :, layout.modality_ids.long()]
    p = torch.softmax(scores.masked_fill(~case.seen, float("-inf")), 2)
    dp = torch.einsum("qhd,khd->hqk", do.double().abs(), v.abs())
    delta = (do.double() * out.detach().double()).abs().sum(2).T.unsqueeze(2)
    terms = p * (dp + delta) * 4 * torch.finfo(torch.float32).eps
    if variant == "fused":
        terms = terms + p * delta * torch.finfo(dtype).eps
    bound = torch.einsum("qm,hqk,kn->hmn", of, terms, of)
    error = (results["triton"] - results["reference"]).abs()
    assert (error <= bound).all()
    assert (results["reference"].abs().amax((1, 2)) > 3 * bound.amax((1, 2))).all()  # the bound means something


def counted(monkeypatch):
    """Launches by kernel name from here on."""
    launches = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for kernel in ("dq", "dkdv", "delta", "fused"):
        name = f"attention_bwd_{kernel}_kernel"
        monkeypatch.setattr(triton_launch_backward, name, Counting(kernel, getattr(triton_launch_backward, name)))
    return launches


@pytest.mark.parametrize(
    ("fused", "deterministic", "expected"),
    [(TALL, False, ["delta", "fused"]), (TALL, True, ["dq", "dkdv"]), (None, False, ["dq", "dkdv"])],
    ids=["fused", "deterministic", "no_fused_configuration"],
)
def test_which_kernels_run(monkeypatch, fused, deterministic, expected):
    layout = PackedLayout.from_counts([[20], [3]])
    qkv = make_qkv(layout, 1, 1, 16, torch.float32, 0)
    launches = counted(monkeypatch)
    with configs.override(**PAIR | ({"fused": fused} if fused else {})):
        out = attention(*qkv.split(1, 1), layout=layout, deterministic=deterministic, impl="triton")
        torch.autograd.grad(out.sum(), qkv)
    assert launches == expected


def test_the_pair_repeats_bit_by_bit():
    layout = PackedLayout.from_counts([[20, 9, 4], [0, 3, 0]])
    qkv = make_qkv(layout, 2, 1, 16, torch.float16, 0)
    bias = torch.randn(2, 3, 3, requires_grad=True)
    results = []
    with configs.override(**PAIR | {"fused": TALL}):
        for _ in range(2):
            torch.manual_seed(1)
            out = attention(
                *qkv.split((2, 1, 1), 1), layout=layout, pair_bias=bias, dropout_p=0.2, deterministic=True,
                impl="triton",
            )  # fmt: skip
            results.append(torch.autograd.grad(out, (qkv, bias), torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Finite poison under both schedules, NaN under sample tiles.  visible_blind has rows that see nothing; dropout's factor
# meets infinite dp.
@pytest.mark.parametrize(("schedule", "poison"), [("sample", 1e30), ("token", 1e30), ("sample", float("nan"))])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["document", "visible_blind"])
def test_samples_are_isolated_bit_for_bit(kind, variant, schedule, poison):
    keep = slice(5, 42)
    results = []
    for spoil in (False, True):
        layout = PackedLayout.from_segments([[(0, 5)], [(1, 20), (0, 17)], [(2, 3)]], num_modalities=3)
        qkv = make_qkv(layout, 1, 1, 16, torch.float32, 0)
        generator = torch.Generator().manual_seed(1)
        do, dlse = (torch.randn(shape, generator=generator) for shape in ((45, 1, 16), (1, 45)))
        if spoil:
            with torch.no_grad():
                for t in (qkv, do, dlse.T):
                    t[: keep.start], t[keep.stop :] = poison, poison
        with override(variant, schedule):
            torch.manual_seed(0)
            out, lse = attention(
                *qkv.split(1, 1), layout=layout, mask=MASKS[kind](layout, 1), dropout_p=0.2, return_lse=True,
                impl="triton",
            )  # fmt: skip
            results.append(torch.autograd.grad((out, lse), qkv, (do, dlse))[0][keep])
    assert torch.equal(*results)


@pytest.mark.parametrize("kernels", [PAIR, DESCRIPTORS, FUSED], ids=["pointers", "descriptors", "fused"])
def test_heads_are_isolated_bit_for_bit(kernels):
    """In a tile that pads the width, what follows a head's row is the next head's; whole blocks and masked ones."""
    layout = PackedLayout.from_counts([[40]])
    generator = torch.Generator().manual_seed(0)
    qkv, do = (torch.randn(40, heads, 24, generator=generator).half() for heads in (6, 2))
    found = []
    for poison in (1.0, float("nan")):
        leaves = qkv.clone()
        leaves[:, 1::2], do[:, 1] = poison, poison
        q, k, v = leaves.requires_grad_().split(2, 1)
        with configs.override(schedule="sample", **kernels):
            out = attention(q, k, v, layout=layout, impl="triton", deterministic=kernels is not FUSED)
        (gradient,) = torch.autograd.grad(out, leaves, do)
        found.append(torch.cat([out[:, ::2], gradient[:, ::2]], 1))
        layout.cache.clear()
    assert torch.equal(*found)


def test_token_tiles_sum_dq_across_a_sample_border():
    # One key tile holds the end of a sample and the start of the next: each query's dq has both tiles' parts, and no
    # more.
    layout = shared_layout(3, max_length=16)
    gradients = []
    for schedule in ("sample", "token"):
        qkv = make_qkv(layout, 2, 1, 16, torch.float32, 0)
        fresh = PackedLayout.from_segments(
            [[(int(m), int(n)) for s, m, n, _ in layout.segments if s == i] for i in range(layout.num_samples)],
            num_modalities=3,
        )
        with override("fused", schedule):
            out = attention(*qkv.split((2, 1, 1), 1), layout=fresh, impl="triton")
        gradients.append(torch.autograd.grad(out, qkv, torch.ones_like(out))[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
