"""A run that starts from an earlier one has its weights and tokenizer, and nothing else of it."""

import dataclasses
import logging
import shutil

import pytest
import torch
from builders import weights
from test_language_model import write_model

from mmmodel import cli, configs, language_model, metrics, start, train
from mmmodel.configs import ConfigError
from mmmodel.data import synthetic
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.run import finetune
from mmmodel.limits import CheckpointError

STILL = ("lr=1e-30", "weight_decay=0", "steps=1")  # a step that changes nothing: what was loaded is what is written


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Other captions, from which another tokenizer would be made."""
    return synthetic.prepare(tmp_path_factory.mktemp("others") / "synthetic", samples=40, seed=1)


def test_weights_and_tokenizer_are_the_earlier_runs_on_other_data(run, others, tmp_path, monkeypatch):
    out, loads, load = tmp_path / "next", [], start.load
    monkeypatch.setattr(start, "load", lambda *args: loads.append(args) or load(*args))
    cli.main(["pretrain", "--from", str(run), "--out", str(out), "--set", *STILL, f"data={others}"])
    assert len(loads) == 1  # a second learner would take as much memory again
    before, after = weights(run), weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (out / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()
    assert [line["step"] for line in metrics.read(out / "metrics.jsonl")] == [1]


def test_it_learns_from_step_0_and_is_resumed_without_the_earlier_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "earlier")
    config = dataclasses.replace(start.configured(tmp_path / "earlier"), steps=3, checkpoint_every=2)
    assert train.pretrain(config, tmp_path / "whole")
    assert train.pretrain(config, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "earlier")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000003")
    (tmp_path / "stopped" / "model.safetensors").unlink()
    assert train.pretrain(config, tmp_path / "stopped")
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not torch.equal(whole["model.blocks.0.qkv.weight"], weights(run)["model.blocks.0.qkv.weight"])
    assert [line["step"] for line in metrics.read(tmp_path / "stopped" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("field", ["objectives.masked_image.weight=1", "model.embed_width=8"])
def test_objectives_that_do_not_fit_begin_anew_and_the_log_says_so(run, tmp_path, caplog, field):
    caplog.set_level(logging.INFO)
    config = configs.override(start.configured(run), (*STILL, field))
    train.pretrain(config, tmp_path)
    anew = "masked_image" if "image" in field else "contrastive"
    line = next(record.message for record in caplog.records if record.message.startswith("from "))
    assert line.endswith(f"; begin anew: {anew}")
    assert "encoder, " in line
    before, after = weights(run), weights(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith(f"objectives.{anew}."))


def test_longer_inputs_and_fewer_modalities_keep_what_they_share(run, tmp_path, caplog):
    """As for a last phase on longer captions and larger pictures: rows of positions that are new are drawn."""
    caplog.set_level(logging.INFO)
    fields = ("model.modalities=text,image", "model.text.max_tokens=30", "model.image.max_tokens=4")
    fields += ("model.text.vocab_size=300",)
    train.pretrain(configs.override(start.configured(run), (*STILL, *fields, "objectives.matching.weight=0")), tmp_path)
    line = next(record.message for record in caplog.records if record.message.startswith("from "))
    side = weights(run)["model.embedding.position_weights.1.0"].shape[0]
    changes = f"positions of text: 24 -> 30; positions of image: {side} -> 5; positions of image: {side} -> 5"
    assert f"; left out: audio; {changes}" in line
    assert "; model.text.vocab_size=300 does nothing: the tokenizer is the earlier run's" in line
    assert "begin anew" not in line
    before, after = weights(run), weights(tmp_path)
    assert {n for n in before if ".front_ends.audio." in n or "position_weights.2" in n} == {
        n for n in before if n.startswith("model.") and n not in after
    }
    for name, tensor in after.items():
        rows = slice(min(len(tensor), len(before[name]))) if tensor.ndim else ...
        assert torch.equal(tensor[rows], before[name][rows]), name
    drawn = after["model.embedding.position_weights.0.0"][24:]
    assert drawn.std() > 0


def test_modalities_in_another_order_keep_their_own(run, tmp_path):
    train.pretrain(configs.override(start.configured(run), (*STILL, "model.modalities=audio,text")), tmp_path)
    before, after = weights(run), weights(tmp_path)
    for name in ("model.embedding.modality_weight", "objectives.contrastive.heads"):
        assert torch.equal(after[name], before[name][[2, 0]])
    assert torch.equal(after["model.embedding.position_weights.0.0"], before["model.embedding.position_weights.2.0"])


def test_a_modality_that_the_earlier_run_lacks_is_named(run, tmp_path):
    """Also one whose special token the tokenizer has, from a run before that one."""
    config = configs.override(start.configured(run), (*STILL, "model.modalities=text,image,video"))
    with pytest.raises(ConfigError, match=r"does not read video, expected some of text, image, audio$"):
        train.pretrain(config, tmp_path / "video")
    train.pretrain(configs.override(start.configured(run), (*STILL, "model.modalities=text,audio")), tmp_path / "fewer")
    again = configs.override(start.configured(tmp_path / "fewer"), (*STILL, "model.modalities=text,image,audio"))
    with pytest.raises(ConfigError, match=r"does not read image, expected some of text, audio$"):
        train.pretrain(again, tmp_path / "again")


def test_a_fine_tuned_run_gives_its_encoder(run, tmp_path):
    finetune(run, FinetuneConfig(label="category", epochs=1), tmp_path / "tuned")
    train.pretrain(configs.override(start.configured(tmp_path / "tuned"), STILL), tmp_path / "next")
    before, after = weights(tmp_path / "tuned"), weights(tmp_path / "next")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("model."))


def test_a_run_that_began_with_a_language_model_may_have_fewer_word_pieces_than_bytes(tiny, tmp_path):
    """Its tokenizer is there: none of our own, which begins with the bytes, is made."""
    shaped = language_model.shaped(tiny, write_model(tmp_path, "bert"))
    assert shaped.model.text.vocab_size < 256
    train.pretrain(dataclasses.replace(shaped, steps=1), tmp_path / "first")
    train.pretrain(configs.override(start.configured(tmp_path / "first"), STILL), tmp_path / "next")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "next")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_shape_is_one_line_and_the_folder_stays_free(run, tmp_path):
    arguments = ["--from", str(run), "--out", str(tmp_path / "next")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", *arguments, "--set", "model.width=32", "model.text.max_tokens=30"])
    words = "has another shape: model.width is 32, there 16"
    assert str(stopped.value) == f"pretrain: {run / 'model.safetensors'} {words}"
    with pytest.raises(SystemExit, match=r"has another shape: model\.width is 64, there 16; "):
        cli.main(["pretrain", *arguments, "--preset", "quick"])
    with pytest.raises(SystemExit, match=r"has another shape: model\.heads is 1, there 2$"):  # though all tensors fit
        cli.main(["pretrain", *arguments, "--set", "model.heads=1"])
    with pytest.raises(SystemExit, match=r"has another shape: model\.activation is gelu, there gelu_tanh$"):
        cli.main(["pretrain", *arguments, "--set", "model.activation=gelu"])
    with pytest.raises(SystemExit, match="no such file"):
        cli.main(["pretrain", "--from", str(tmp_path), "--out", str(tmp_path / "next")])
    assert [path.name for path in (tmp_path / "next").iterdir()] == [".lock"]


def test_two_starts_are_refused(run, tmp_path):
    config = dataclasses.replace(start.configured(run), language_model="bert")
    with pytest.raises(configs.ConfigError, match="from an earlier run or from a language model, not from both"):
        train.pretrain(config, tmp_path / "next")
    with pytest.raises(CheckpointError, match="no such file"):
        start.configured(tmp_path)
