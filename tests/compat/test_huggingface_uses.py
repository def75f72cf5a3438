"""What users do with a Hugging Face model: pack, continue a cache, generate, compile, checkpoint, autocast."""

import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as mu  # noqa: E402

from mmkernels.compat import huggingface  # noqa: E402

LENGTHS = (5, 1, 7)
TINY = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


@pytest.fixture(autouse=True, scope="module")
def registered():
    huggingface.register()


def decoder(kind=transformers.LlamaModel, attention="mmkernels", **more):
    torch.manual_seed(0)
    config = kind.config_class(num_key_value_heads=1, head_dim=16, pad_token_id=0, **TINY, **more)
    model = kind._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 8.0)
    return model


def sequences() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(1, 99, (1, n)) for n in LENGTHS]


def alone(model) -> torch.Tensor:
    """Each sequence in a call of its own, by eager attention."""
    model.set_attn_implementation("eager")
    found = torch.cat([model(input_ids=ids, use_cache=False).last_hidden_state for ids in sequences()], 1)
    model.set_attn_implementation("mmkernels")
    return found.detach()


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_equal_each_alone(window):
    """By position_ids, which begin again; and by cu_seq_lens, which then decide alone."""
    model = decoder() if window is None else decoder(transformers.MistralModel, sliding_window=window)
    expected = alone(model)
    ids = torch.cat(sequences(), 1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    by_positions = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(by_positions, expected, rtol=1e-4, atol=1e-4)
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    longest = torch.tensor(7)
    for cu_k in (bounds, bounds.clone()):  # collators give one tensor, or two
        packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=cu_k, max_length_q=longest, max_length_k=7)
        by_bounds = model(input_ids=ids, position_ids=positions, use_cache=False, **packed).last_hidden_state
        torch.testing.assert_close(by_bounds, expected, rtol=1e-4, atol=1e-4)
    padding = torch.ones(1, 13)
    padding[0, 12] = 0
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q with a padding"):
        model(input_ids=ids, position_ids=positions, attention_mask=padding, use_cache=False, **packed)


@pytest.mark.parametrize("window", [None, 3])
def test_packs_that_transformers_does_not_see_are_refused(window):
    """With a cache, which is the default, it does not look at position_ids: sequences would see one another."""
    model = decoder() if window is None else decoder(transformers.MistralModel, sliding_window=window)
    model.set_attn_implementation("mmkernels")
    ids = torch.cat(sequences(), 1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    for cached in (model.eval(), model.train()):
        with pytest.raises(ValueError, match=r"position_ids begin again.*use_cache=False, or cu_seq_lens_q"):
            cached(input_ids=ids, position_ids=positions)
    model(input_ids=ids, position_ids=torch.arange(13).unsqueeze(0) + 2)
    left = torch.tensor([[0] * 5 + [1] * 8])
    model(input_ids=ids, position_ids=(left.cumsum(1) - 1).masked_fill(left == 0, 1), attention_mask=left)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_forward_that_continues_a_cache_equals_one_pass(cache):
    model = decoder()
    torch.manual_seed(2)
    ids, padding = torch.randint(1, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padding[1, :3] = 0
    model.set_attn_implementation("eager")
    whole = model(input_ids=ids, attention_mask=padding, use_cache=False).last_hidden_state
    model.set_attn_implementation("mmkernels")
    store = (
        transformers.DynamicCache() if cache == "dynamic" else transformers.StaticCache(model.config, max_cache_len=16)
    )
    model(input_ids=ids[:, :4], attention_mask=padding[:, :4], past_key_values=store)
    rest = model(input_ids=ids[:, 4:], attention_mask=padding, past_key_values=store).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_greedy_generation_equals_eager():
    """Not what it is for (each step plans again), but not wrong."""
    model = decoder(transformers.LlamaForCausalLM)
    ids, padding = torch.randint(1, 99, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    padding[0, :2] = 0
    found = []
    for name in ("eager", "mmkernels"):
        model.set_attn_implementation(name)
        found.append(model.generate(ids, attention_mask=padding, max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)


def batch(length: int) -> dict:
    torch.manual_seed(3)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, length:] = 0
    return dict(input_ids=torch.randint(1, 99, (2, 12)), attention_mask=mask, use_cache=False)


def test_compiled_model_breaks_its_graph_and_is_not_compiled_again_for_other_lengths():
    """Masks are read by host code, so fullgraph is not to be had; what is between the breaks is compiled once."""
    model = decoder(transformers.LlamaModel)
    compiled = torch.compile(model, backend="eager")
    for length in (9, 4, 7):
        inputs = batch(length)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            compiled(**inputs).last_hidden_state[real], model(**inputs).last_hidden_state[real], rtol=1e-4, atol=1e-5
        )
        frames = dict(torch._dynamo.utils.counters["frames"])
        if length == 9:
            first = frames
    assert frames == first
    torch._dynamo.reset()


def test_gradient_checkpointing_and_autocast():
    model = decoder().train()
    inputs = batch(7)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs).last_hidden_state[inputs["attention_mask"].bool()].square().sum().backward()
        return model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-5)
    found = []
    for name in ("sdpa", "mmkernels"):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found.append(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()].float())
    assert (found[0] - found[1]).abs().max() < 0.06 * found[0].abs().max()


