"""Loading a stranger's weights: what does not fit is named."""

import pytest
import torch
from builders import learner
from torch import nn

from mmmodel import export
from mmmodel.finetuning import weights
from mmmodel.limits import CheckpointError


@pytest.fixture
def run(tmp_path):
    config, made = learner(seed=3)
    export.export(tmp_path / export.FILE, made, config)
    return tmp_path, made


def test_all_that_fits_is_loaded_and_named(run):
    folder, made = run
    _, other = learner(seed=4)
    loaded = weights.load_into(other.model, export.open_run(folder).tensors, where="run", prefix="model.")
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
