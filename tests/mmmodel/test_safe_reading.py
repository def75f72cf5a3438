"""A checkpoint to resume from that is damaged, or more than data, is a clear error, and nothing in it runs."""

import io
import pickle

import pytest
import torch
from builders import Trap, learner

from mmmodel import checkpoint, update
from mmmodel.limits import CheckpointError


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, and what it was saved from: weights and averages that are not the initial ones."""
    config, learned = learner(seed=1)
    optimizer = update.make_optimizer(learned, config)
    for parameter in learned.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = checkpoint.save(tmp_path, 7, learned, optimizer, {"step": 7, "skipped": 2}, keep=2)
    return folder, learned, optimizer


def resume(folder):
    config, fresh = learner(seed=2)
    optimizer = update.make_optimizer(fresh, config)
    return checkpoint.load(folder, fresh, optimizer, {"step": 0, "skipped": 0}), fresh, optimizer


def test_an_honest_checkpoint_comes_back_bit_by_bit(saved):
    folder, learned, optimizer = saved
    progress, fresh, restored = resume(folder)
    assert progress == {"step": 7, "skipped": 2}
    for name, value in learned.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    before, after = optimizer.state_dict(), restored.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(state[name], after["state"][number][name]) for name in state)


def test_a_trap_in_the_index_is_refused_and_never_sprung(saved, tmp_path):
    folder = saved[0]
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match=r"names (posix|nt|os)\.mkdir, which no checkpoint needs: not read"):
        resume(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_trap_in_a_value_is_refused_and_never_sprung(saved, tmp_path):
    """Values that are no tensors, such as the step, are read by torch.load: here one is replaced in the file."""
    folder = saved[0]
    with (folder / ".metadata").open("rb") as file:
        index = pickle.load(file)  # our own
    place, where = next((k, v) for k, v in index.storage_data.items() if k.fqn == "progress.step")
    buffer = io.BytesIO()
    torch.save(Trap(tmp_path / "sprung"), buffer)
    data = folder / where.relative_path
    index.storage_data[place] = type(where)(where.relative_path, data.stat().st_size, len(buffer.getvalue()))
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="damaged: "):
        resume(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_cut_file_is_a_clear_error(saved, name, caplog):
    folder = saved[0]
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="step-00000007: damaged"):
        resume(folder)
    assert not [record for record in caplog.records if record.name.startswith("torch")]  # it would log a traceback


def test_a_flipped_bit_is_damage_too(saved):
    """In a weight torch's reader does not see it: the run would go on from other weights."""
    folder = saved[0]
    values = folder / "__0_0.distcp"
    written = values.read_bytes()
    weight = saved[1].state_dict()["model.blocks.0.qkv.weight"].numpy().tobytes()
    at = written.index(weight)
    values.write_bytes(written[:at] + bytes([weight[0] ^ 1]) + written[at + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged, __0_0\.distcp does not match its checksum; deleting"):
        resume(folder)
    (folder / checkpoint.SUMS).unlink()  # as earlier versions wrote it
    resume(folder)


@pytest.mark.parametrize(
    ("name", "letter", "message"),
    [
        (".metadata", b"model.blocks.0.qkv.weight", r"damaged, \.metadata does not match its checksum; deleting"),
        (checkpoint.SUMS, b"__0_0", r"damaged, its crc32\.json names other files than are there; deleting"),
    ],
)
def test_a_flipped_bit_in_a_name_is_damage_too(saved, name, letter, message):
    """In a tensor's it looks like another model, in a file's like one that is missing."""
    path = saved[0] / name
    written = path.read_bytes()
    at = written.index(letter)
    path.write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
    with pytest.raises(CheckpointError, match=message):
        resume(saved[0])


def test_no_index_and_another_model_are_clear_errors(saved, tmp_path):
    folder = saved[0]
    config, wider = learner(mlp_width=48)
    message = "step-00000007: of another model: Size mismatch .*; choose another --out$"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder, wider, update.make_optimizer(wider, config), {"step": 0, "skipped": 0})
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"not a checkpoint, it has no \.metadata"):
        resume(folder)


@pytest.mark.parametrize(("damage", "reason"), [("cut", "EOFError"), ("gone", "No such file")])  # the first has no text
def test_the_message_names_the_reason_the_folder_and_what_deleting_it_does(saved, damage, reason):
    """The run does not go back by itself: what was trained since would be lost without a word."""
    folder = saved[0]
    values = folder / "__0_0.distcp"
    if damage == "cut":
        values.write_bytes(values.read_bytes()[:100])
    else:
        values.unlink()
    message = f"damaged: .*{reason}.*; deleting the folder {folder} begins the run anew$"
    with pytest.raises(CheckpointError, match=message):
        resume(folder)
    (folder.parent / "step-00000003").mkdir()
    (folder.parent / "step-00000009").mkdir()
    with pytest.raises(CheckpointError, match=f"; deleting the folder {folder} goes back to step-00000003$"):
        resume(folder)
