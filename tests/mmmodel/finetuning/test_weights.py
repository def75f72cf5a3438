"""Reading a stranger's weights: what does not fit is named, what is damaged is said, and nothing is unpickled."""

import dataclasses
import json
import pickle

import pytest
import torch
from builders import learner
from safetensors.torch import load_file, save_file
from torch import nn

from mmmodel import export
from mmmodel.export import CheckpointError
from mmmodel.finetuning import weights


@pytest.fixture
def run(tmp_path):
    config, made = learner(seed=3)
    export.export(tmp_path / export.FILE, made, config)
    return tmp_path, made


def test_a_run_opens_by_its_folder_or_its_file(run):
    folder, made = run
    for path in (folder, folder / export.FILE):
        opened = weights.open_run(path)
        assert opened.config.seed == 3
        assert opened.tensors.keys() == made.state_dict().keys()
        assert opened.tokenizer.get_vocab_size() == made.model.tokenizer.get_vocab_size()


def test_all_that_fits_is_loaded_and_named(run):
    folder, made = run
    _, other = learner(seed=4)
    loaded = weights.load_into(other.model, weights.open_run(folder).tensors, where="run", prefix="model.")
    assert loaded.missing == loaded.misshapen == loaded.extra == []
    assert set(loaded.matched) == {f"model.{name}" for name in made.model.state_dict()}
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor)


def changed():
    """A module of three tensors, and weights of which one is missing, one misshapen and one unknown."""
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1, bias=False)})
    tensors = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(1, 4), "c": torch.ones(1)}
    return module, tensors


def test_missing_extra_and_misshapen_tensors_are_named_and_nothing_is_loaded():
    module, tensors = changed()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing a.bias; extra c; b.weight is \(1, 4\), expected \(1, 3\)"):
        weights.load_into(module, tensors, where="here")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_partial_loading_takes_what_fits_and_reports_the_rest():
    module, tensors = changed()
    loaded = weights.load_into(module, tensors, where="here", partial=True)
    assert loaded == weights.Loaded(["a.weight"], ["a.bias"], ["b.weight"], ["c"])
    assert loaded.summary() == "1 tensors loaded; 1 missing (a.bias); 1 misshapen (b.weight); 1 extra (c)"
    assert torch.equal(module["a"].weight, torch.ones(3, 2))


def test_another_dtype_is_not_taken_in_silence():
    module, _ = changed()
    with pytest.raises(CheckpointError, match="float16"):
        weights.load_into(module, {n: t.half() for n, t in module.state_dict().items()}, where="here")


def test_weights_of_another_model_are_an_error_even_if_partial():
    module, _ = changed()
    with pytest.raises(CheckpointError, match="none of its 1 tensors fits"):
        weights.load_into(module, {"x": torch.ones(1)}, where="here", partial=True)


def test_a_pickle_is_never_read(tmp_path):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("a stranger's pickle was run",))

    for name in ("model.pt", "model.bin", "model.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(CheckpointError, match="a pickle can run any code"):
            weights.open_run(tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload()))  # by another name
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        weights.open_run(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "header", "flip", "empty"])
def test_a_damaged_file_is_an_error_of_one_line(run, damage):
    folder, _ = run
    path = folder / export.FILE
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "header":
        data[:8] = b"\xff" * 8
    elif damage == "flip":
        data[-100] ^= 0x10  # in a tensor: only the checksum can tell
    else:
        data = bytearray()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        weights.open_run(folder)
    assert "\n" not in str(caught.value)


def test_a_file_without_configuration_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no configuration"):
        weights.open_run(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        weights.open_run(tmp_path)


def test_an_earlier_runs_tokenizer_lies_beside_it(run):
    folder, made = run
    config, tensors = made.config, load_file(folder / export.FILE)
    metadata = {"config": json.dumps(dataclasses.asdict(config))}
    save_file(tensors, folder / export.FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        weights.open_run(folder)
    made.model.tokenizer.save(str(folder / "tokenizer.json"))
    assert weights.open_run(folder).tokenizer.get_vocab_size() == made.model.tokenizer.get_vocab_size()
