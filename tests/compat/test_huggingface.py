"""Hugging Face models with attn_implementation="mmkernels" against their own eager attention, real rows, fp32.

Every model is a random small configuration: what counts is which masks its code asks for.  Outputs and the gradients of
all parameters are held to the error rule: the reference is the model in float64, eager, and "torch" is its sdpa.
"""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from mmkernels.compat import huggingface  # noqa: E402
from mmkernels.testing import error_floor  # noqa: E402

B, L = 3, 13
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(autouse=True, scope="module")
def registered():
    huggingface.register()


def build(model, **config):
    """The model with random weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    built = model._from_config(config.pop("config"), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5 * 1.5)
    return built


def padding(side: str) -> torch.Tensor:
    """Lengths 13, 8 and 1 of 13: full, half, and a single token."""
    mask = torch.zeros(B, L, dtype=torch.long)
    for sample, length in enumerate((L, 8, 1)):
        real = slice(0, length) if side == "right" else slice(L - length, L)
        mask[sample, real] = 1
    return mask


def text(side="right", **more):
    torch.manual_seed(1)
    return dict(input_ids=torch.randint(5, 90, (B, L)), attention_mask=padding(side), **more)


def bert():
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=32, **TINY, **NO_DROPOUT)
    return build(transformers.BertModel, config=config), text(), {"last_hidden_state": "attention_mask"}


def bert_left():
    model, _, rows = bert()
    return model, text("left"), rows


def bert_decoder():
    """Causal self-attention and cross-attention to keys that have padding of their own."""
    config = transformers.BertConfig(
        vocab_size=99, max_position_embeddings=32, is_decoder=True, add_cross_attention=True, **TINY, **NO_DROPOUT
    )
    other = torch.ones(B, L, dtype=torch.long)  # as long as the queries, and padded elsewhere
    other[0, 5:] = 0
    inputs = text(encoder_hidden_states=torch.randn(B, L, 32), encoder_attention_mask=other, use_cache=False)
    return build(transformers.BertModel, config=config), inputs, {"last_hidden_state": "attention_mask"}


def roberta():
    config = transformers.RobertaConfig(vocab_size=99, max_position_embeddings=32, **TINY, **NO_DROPOUT)
    return build(transformers.RobertaModel, config=config), text(), {"last_hidden_state": "attention_mask"}


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=4, **TINY, **NO_DROPOUT)
    return build(transformers.ViTModel, config=config), {"pixel_values": pixels()}, {"last_hidden_state": None}


def clip():
    tower = dict(TINY, projection_dim=16)
    config = transformers.CLIPConfig(
        text_config=dict(tower, vocab_size=99, max_position_embeddings=32, eos_token_id=2),
        vision_config=dict(tower, image_size=16, patch_size=4),
        projection_dim=16,
    )
    outputs = {"text_model_output.last_hidden_state": "attention_mask", "vision_model_output.last_hidden_state": None}
    return build(transformers.CLIPModel, config=config), text(pixel_values=pixels()), outputs


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    inputs = dict(
        input_features=torch.randn(B, 8, 20), decoder_input_ids=torch.randint(5, 90, (B, L)),
        decoder_attention_mask=padding("right"), use_cache=False,
    )  # fmt: skip
    outputs = {"last_hidden_state": "decoder_attention_mask", "encoder_last_hidden_state": None}
    return build(transformers.WhisperModel, config=config), inputs, outputs


def llama(side="right"):
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=1, **TINY)
    return (
        build(transformers.LlamaModel, config=config),
        text(side, use_cache=False),
        dict.fromkeys(["last_hidden_state"], "attention_mask"),
    )


def llama_left():
    return llama("left")


def mistral():
    """A sliding window of 4."""
    config = transformers.MistralConfig(vocab_size=99, num_key_value_heads=1, sliding_window=4, head_dim=16, **TINY)
    return (
        build(transformers.MistralModel, config=config),
        text(use_cache=False),
        {"last_hidden_state": "attention_mask"},
    )


def gemma3():
    """A window of 4 in every second layer, and images of 4 tokens that see themselves whole, at both layers."""
    config = transformers.Gemma3Config(
        text_config=dict(
            TINY, vocab_size=99, num_key_value_heads=1, head_dim=16, sliding_window=4, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=dict(TINY, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=98, boi_token_index=97, eoi_token_index=96,
    )  # fmt: skip
    inputs = text("left", use_cache=False)
    inputs["attention_mask"][2] = 1
    images = torch.zeros(B, L, dtype=torch.bool)
    images[:, 6:10] = True
    inputs["input_ids"][images] = 98
    inputs |= dict(pixel_values=pixels(), token_type_ids=images.long())
    return build(transformers.Gemma3Model, config=config), inputs, {"last_hidden_state": "attention_mask"}


def pixels() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(B, 3, 16, 16)


MODELS = [bert, bert_left, bert_decoder, roberta, vit, clip, whisper, llama, llama_left, mistral, gemma3]


def outcomes(model, inputs, rows, kind: str, *, training: bool):
    """Real rows of the outputs, and the gradients that a fixed weighting of them gives every parameter."""
    model = copy.deepcopy(model).train(training)
    if kind == "exact":
        model = model.double()
        inputs = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }
    model.set_attn_implementation("eager" if kind == "exact" else kind)
    result = model(**inputs)
    torch.manual_seed(3)
    found, loss = {}, 0.0
    for output, mask in rows.items():
        value = result
        for part in output.split("."):
            value = getattr(value, part)
        weight = torch.randn(value.shape).to(value.dtype)
        if mask is not None:
            real = inputs[mask].bool()
            value, weight = value[real], weight[real]
        found[output] = value.detach()
        loss = loss + (value * weight).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, gradients


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.__name__)
def test_real_rows_and_gradients_equal_eager(case, training):
    model, inputs, rows = case()
    exact = outcomes(model, inputs, rows, "exact", training=training)
    theirs = outcomes(model, inputs, rows, "sdpa", training=training)
    ours = outcomes(model, inputs, rows, "mmkernels", training=training)
    assert all(huggingface.uses_interface(model).values())
    # Over the whole model at once, as one tiny tensor may be lucky; errors relative to the largest value of each.
    for part in (0, 1):
        assert ours[part].keys() == exact[part].keys() == theirs[part].keys()
        errors = {"ours": 0.0, "torch": 0.0}
        for name, ref in exact[part].items():
            scale = float(ref.abs().max())
            if scale < 1e-6:  # key biases have no gradient in exact arithmetic
                continue
            floor = error_floor(ref, torch.float32)
            for who, values in (("ours", ours), ("torch", theirs)):
                errors[who] = max(errors[who], (float((values[part][name] - ref).abs().max()) - floor) / scale)
        assert errors["ours"] <= 2 * max(errors["torch"], 1e-7), (case.__name__, part, errors)


def test_a_wrong_mask_would_fail():
    """The comparison above bites: one more visible key, or one less, changes outputs by far more than it allows."""
    (output,) = rows = {"last_hidden_state": None}
    model, inputs, _ = bert()
    right, _ = outcomes(model, inputs, rows, "mmkernels", training=False)
    inputs["attention_mask"][1, 8] = 1
    wrong, _ = outcomes(model, inputs, rows, "mmkernels", training=False)
    assert (wrong[output] - right[output])[1, :8].abs().max() > 1e-2
    model, inputs, _ = mistral()
    right, _ = outcomes(model, inputs, rows, "sdpa", training=False)
    model.config.sliding_window = 3
    wrong, _ = outcomes(model, inputs, rows, "mmkernels", training=False)
    assert (wrong[output] - right[output])[0].abs().max() > 1e-2


def test_dropout_in_training_keeps_the_mean():
    """With dropout in attention alone, the mean over many passes approaches the pass without it."""
    config = transformers.BertConfig(
        vocab_size=99, max_position_embeddings=32, **{**TINY, "num_hidden_layers": 1}, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.3,
    )  # fmt: skip
    model = build(transformers.BertModel, config=config).train()
    model.set_attn_implementation("mmkernels")
    hidden = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda m, args, out: hidden.append(out[0]))
    inputs = text()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        for _ in range(200):
            model(**inputs)
        many = torch.stack([h[real] for h in hidden])
        model.eval()(**inputs)
    error = many.mean(0) - hidden[-1][real]
    spread = many.std(0) / 200**0.5
    assert (many.std(0) > 0).float().mean() > 0.9
    assert error.abs().max() < 6 * spread.max()
    assert error.square().mean() < 2 * spread.square().mean()


def test_vilt_computes_its_own_attention():
    """Its code adds the mask to the scores: the interface is never asked, and the setting is refused by name."""
    config = transformers.ViltConfig(
        vocab_size=99, max_position_embeddings=32, image_size=16, patch_size=4, **TINY, **NO_DROPOUT
    )
    model = transformers.ViltModel._from_config(config, attn_implementation="mmkernels").eval()
    assert huggingface.uses_interface(model) == {"ViltModel": False}
    inputs = text(pixel_values=pixels())
    with pytest.raises(NotImplementedError, match="does not use transformers' attention interface"):
        model(**inputs)
    eager = transformers.ViltModel._from_config(config, attn_implementation="eager").eval()
    assert eager(**inputs).last_hidden_state.isfinite().all()


# Their attention is code of their own; the page on drop-in lists them by why.
MASK_ADDED_TO_OWN_SCORES = ["Vilt", "Longformer", "BigBird", "MPNet", "Flava", "VisualBert"]
MASK_OF_THEIR_OWN = ["DebertaV2", "Reformer", "Funnel", "Blip", "Lxmert"]


@pytest.mark.parametrize("name", [*MASK_ADDED_TO_OWN_SCORES, *MASK_OF_THEIR_OWN])
def test_models_that_never_ask_the_interface(name):
    assert not getattr(transformers, f"{name}Model")._can_set_attn_implementation()
