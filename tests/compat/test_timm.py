"""timm's models with their attention swapped against themselves: outputs, gradients, state_dict, and the way back.

timm needs torchvision, whose wheels load only beside a CUDA build of torch: `make test-cuda-build` runs this file.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

timm = pytest.importorskip("timm")

from mmkernels.compat import timm as mm_timm  # noqa: E402

SMALL = dict(embed_dim=32, depth=2, num_heads=2, num_classes=5)
B, N = 3, 20  # NaFlex: samples, padded patches


def vit(**more):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=32, patch_size=8, **SMALL, **more), torch.randn(B, 3, 32, 32)


def naflex(**more):
    """Grids of 4 x 5 (all patches), 3 x 4 and 1 x 2, the rest padding."""
    torch.manual_seed(0)
    config = timm.models.naflexvit.NaFlexVitCfg(patch_size=4, embed_dim=32, depth=2, num_heads=2, **more)
    model = timm.models.NaFlexVit(config, in_chans=3, num_classes=5)
    coord, valid = torch.zeros(B, N, 2, dtype=torch.long), torch.zeros(B, N, dtype=torch.bool)
    for sample, (rows, cols) in enumerate(((4, 5), (3, 4), (1, 2))):
        coord[sample, : rows * cols] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
        valid[sample, : rows * cols] = True
    return model, dict(patches=torch.randn(B, N, 48), patch_coord=coord, patch_valid=valid)


CASES = {
    "vit": vit,
    "vit, query and key norms": lambda: vit(qk_norm=True),
    "naflex, class token": lambda: naflex(class_token=True, global_pool="token"),
    "naflex, mean": lambda: naflex(global_pool="avg"),
    "naflex, attention pooling": lambda: naflex(global_pool="map"),
    "naflex, key mask": lambda: naflex(global_pool="avg", use_key_only_attn_mask=True),
    "naflex, rotary": lambda: naflex(global_pool="avg", rope_type="axial", pos_embed="none"),
}


def step(model, x):
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("impl", ["auto", "cpp"])  # auto leaves to torch what has nothing to skip
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_same(name, impl):
    model, x = CASES[name]()
    for training in (False, True):
        model.train(training)
        expected, gradients = step(model, x)
        with mm_timm.patch(model, impl=impl) as report:
            found, ours = step(model, x)
        assert len(report.swapped) >= 2
        assert not report.left
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert ours.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=2e-5, msg=key)


class Count(TorchDispatchMode):
    """Operators that run, by name."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.names = []
        return super().__enter__()


def test_padding_goes_to_our_kernel_without_copies():
    model, x = naflex(class_token=True, global_pool="token")
    attention = model.blocks[0].attn
    model.eval()
    mask = timm.models.naflexvit.create_attention_mask(x["patch_valid"], num_prefix_tokens=1)
    tokens = torch.randn(B, N + 1, 32)
    with mm_timm.patch(model), torch.no_grad():
        attention(tokens, attn_mask=mask)
        with Count() as ours:
            attention(tokens, attn_mask=mask)
    assert any("mm.attention" in n or "mm_cpp.attention" in n for n in ours.names), ours.names
    copies = [n for n in ours.names if n.split(".")[1] in ("clone", "copy_", "_to_copy", "contiguous", "where")]
    assert not copies, copies


def test_dropout_still_drops():
    model, x = vit(attn_drop_rate=0.5)
    model.train()
    with mm_timm.patch(model, impl="cpp"), torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_patch_is_a_swap_of_classes_that_can_be_undone():
    model, x = vit()
    model.eval()
    kind, keys = type(model.blocks[0].attn), list(model.state_dict())
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *a: calls.append(1))
    before = model(x)
    function = F.scaled_dot_product_attention
    report = mm_timm.patch(model)
    assert isinstance(model.blocks[0].attn, kind)
    assert list(model.state_dict()) == keys
    assert "blocks.0.attn: Attention" in str(report)
    with pytest.raises(ValueError, match="swapped already"):
        mm_timm.patch(model)
    torch.testing.assert_close(model(x), before)
    assert F.scaled_dot_product_attention is function
    torch.testing.assert_close(copy.deepcopy(model)(x), before)
    report.restore()
    report.restore()
    assert type(model.blocks[0].attn) is kind
    assert torch.equal(model(x), before)
    assert len(calls) == 4


def test_deepcopies_and_pickles_have_weights_of_their_own():
    model, x = vit()
    model.eval()
    mm_timm.patch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.blocks[0].attn.qkv.weight.mul_(3.0)
        assert (twin(x) - model(x)).abs().max() > 1e-4
        with pytest.raises(ValueError, match="swapped already"):
            mm_timm.patch(twin)


def test_what_is_left_and_what_is_refused():
    model, _ = vit()
    model.blocks[1].attn.fused_attn = False
    report = mm_timm.patch(model)
    assert [name for name, _ in report.swapped] == ["blocks.0.attn"]
    assert report.left[0][0] == "blocks.1.attn"
    assert "fused_attn is off" in report.left[0][1]
    report.restore()
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match=r"blocks\.0\.attn and 1 more: fused_attn is off, so it [^:]*$"):
        mm_timm.patch(model)
    model.blocks[0].attn.fused_attn = True
    with pytest.raises(ValueError, match="nothing to swap"):
        mm_timm.patch(torch.nn.TransformerEncoderLayer(8, 2, 8))
    with pytest.raises(ValueError, match=r"timm\.patch: fallback is 'flash', expected one of None, torch"):
        mm_timm.patch(model, fallback="flash")
    # BEiT adds a learned bias to the scores.
    beit = timm.models.Beit(img_size=16, patch_size=8, use_rel_pos_bias=True, **SMALL).eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for block in beit.blocks:
            block.attn.relative_position_bias_table.normal_()
        expected = beit(image)
        with mm_timm.patch(beit), pytest.raises(NotImplementedError, match="attn_mask"):
            beit(image)
        with mm_timm.patch(beit, fallback="torch"):
            torch.testing.assert_close(beit(image), expected)
