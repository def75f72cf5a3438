"""A checkpoint comes back bit by bit, says what is wrong with it, and never runs code."""

import dataclasses
import json
import pickle
import re

import pytest
import torch
from builders import Trap, batch_of, learner, samples
from file_map import ROOT, tracked
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmmodel import configs, train
from mmmodel import export as exporting
from mmmodel.export import export, from_pretrained, load_weights, misfits, open_run
from mmmodel.limits import CheckpointError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    config, learned = learner(seed=3)
    path = tmp_path_factory.mktemp("export") / "model.safetensors"
    export(path, learned, config)
    return learned, path


def rewritten(path, target, change, **metadata):
    """A copy with tensors changed, honest about their checksum unless told otherwise."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        kept = {name: value for name, value in file.metadata().items() if name != "crc32"}
    change(tensors)
    save_file(tensors, target, metadata={**kept, **metadata})
    return target


def test_round_trip_is_bit_equal(written):
    learned, path = written
    for source in (path, path.parent, str(path)):  # the file, the folder of a run, text
        again = from_pretrained(source)
        assert again.config == learned.config
        assert again.model.tokenizer.to_str() == learned.model.tokenizer.to_str()
        ours, theirs = learned.state_dict(), again.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not again.training


def test_the_same_model_gives_the_same_file(written, tmp_path):
    """Byte by byte, also where its metadata need escapes."""
    learned, path = written
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    said = '\x00\x1f\x7f\u2028\t\b "\\/ \xe9 \U0001f642'
    for file in files:
        run = open_run(path)
        exporting.write(file, run.tensors, run.config, run.tokenizer, said=said, another="")
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert file.metadata()["said"] == said
    assert misfits(open_run(files[0]).tensors, learned.state_dict()) == []


def test_a_file_that_a_run_replaces_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    """Tensors of one checkpoint with the checksum of another would be called damaged."""
    (config, first), (_, second) = learner(seed=3), learner(seed=4)
    path = tmp_path / "model.safetensors"
    export(path, first, config, step=1)
    read = exporting._config

    def replaced(file, metadata):
        export(path, second, config, step=2)
        return read(file, metadata)

    monkeypatch.setattr(exporting, "_config", replaced)
    run = open_run(path)
    assert run.step == 1
    assert all(torch.equal(run.tensors[name], tensor) for name, tensor in first.state_dict().items())


def test_the_loaded_model_computes_the_same_bits(written):
    learned, path = written
    again = from_pretrained(path)
    items, features = samples()
    with torch.no_grad():
        out = [
            m.model.encode(m.model.streams(batch), batch.layout)
            for m in (learned, again)
            for batch in (batch_of(m, items, features),)
        ]
    assert torch.equal(*out)


def test_a_file_alone_is_enough(written, tmp_path):
    """No config.json or tokenizer.json beside it."""
    (copy := tmp_path / "elsewhere.safetensors").write_bytes(written[1].read_bytes())
    assert from_pretrained(copy).model.tokenizer.get_vocab_size() == 280


def test_the_file_may_be_read_by_whom_the_umask_lets_read(tmp_path):
    """safetensors writes through a temporary file, which only its owner may read."""
    (plain := tmp_path / "plain").touch()
    config, learned = learner()
    export(path := tmp_path / "model.safetensors", learned, config)
    assert path.stat().st_mode == plain.stat().st_mode


def test_names_what_is_missing_extra_or_misshapen(written, tmp_path):
    def change(tensors):
        tensors["model.surplus"] = torch.zeros(3)
        tensors["model.norm.bias"] = torch.zeros(17)
        tensors["model.blocks.0.qkv.bias"] = tensors["model.blocks.0.qkv.bias"].half()
        del tensors["model.blocks.1.up.weight"]

    path = rewritten(written[1], tmp_path / "m.safetensors", change)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(path)
    for words in (
        "missing model.blocks.1.up.weight",
        "extra model.surplus",
        "model.norm.bias is (17,), expected (16,)",
        "model.blocks.0.qkv.bias is torch.float16, expected torch.float32",
    ):
        assert words in str(error.value)


def test_a_scale_without_a_shape_is_read(written, tmp_path):
    """As files of earlier versions have it."""
    name = "objectives.contrastive.log_scale"
    path = rewritten(written[1], tmp_path / "m.safetensors", lambda tensors: tensors.update({name: torch.tensor(2.5)}))
    assert from_pretrained(path).objectives["contrastive"].log_scale.tolist() == [2.5]


def test_a_failed_load_leaves_the_learner_alone(written, tmp_path):
    _, fresh = learner(seed=9)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    path = rewritten(written[1], tmp_path / "m.safetensors", lambda tensors: tensors.pop("model.norm.bias"))
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.bias"):
        load_weights(open_run(path), fresh)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in before.items())


def test_an_earlier_runs_tokenizer_lies_beside_it(written, tmp_path):
    learned, path = written
    metadata = {"config": json.dumps(configs.to_dict(learned.config))}
    save_file(load_file(path), tmp_path / path.name, metadata=metadata)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        from_pretrained(tmp_path)
    learned.model.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert from_pretrained(tmp_path).model.tokenizer.to_str() == learned.model.tokenizer.to_str()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],  # an interrupted copy
        lambda data: b"",
        lambda data: b"\xff" * 64,
        lambda data: data[:8] + b"{" * 40 + data[48:],  # the header
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],  # one bit of one weight
    ],
    ids=["cut", "empty", "noise", "header", "bit"],
)
def test_a_damaged_file_is_a_clear_error(written, tmp_path, damage):
    (path := tmp_path / "model.safetensors").write_bytes(damage(written[1].read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*damaged") as caught:
        from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "{"}, "its configuration does not read"),
        ({"config": "[1]"}, "its configuration does not read"),
        ({"config": json.dumps({"bogus": 1})}, r"no field \['bogus'\]"),
        ({"tokenizer": "{}"}, "its tokenizer does not read"),
    ],
)
def test_damaged_metadata_is_a_clear_error(written, tmp_path, metadata, message):
    path = rewritten(written[1], tmp_path / "m.safetensors", lambda tensors: None, **metadata)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(path)


def test_tensors_of_someone_else_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, path := tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds tensors but no configuration"):
        from_pretrained(path)
    with pytest.raises(CheckpointError, match="`mmmodel pretrain` writes"):
        from_pretrained(tmp_path / "nowhere")


def test_a_pickle_in_disguise_is_refused_and_never_run(tmp_path):
    folder = tmp_path / "sprung"
    (path := tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(folder)))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        from_pretrained(path)
    torch.save(Trap(folder), path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        from_pretrained(path)
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Trap(folder)))
    with pytest.raises(CheckpointError, match="a pickle can run any code"):
        from_pretrained(tmp_path / "model.ckpt")
    assert not folder.exists()
    pickle.loads(pickle.dumps(Trap(folder)))  # the trap works
    assert folder.exists()


def test_no_module_of_the_model_unpickles():
    """torch.load only with weights_only=True; safe_reading.py has an unpickler that knows a few classes."""
    for path in (p for p in tracked(".py") if p.parts[0] == "mmmodel" and p.name != "safe_reading.py"):
        text = (ROOT / path).read_text()
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)|allow_pickle=True", text, re.M), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text)), path


def test_a_run_exports_what_it_trained(tiny, tmp_path):
    """The file in a run's folder is loadable as it is."""
    train.pretrain(dataclasses.replace(tiny, steps=1), tmp_path)
    assert configs.to_dict(from_pretrained(tmp_path).config) == configs.to_dict(dataclasses.replace(tiny, steps=1))
