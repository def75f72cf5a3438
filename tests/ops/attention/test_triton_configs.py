"""Which tiles are chosen: pairs computed over visible, candidates, schedules, and a tuner's file over the table.

Host code on CPU; no kernel runs.
"""

import json

import numpy as np
import pytest
import torch

from benchmarks import workloads
from mmkernels import AttentionMask, PackedLayout
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention import configs, tuned
from mmkernels.ops.attention.configs import Candidates, Config, Configs
from mmkernels.ops.attention.inputs import Request

triton_kernels = pytest.importorskip("mmkernels.ops.attention.triton_kernels")

CAUSAL = AttentionMask(causal=True)


def request(dtype=torch.bfloat16, head_dim=64, **options):
    return Request(dtype, head_dim, **{"needs_backward": True, "deterministic": False, "extras": False} | options)


def lognormal(sigma, seed):
    """64 samples, median 403 tokens."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.0, sigma, 64), 16, 8192).astype(int)
    return PackedLayout.from_counts(lengths.reshape(-1, 1))


def chosen(plan, **options):
    return Configs.from_flat(triton_kernels.schedule(plan, request(**options))[-1])


def excess(plan, rows, config):
    """Pairs computed over visible."""
    return plan.cost("token" if config.token else "sample", config.rows, config.cols, rows) / plan.visible_pairs


# The log-normal length profile: lognormal(6.0, 0.7), and the benchmarks' own, lognormal(6.0, 1.0), "longtail".
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["document", "causal"])
def test_pairs_computed_on_the_log_normal_profile(mask, arch, head_dim, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_arch", lambda device: arch)
    for seed in range(3):
        for layout in (lognormal(0.7, seed), workloads.longtail(64, seed)):
            plan = MaskPlan.lower(layout, mask)
            assert excess(plan, "query", chosen(plan, head_dim=head_dim).fwd) <= 1.3


def test_the_cheapest_candidate_is_taken():
    candidates = (Config(128, 64, 8, 3), Config(64, 64, 4, 3, price=1.1))
    short, long = (PackedLayout.from_counts([[n]] * 8) for n in (60, 4096))
    for layout, rows in ((short, 64), (long, 128)):
        with configs.override():
            config, (tiles, _) = triton_kernels._cheapest(MaskPlan.lower(layout), "query", candidates)
        assert (config.rows, config.token) == (rows, False)
        assert (tiles[:, 1] - tiles[:, 0]).max() <= rows


def test_token_tiles_where_they_are_clearly_cheaper():
    candidates = (Config(128, 64, 8, 3),)
    cases = [
        ([[5]] * 40, True),  # 25 samples fit a tile
        ([[128]] * 40, False),  # equal: the tie goes to sample tiles
        ([[200]] * 40, False),
    ]
    for counts, token in cases:
        plan = MaskPlan.lower(PackedLayout.from_counts(counts))
        config, (tiles, spans) = triton_kernels._cheapest(plan, "query", candidates)
        assert config.token is token
        expected = plan.tiles("query", 128, 64, "token" if token else "sample")
        assert torch.equal(tiles, expected.tiles)
        assert torch.equal(spans, expected.spans)


@pytest.mark.parametrize(("length", "rows"), [(60, 64), (500, 128)])
def test_device_side_bounds_choose_by_mean_length(length, rows):
    layout = PackedLayout.from_counts([[length]] * 4)
    layout = PackedLayout._from_device_bounds(layout.cu_seqlens, 4 * length, length, layout.modality_ids, 1)
    config = chosen(MaskPlan.lower(layout)).fwd
    assert (config.rows, config.token) == (rows, True)


def test_override_forces_configuration_and_schedule():
    for schedule in ("sample", "token"):
        plan = MaskPlan.lower(PackedLayout.from_counts([[100], [7]]))
        with configs.override(fwd=Config(32, 16, 4, 1, tma=True), schedule=schedule):
            made = chosen(plan)
        assert made.fwd == Config(32, 16, 4, 1, tma=True, token=schedule == "token")
        assert made.dq.token is (schedule == "token")
    assert configs.forced_schedule() is None
    assert configs.select("sm_80", "bf16", 64).fwd[0].rows == 128


def test_flat_and_back():
    dkdv = Config(64, 32, 4, 2, token=True, late=True, registers=168)
    made = Configs(Config(128, 64, 8, 3, tma=True), dkdv, Config(16, 16, 4, 1), fused=True)
    assert Configs.from_flat(made.flat()) == made
    assert all(type(number) is int for number in made.flat())


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"])
def test_every_architecture_type_and_width_has_candidates(arch):
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (8, 33, 64, 65, 128, 129, 256):
            for extras in (False, True):
                found = configs.select(arch, dtype, width, extras=extras)
                assert isinstance(found, Candidates)
                for kernel in ("fwd", "dkdv", "dq"):
                    assert getattr(found, kernel)
                if arch != "sm_90":
                    assert not any(config.tma or config.late for config in found.fwd)


def entry(**changes):
    base = {
        "arch": "sm_90", "dtype": "bf16", "head_dim": 64, "extras": False, "mask": "causal", "lengths": "long",
        "kernel": "fwd", "config": {"rows": 128, "cols": 128, "warps": 8, "stages": 2, "tma": True},
        "provenance": {"device": "a test"},
    }  # fmt: skip
    return base | changes


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "tuned_path", lambda: path)
    tuned.write([], path)
    return path


def test_a_tuners_entry_comes_before_the_table(tuned_file):
    fp16 = entry(dtype="fp16", config={"rows": 64, "cols": 32, "warps": 4, "stages": 2})
    tuned.write([entry(kernel="dq", dtype="bf16"), fp16, entry()], tuned_file)
    key = {"mask": "causal", "lengths": "long"}
    built_in = configs.select("sm_90", "bf16", 64, mask="document", lengths="long")
    found = configs.select("sm_90", "bf16", 64, **key)
    assert found.fwd == found.dq == (Config(128, 128, 8, 2, tma=True),)
    assert found.dkdv == built_in.dkdv
    half = configs.select("sm_90", "fp16", 64, **key)  # its own entry, and bf16's where it has none
    assert half.fwd == (Config(64, 32, 4, 2),)
    assert half.dq == found.dq
    assert configs.select("sm_90", "bf16", 50, **key).fwd == found.fwd  # the bucket of 64
    for other in ("document", "visible"):
        expected = configs.built_in("sm_90", 2, 64, extras=False, visible=other == "visible")
        assert configs.select("sm_90", "bf16", 64, mask=other, lengths="long") == expected
    assert configs.select("sm_80", "bf16", 64, **key).fwd != found.fwd
    with configs.override(fwd=Config(16, 16, 4, 1)):
        assert configs.select("sm_90", "bf16", 64, **key).fwd == (Config(16, 16, 4, 1),)


def test_what_is_written_can_be_read(tuned_file):
    entries = [entry(), entry(kernel="fused", lengths="short", extras=True)]
    tuned.write(entries, tuned_file)
    assert tuned.read(tuned_file) == entries
    assert len(tuned_file.read_text().splitlines()) == 4  # one entry a line
    tuned.write([], tuned_file)
    assert tuned.read(tuned_file) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bf16, fp16, fp32"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"kernel": "forward"}, "kernel is 'forward'"),
        ({"config": {"rows": 128, "cols": 64, "warps": 8}}, "expected whole rows, cols, warps, stages"),
        ({"config": {"rows": 128, "cols": 64, "warps": 8, "stages": 2, "waves": 1}}, "expected whole rows"),
        ({"config": {"rows": 128, "cols": 64, "warps": 8, "stages": 2, "tma": "yes"}}, "perhaps tma, late, registers"),
        ({"config": {"rows": 128, "cols": 64, "warps": 8, "stages": 2, "registers": -1}}, "perhaps tma, late"),
        ({"config": 3}, "config is 3, expected whole rows"),
        ({"config": {"rows": 512, "cols": 64, "warps": 8, "stages": 2}}, "expected at most 256 rows and cols"),
        ({"provenance": {"date": "today"}}, "provenance names no device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_entries_are_refused_by_name(wrong, message, tuned_file):
    with pytest.raises(ValueError, match=message):
        tuned.write([entry(), entry(**wrong)], tuned_file)
    tuned_file.write_text(json.dumps({"format": 1, "entries": [entry(), entry(**wrong)]}))
    with pytest.raises(ValueError, match=f"entry 1: .*{message}"):
        tuned.read(tuned_file)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "entries": []}', '{"format": 1, "entries": [3]}'])
def test_wrong_files_are_refused_by_name(text, tuned_file):
    tuned_file.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json: "):
        tuned.read(tuned_file)


def test_the_shipped_file_is_valid():
    assert isinstance(tuned.read(tuned.tuned_path()), list)


def test_classes_of_masks_and_lengths():
    def classes(mask, lengths):
        return tuned.classify(MaskPlan.lower(PackedLayout.from_counts([[n, 0] for n in lengths]), mask))

    assert classes(None, [10, 20]) == ("document", "short")
    assert classes(CAUSAL, [256]) == ("causal", "medium")
    assert classes(AttentionMask(causal=True, prefix=(3,)), [5000]) == ("causal", "long")
    assert classes(AttentionMask(causal=True, window=(4, -1)), [0]) == ("window", "short")
    assert classes(AttentionMask.isolated(2), [3]) == ("visible", "short")