def test_models_with_more_than_masked_softmax_are_refused_by_name():
    """T5 adds a bias for each pair of positions, Gemma 2 caps its scores, GPT-OSS has sinks."""
    ids = torch.randint(1, 99, (1, 6))
    t5 = transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    gemma2 = transformers.Gemma2Config(num_key_value_heads=1, head_dim=16, **TINY)
    oss = transformers.GptOssConfig(num_key_value_heads=1, head_dim=16, num_local_experts=2, **TINY)
    for kind, config, argument in (
        (transformers.T5EncoderModel, t5, "position_bias"),
        (transformers.Gemma2Model, gemma2, "softcap"),
        (transformers.GptOssModel, oss, "s_aux"),
    ):
        model = kind._from_config(config, attn_implementation="mmkernels").eval()
        with pytest.raises(NotImplementedError, match=argument):
            model(input_ids=ids)


def test_dense_masks_of_a_user_are_read_back():
    model = decoder()
    ids = torch.randint(1, 99, (2, 6))
    seen = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    seen[1, :, :, 0] = False
    seen[1, :, 0, 0] = True
    found = []
    for name in ("sdpa", "mmkernels"):
        model.set_attn_implementation(name)
        found.append(model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_scaling_reaches_dense_and_packed_attention_and_masks_must_fit():
    q, seen = torch.randn(2, 2, 6, 16), torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, seen, scale=0.4).transpose(1, 2)
    bounds, module = torch.tensor([0, 6, 12], dtype=torch.int32), torch.nn.Module()
    dense, _ = huggingface.attention_forward(module, q, q, q, seen, scaling=0.4)
    packed, _ = huggingface.attention_forward(
        module, q, q, q, None, scaling=0.4, is_causal=True, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds
    )
    for out in (dense, packed):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cu_seq_lens_q is given without cu_seq_lens_k"):
        huggingface.attention_forward(module, q, q, q, None, cu_seq_lens_q=bounds)
    for shape in ((3, 6, 6), (2, 5, 6), (2, 6, 5)):
        mask = huggingface.attention_mask(*shape)
        with pytest.raises(ValueError, match="attention_mask is for"):
            huggingface.attention_forward(module, q, q, q, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_are_causal_as_the_mask_says_and_windows_have_two_sides(causal, window):
    """A mask goes before is_causal; a window of 3 is two tokens to each side, as for flash-attention."""
    q = torch.randn(2, 2, 6, 16)  # sequences of 4, 5 and 3 in 12 tokens
    bounds, sample = torch.tensor([0, 4, 9, 12], dtype=torch.int32), torch.tensor([0] * 4 + [1] * 5 + [2] * 3)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    seen = (sample[:, None] == sample) & (distance >= 0 if causal else distance < 12)
    if window is not None:
        seen &= distance.abs() < window
    row = q.transpose(1, 2).reshape(1, 12, 2, 16).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(row, row, row, seen).transpose(1, 2).view(2, 6, 2, 16)
    function = mu.causal_mask_function if causal else mu.bidirectional_mask_function
    mask = huggingface.attention_mask(2, 6, 6, mask_function=function, allow_is_bidirectional_skip=True)
    packed = dict(sliding_window=window, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    for given, says in ((mask, not causal), (None, causal)):
        out, _ = huggingface.attention_forward(torch.nn.Module(), q, q, q, given, is_causal=says, **packed)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_same_however_the_mask_is_given():
    """Of one seed, for intervals, a dense mask and bounds of sequences as long as the rows."""
    q = torch.randn(2, 6, 2, 16).transpose(1, 2)
    bounds = torch.tensor([0, 6, 12], dtype=torch.int32)
    function = mu.sliding_window_causal_mask_function(3)  # not causal alone: for that SDPA has torch's own dropout
    outs = {}
    for name, mask, more in (
        ("intervals", huggingface.attention_mask(2, 6, 6, mask_function=function), {}),
        ("dense", mu.sdpa_mask(2, 6, 6, 0, 0, function, allow_is_causal_skip=False), {}),
        ("packed", None, dict(is_causal=True, sliding_window=3, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)),
    ):
        torch.manual_seed(4)
        outs[name], _ = huggingface.attention_forward(torch.nn.Module(), q, q, q, mask, dropout=0.5, **more)
    for name in ("dense", "packed"):
        torch.testing.assert_close(outs[name], outs["intervals"], msg=name)


class Itself(torch.nn.Module):
    is_causal = False

    def forward(self, hidden_states, attention_mask=None, **kwargs): ...


class Another(torch.nn.Module):
    is_causal = False

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs): ...


def test_rows_of_padding_are_skipped_where_queries_are_the_keys():
    """Keys may be of a second sequence where a module takes one: their padding says nothing of the queries."""
    q, real = torch.randn(2, 2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    mask = huggingface.attention_mask(
        2, 6, 6, mask_function=mu.bidirectional_mask_function, attention_mask=real, allow_is_bidirectional_skip=True
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, real[:, None, None]).transpose(1, 2)
    out, _ = huggingface.attention_forward(Another(), q, q, q, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out, _ = huggingface.attention_forward(Itself(), q, q, q, mask)
    torch.testing.assert_close(out, expected * real[:, :, None, None], rtol=1e-4, atol=1e-5)


def test_one_mask_serves_layers_of_other_heads():
    """Contiguous tensors are taken head by head, unless the keys have fewer: each has a plan of its own."""
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    mask = huggingface.attention_mask(2, 6, 6, attention_mask=real)
    seen = real[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    for heads, kv_heads in ((2, 2), (4, 4), (4, 2)):
        q, k = torch.randn(2, heads, 6, 16), torch.randn(2, kv_heads, 6, 16)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, seen, enable_gqa=True).transpose(1, 2)
        out, _ = huggingface.attention_forward(torch.nn.Module(), q, k, k, mask)
        torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-5)


def test_a_transformers_that_is_too_old_is_refused_by_name(monkeypatch):
    # By name: transformers puts another object in its own place when the first model is asked for.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.3")
    with pytest.raises(ImportError, match=r"transformers 4\.57\.3 is installed, expected 5\.0 or later"):
        huggingface.register()
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import fails then
    with pytest.raises(ImportError, match=r"^huggingface.register: .*; pip install 'transformers>=5.0'$"):
        huggingface.register()
