"""Training steps side by side: right peers pass, wrong ones do not, and the figures are of what they say."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import limits, run, schema, train_step, train_step_cases
from benchmarks.harness import LEFT_OUT, PREFIX, Missing
from benchmarks.peers import train_packed, train_padded
from benchmarks.train_step_data import Samples, bucketed, spread
from benchmarks.train_step_memory import peak_memory
from mmkernels.masks import AttentionMask
from mmmodel import configs
from mmmodel.flops import StepFlops

CPU = torch.device("cpu")
# Longer than `tiny`, so that samples differ in length; a masked view and hard negatives beside the isolated view.
CONFIG = dataclasses.replace(
    configs.tiny(),
    model=dataclasses.replace(
        configs.tiny().model,
        image=configs.ImageConfig(max_tokens=40, enlarge=False, channels=(4, 8)),
        audio=configs.AudioConfig(mels=8, max_seconds=3.0, channels=8),
    ),
)


def problem(workload="longtail", batch_size=4, **options):
    case = train_step.Case("tiny", workload, batch_size, batches=2, buckets=(2, 2), **options)
    return train_step.build(case, CPU, 0, CONFIG)


@pytest.fixture(autouse=True)
def _memory_unmeasured(monkeypatch):
    """The profiler behind it takes a second per call, and has a test of its own."""
    monkeypatch.setattr(train_step, "peak_memory", lambda call, device: call() or 1_000_000)


@pytest.fixture(scope="module")
def longtail():
    return problem()


def verdict(problem, name):
    (found,) = [i for i in problem.implementations() if i.name == name]
    return problem.check("step", [found.forward()])


@pytest.mark.parametrize("workload", ["stamps", "longtail"])  # the second lacks modalities
def test_right_ones_pass_with_room(workload):
    """A third of the tolerance is not needed: it is rounding that is allowed, not mistakes."""
    tight = problem(workload)
    seen = []
    for implementation in tight.implementations():
        if isinstance(implementation, Missing):
            continue
        step = implementation.forward()
        assert tight.check("step", [step]) is None, implementation.name
        error = train_step.relative_error(step.gradients(*tight.small)[1], tight.reference[1])
        assert error < train_step.GRADIENT_TOLERANCE["fp32"] / 3
        seen.append(implementation.name)
    assert {"mm.packed", "vilt_padded", "bucketed_8", "bucketed_50", "packed_sdpa_loop"} < set(seen)


def test_a_packed_step_finds_nothing_of_the_step_before(longtail):
    """What is kept on a layout would spare the second step the lowering that each step of a run pays."""
    (packed,) = [i for i in longtail.implementations() if i.name == "mm.packed"]
    batch, prepared = packed.forward.batches[0]
    layouts = batch.layout, prepared.masked.layout
    for layout in layouts:
        layout.cache["left behind"] = layout.calls["left behind"] = 1
    packed.forward._step(batch, prepared)
    assert not any("left behind" in kept for layout in layouts for kept in (layout.cache, layout.calls))


def test_compiled_blocks_are_ours_too(monkeypatch):
    """By the compiler's own stand-in, whose graphs are cut where the real one's are."""
    compiled = []

    def compile_(function, **options):
        compiled.append(options)
        return REAL_COMPILE(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    case = problem(compiled=True)
    assert [i.name for i in case.implementations()] == [f"{PREFIX}packed", f"{PREFIX}packed, compiled"]
    assert len(compiled) == 2 * CONFIG.model.layers
    assert verdict(case, f"{PREFIX}packed, compiled") is None


REAL_COMPILE = torch.compile


def test_who_is_left_out_is_never_built(monkeypatch):
    """What does not fit costs neither memory nor time."""
    built = []
    monkeypatch.setattr(train_step.StepProblem, "_implementation", lambda self, name, *_, **__: built.append(name))
    left_out = dict.fromkeys(("packed_varlen_attn", "vilt_padded", "bucketed_50"), "does not fit")
    found = list(problem(every_peer=False, left_out=left_out).implementations())
    left_out |= dict.fromkeys(("packed_sdpa_loop", "vilt_padded, our front ends"), LEFT_OUT)
    assert {row.name: row.reason for row in found if isinstance(row, Missing)}.items() >= left_out.items()
    assert built == [f"{PREFIX}packed", "bucketed_8"]


@pytest.mark.parametrize(
    ("gb", "left_out"),
    [(85.0, {"B64 vilt_padded", "B256 vilt_padded", "B256 bucketed_8", "B256 bucketed_50"}),  # an H100's, as it was
     (150.0, {"B256 vilt_padded", "B256 bucketed_8", "B256 bucketed_50"})],
)  # fmt: skip
def test_padded_layouts_are_tried_where_they_fit(monkeypatch, gb, left_out):
    monkeypatch.setattr(train_step, "memory_gb", lambda device: gb)
    monkeypatch.setattr(train_step.StepProblem, "_implementation", lambda *_, **__: None)
    found = set()
    for case in (train_step_cases.B64, train_step_cases.B256, train_step_cases.B48):
        rows = [i for i in train_step.build(case, CPU, 0).implementations() if isinstance(i, Missing)]
        found |= {f"B{case.batch_size} {row.name}" for row in rows if row.reason.startswith("needs about")}
    assert found == left_out


def test_the_loss_that_others_are_held_to_keeps_few_activations(longtail):
    """In fp32 they would be twice those of what is timed, and a batch that keeps a GPU busy would not fit."""

    def kept(learner):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
        with hooks, StepFlops(learner) as flops:
            loss, _ = learner(*longtail.small)
        return loss, flops.total, sum(sizes)

    loss, flops, size = kept(longtail.learner)
    found_loss, found_flops, found_size = kept(longtail.exact)
    assert torch.equal(found_loss, loss)
    assert found_flops == flops
    assert found_size < size / 2


def _sees_padding(block, x, bias):
    return RIGHT_BLOCK(block, x, torch.zeros_like(bias))


def _leaks(front_end, padded):
    """Padding is not set to zero again between the convolutions."""
    everything = [torch.ones_like(real) for real in padded.real]
    return RIGHT_CLIPS(front_end, dataclasses.replace(padded, real=[padded.real[0], *everything[1:]]))


def _loses_a_gradient(block, x, bias):
    return RIGHT_BLOCK(block, x, bias) + (block.down.bias.detach() - block.down.bias)


RIGHT_BLOCK, RIGHT_CLIPS = train_padded.padded_block, train_padded.clips


@pytest.mark.parametrize(
    ("name", "wrong"), [("padded_block", _sees_padding), ("clips", _leaks), ("padded_block", _loses_a_gradient)]
)
def test_wrong_ones_are_caught(monkeypatch, name, wrong):
    monkeypatch.setattr(train_padded, name, wrong)
    assert verdict(problem(), "vilt_padded").startswith("wrong: ")


@pytest.mark.parametrize("table", ["modality_weight", "token_weight"])
def test_a_wrong_table_is_caught(monkeypatch, table):
    """One row of a table is another modality's, or another token's."""
    original = train_padded.PaddedModel.__init__

    def shifted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_load_state_dict_post_hook(lambda module, _: _roll(getattr(module.embedding, table)))

    monkeypatch.setattr(train_padded.PaddedModel, "__init__", shifted)
    assert verdict(problem(), "vilt_padded").startswith("wrong: the loss")


def _roll(table):
    with torch.no_grad():
        table.copy_(table.roll(1, 0))


def test_a_run_compares_by_real_tokens(longtail, monkeypatch):
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(limits.GEMM_SIZE, "cpu", 128)
    monkeypatch.setattr(run, "MAX_SECONDS_PER_DIRECTION", 0.02)
    document = run.run("train_step", CPU, seconds=600.0, problems=[longtail])
    assert schema.errors(document) == []
    rows = {row["impl"]: row for row in document["rows"]}
    assert "CUDA devices only" in rows["packed_varlen_attn"]["skipped"]
    assert "no backward on CPU" in rows["packed_flex"]["skipped"]
    ours, bucketed_8 = rows[f"{PREFIX}packed"], rows["bucketed_8"]
    tokens = sum(longtail.samples.lengths[b].sum() for b in bucketed(longtail.samples.lengths, 4, 1)[:2])
    assert ours["rate"] == pytest.approx(tokens / (ours["median_ms"] * 1e-3))
    assert ours["rate_unit"] == "tokens/s"
    assert ours["speedup_over"]["bucketed_8"] == pytest.approx(ours["rate"] / bucketed_8["rate"])
    assert ours["extra"]["slots_per_token"] == 1.0 < bucketed_8["extra"]["slots_per_token"]
    assert bucketed_8["extra"]["slots_per_token"] < rows["vilt_padded"]["extra"]["slots_per_token"]
    assert ours["percent_of_limit"] > 0  # of products so small that a busy machine makes any figure of them
    assert ours["extra"]["peak_memory_mb"] == 1


def test_varlen_and_flex_take_the_bounds_they_need(longtail, monkeypatch):
    """They run on GPUs; here their callers do, with stand-ins for what they call."""
    from torch.nn.attention import varlen
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def loop(q, k, v, bounds_q, bounds_k, longest_q, longest_k):
        assert longest_q == int(bounds_q.diff().max())
        parts = [range(a, b) for a, b in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True) if b > a]
        heads = [[t[part].transpose(0, 1) for t in (q, k, v)] for part in parts]
        return torch.cat([F.scaled_dot_product_attention(*each) for each in heads], dim=1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", loop)
    batch, _ = longtail.small
    expected = longtail.learner.model
    streams = [stream.detach() for stream in expected.streams(batch)]
    for attend in (train_packed.varlen, train_packed.flex(flex_attention, create_block_mask), train_packed.sdpa_loop):
        model = train_packed.PackedModel(CONFIG.model, expected.tokenizer, attend=attend)
        model.load_state_dict(expected.state_dict())
        for mask in (None, AttentionMask.isolated(3)):
            with torch.no_grad():
                ours, theirs = (m.encode(streams, batch.layout, mask) for m in (expected, model))
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_buckets_hold_every_sample_once_and_are_sorted_within_a_pool():
    lengths = np.random.default_rng(0).integers(1, 1000, 96)
    batches = bucketed(lengths, 4, 8)
    assert sorted(np.concatenate(batches)) == list(range(96))
    for pool in range(3):
        own = batches[8 * pool : 8 * (pool + 1)]
        assert set(np.concatenate(own)) == set(range(32 * pool, 32 * (pool + 1)))
        assert all(lengths[a].max() <= lengths[b].min() for a, b in itertools.pairwise(own))
    assert [list(b) for b in bucketed(lengths, 4, 1)[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("of", "number", "places"),
    [(8, 8, range(8)), (8, 4, (1, 2, 5, 6)), (8, 2, (2, 5)), (50, 4, (6, 18, 31, 43)), (1, 4, (0,))],
)
def test_spread_takes_short_and_long_in_their_shares(of, number, places):
    assert [int(b[0]) for b in spread([np.array([i]) for i in range(of)], number)] == list(places)


def test_drawn_lengths_are_what_the_docstring_says():
    native = Samples.draw("stamps", configs.native().model, 20_000, 0)
    for part, wanted in ((0, (5, 12, 44)), (1, (9, 99, 800)), (2, (17, 29, 90))):
        lengths = native.parts[:, part]
        found = np.percentile(lengths[lengths > 0], (5, 50, 95))
        assert np.allclose(found[1:], wanted[1:], rtol=0.15), (part, found)
        assert 0.5 < found[0] / wanted[0] < 2, (part, found)  # few tokens, whatever their number
    longtail = Samples.draw("longtail", configs.native().model, 20_000, 0).parts
    assert np.allclose((longtail == 0).mean(axis=0), (0.05, 0.4, 0.5), atol=0.08)  # a little less: never all three


def test_peak_memory_counts_what_is_held_at_one_time():
    def call():
        for _ in range(3):
            held = torch.ones(1 << 18)  # 1 MiB, let go of before the next
            held = held + 1
        return held

    assert 2 << 20 <= peak_memory(call, CPU) < 4 << 20


def test_cases_of_every_device_name_presets():
    for device in ("cpu", "cuda"):
        presets = [case.preset for shapes in ("quick", "full") for case in train_step.cases(shapes, device)]
        assert set(presets) == {"demo", "native", "base"}
