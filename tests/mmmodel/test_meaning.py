"""Alignment with a frozen language model: its loss, who takes part, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from builders import batch_of, objective_learner, samples

from mmmodel import cli, configs, held_out, language_model, pretraining, train
from mmmodel.batches import concept_number
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_shard
from mmmodel.export import from_pretrained
from mmmodel.objectives.meaning import UntaughtError

MEANING = ("objectives.meaning.weight=1", "objectives.meaning.width=6")


def taught(concepts, *more):
    torch.manual_seed(0)
    _, learned = objective_learner(*MEANING, *more)
    vectors = torch.randn(len(concepts), 6)
    learned.objectives["meaning"].teach(torch.tensor(concepts), vectors)
    return learned, vectors


def test_loss_and_gradients_against_the_plain_definition():
    """Concept 7 has two points of a modality; 9 is none that the teacher knows; one modality has 5 alone."""
    learned, vectors = taught([7, 3, 5])
    objective = learned.objectives["meaning"].double()
    modality = torch.tensor([0, 1, 2, 0, 2, 0, 1, 0, 2])
    concept = torch.tensor([7, 7, 5, 3, 5, 7, 9, 5, 5])
    points = torch.nn.functional.normalize(torch.randn(9, 16, dtype=torch.float64), dim=1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss, metrics = objective.loss(points, modality, concept, scale)

    directions = (vectors - vectors.mean(0)).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    target = {c: directions[i] @ objective.map for i, c in enumerate((7, 3, 5))}
    target = {c: t / t.norm() for c, t in target.items()}
    parts = []
    for m in range(3):
        own = [i for i in range(9) if modality[i] == m]
        there = [
            -torch.log(
                torch.exp(scale * points[i] @ target[int(concept[i])])
                / sum(torch.exp(scale * points[i] @ t) for t in target.values())
            )
            for i in own
            if int(concept[i]) in target
        ]
        back = []
        for c, t in target.items():
            same = [i for i in own if concept[i] == c]
            every = sum(torch.exp(scale * points[i] @ t) for i in own)
            if same:
                back.append(sum(-torch.log(torch.exp(scale * points[i] @ t) / every) for i in same) / len(same))
        parts.append((sum(there) / len(there) + sum(back) / len(back)) / 2)
    plain = sum(parts) / 3
    torch.testing.assert_close(loss, plain)
    leaves = [points, scale, objective.map]
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {"loss/text", "loss/image", "loss/audio", "top1/text", "top1/image", "top1/audio"} == set(metrics)


def test_concepts_without_a_vector_cost_nothing():
    learned, _ = taught([1, 2])
    items, features = samples()
    batch = batch_of(learned, items, features)
    prepared = learned.prepare(batch, np.random.default_rng(0))
    loss, _ = learned(batch, dataclasses.replace(prepared, weights={"contrastive": 0.0, "meaning": 1.0}))
    loss.backward()
    assert loss.item() == 0


def test_a_step_before_it_was_taught_is_refused_and_it_needs_the_alignment():
    _, learned = objective_learner(*MEANING)
    batch = batch_of(learned, *samples())
    with pytest.raises(RuntimeError, match="teach\\(\\) comes before"):
        learned.objectives["meaning"](None, None)
    with pytest.raises(ConfigError, match="expected the language model's 4"):
        learned.objectives["meaning"].teach(batch.concept[:2], torch.randn(2, 4))
    with pytest.raises(ConfigError, match="draws the points of contrastive"):
        objective_learner(*MEANING, "objectives.contrastive.weight=0")


def of_texts(name, texts):
    """In the place of a language model: a vector that the text decides."""
    return torch.stack([torch.from_numpy(np.random.default_rng(list(text.encode())).normal(size=6)) for text in texts])


def test_a_run_is_taught_and_read_again_without_the_language_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "sentence_vectors", lambda *args: of_texts(*args).float())
    (tmp_path / "teacher").mkdir()
    teacher = f"objectives.meaning.teacher={tmp_path / 'teacher'}"
    config = configs.override(dataclasses.replace(tiny, steps=2), (*MEANING, "objectives.meaning.language=xx", teacher))
    dataset = pretraining.open_data(config)
    learned = pretraining.Pretraining(config, pretraining.make_tokenizer(config, dataset))
    pretraining.teach(learned, config)
    meaning = learned.objectives["meaning"]
    said = {}  # of training concepts alone
    for i, meta in enumerate(dataset.metas):
        if meta["split"] == "train" and (text := dataset.read_text(i)):
            said.setdefault(meta["concept"], []).append(text)
    means = {name: of_texts("", texts).float().mean(0) for name, texts in said.items()}
    centre = torch.stack(list(means.values())).mean(0)
    assert len(meaning.concepts) == len(means)
    for name, mean in means.items():
        place = (meaning.concepts == concept_number(name)).nonzero().item()
        torch.testing.assert_close(meaning.vectors[place], (mean - centre) / (mean - centre).norm())

    assert train.pretrain(config, tmp_path / "run")
    monkeypatch.setattr(language_model, "sentence_vectors", None)
    (tmp_path / "teacher").rmdir()
    assert train.pretrain(config, tmp_path / "run")  # it is finished, whoever taught it
    trained = from_pretrained(tmp_path / "run")
    assert not torch.equal(trained.objectives["meaning"].map, meaning.map)
    # What is held out has no vectors: its figures leave the objective out, and are the same each time.
    corpus = pretraining.load_corpus(config, dataset, trained.model)
    found = held_out.figures(trained, corpus, corpus.split("test"), batches=2)
    assert {"contrastive/loss", "masked_text/accuracy", "matching/accuracy"} < found.keys()
    assert not any(name.startswith("meaning") for name in found)
    assert found == held_out.figures(trained, corpus, corpus.split("test"), batches=2)


def test_own_data_without_concepts_teaches_each_caption_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "sentence_vectors", lambda *args: of_texts(*args).float())
    write_shard(tmp_path / "a.tar", [{"__key__": f"k{i}", "txt": f"caption {i}"} for i in range(3)])
    config, learned = objective_learner(*MEANING, "objectives.meaning.language=", f"data={tmp_path}")
    pretraining.teach(learned, config)
    assert set(learned.objectives["meaning"].concepts.tolist()) == {concept_number(f"k{i}") for i in range(3)}


def test_a_language_without_captions_is_named(tiny):
    config = configs.override(tiny, MEANING)
    _, learned = objective_learner(*MEANING)
    with pytest.raises(UntaughtError, match=r"meaning has no captions to read.*languages \['xx'\]"):
        pretraining.teach(learned, config)


def test_a_language_model_that_is_not_there_is_named_before_the_data_are_read(tiny, tmp_path):
    fields = (*MEANING, "data=nowhere", "objectives.meaning.teacher=none-such")
    with pytest.raises(ConfigError, match="meaning has no teacher: language model: none-such is neither a folder nor"):
        train.pretrain(configs.override(tiny, fields), tmp_path / "run")


def test_the_command_names_it_before_its_table(tmp_path, capsys):
    fields = ("--set", *MEANING, "objectives.meaning.teacher=none-such", "--out", str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="meaning has no teacher: language model: none-such is neither a folder nor"):
        cli.main(["pretrain", "--preset", "tiny", *fields])
    assert capsys.readouterr().out == ""


def test_a_language_model_that_does_not_read_is_named(tiny, tmp_path):
    fields = (*MEANING, "objectives.meaning.language=xx", f"objectives.meaning.teacher={tmp_path}")
    _, learned = objective_learner(*fields)
    with pytest.raises(ConfigError, match=r"meaning has no teacher: language model: .* has no config\.json") as raised:
        pretraining.teach(learned, configs.override(tiny, fields))
    assert not isinstance(raised.value, UntaughtError)  # `mmmodel ablate` leaves those out
