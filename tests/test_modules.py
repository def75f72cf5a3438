"""ModalityEmbedding: parameters, initial values, and that it is modality_embed and nothing else."""

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

from mmkernels.layout import PackedLayout
from mmkernels.modules import INIT_STD, ModalityEmbedding
from mmkernels.ops.modality_embed.api import modality_embed

LAYOUT = PackedLayout.from_segments(
    [[(0, 3), (1, (2, 2))], [(1, (1, 3)), (0, 2)], []], num_modalities=3, special_tokens=(5, 6, None)
)


def embedding(**kwargs):
    return ModalityEmbedding(16, 3, vocab_size=300, positions=[8, (5, 5), None], **kwargs)


def streams():
    return [torch.tensor([1, 2, 3, 1, 0]), torch.randn(7, 16), None]


def test_equals_the_operator():
    module, rows = embedding(), streams()
    text, image = module.position_weights[0], module.position_weights[1]
    expected = modality_embed(
        rows,
        LAYOUT,
        modality_weight=module.modality_weight,
        token_weight=module.token_weight,
        position_weights=[text[0], tuple(image), None],
        norm_weight=module.norm_weight,
        norm_bias=module.norm_bias,
    )
    assert torch.equal(module(rows, LAYOUT), expected)


def test_initial_values():
    module = ModalityEmbedding(256, 3, vocab_size=300, positions=[40, (9, 9), None])
    for name in ("token_weight", "position_weights.0.0", "position_weights.1.1"):
        table = module.get_parameter(name)
        assert table.std().item() == pytest.approx(INIT_STD, rel=0.1)
    assert torch.equal(module.norm_weight, torch.ones(256))
    assert torch.equal(module.norm_bias, torch.zeros(256))


def test_every_parameter_gets_a_gradient_even_when_its_modality_is_missing():
    """Else distributed training would wait for it."""
    module = embedding()
    module(streams(), LAYOUT).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert not module.modality_weight.grad[2].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", None])
def test_state_dict_round_trip(norm, bias):
    module, other = embedding(norm=norm, bias=bias), embedding(norm=norm, bias=bias)
    assert ("norm_weight" in module.state_dict()) == (norm is not None)
    assert ("norm_bias" in module.state_dict()) == (norm == "layernorm" and bias)
    other.load_state_dict(module.state_dict())
    rows = streams()
    assert torch.equal(module(rows, LAYOUT), other(rows, LAYOUT))


def test_dropout_only_while_training():
    module, rows = embedding(dropout=0.4), streams()
    torch.manual_seed(3)
    first, second = module(rows, LAYOUT), module(rows, LAYOUT)
    assert not torch.equal(first, second)  # another mask in every call
    torch.manual_seed(3)
    assert torch.equal(module(rows, LAYOUT), first)
    assert 0.2 < (first == 0).float().mean() < 0.6
    module.eval()
    torch.testing.assert_close(module(rows, LAYOUT)[first != 0], first[first != 0] * 0.6)


def test_checkpoint_recomputes_the_same_mask():
    module, rows = embedding(dropout=0.4), streams()
    torch.manual_seed(3)
    module(rows, LAYOUT).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(module, rows, LAYOUT, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in module.named_parameters())


def test_without_tokens_and_positions():
    module = ModalityEmbedding(16, 1, norm=None)
    assert list(module.state_dict()) == ["modality_weight"]
    rows = torch.randn(4, 16)
    torch.testing.assert_close(module([rows], PackedLayout.from_counts([[1], [3]])), rows + module.modality_weight)


def test_repr_and_errors():
    assert "16, 3, vocab_size=300, positions=[(8,), (5, 5), ()], norm='layernorm'" in repr(embedding())
    assert "norm='rmsnorm', bias=False, dropout=0.1" in repr(embedding(norm="rmsnorm", dropout=0.1))
    with pytest.raises(ValueError, match="norm is 'batchnorm'"):
        embedding(norm="batchnorm")
    with pytest.raises(ValueError, match="expected a number, 0 <= dropout < 1"):
        embedding(dropout=1.0)
    with pytest.raises(ValueError, match=r"position_weights\[0\] has 2 rows, the layout needs 4"):
        ModalityEmbedding(16, 3, vocab_size=300, positions=[2, None, None])(streams(), LAYOUT)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 40), {}, "num_modalities is 40, expected 1 to 32; the number of token ids is vocab_size"),
        ((8, 0), {}, "num_modalities is 0, expected a whole number of at least 1"),
        ((8.0, 1), {}, "width is 8.0, expected a whole number"),
        ((0, 1), {}, "width is 0"),
        ((8, 1), {"vocab_size": 0}, "vocab_size is 0, expected a whole number of at least 1 or None"),
        ((8, 1), {"eps": -1}, "eps is -1, expected a finite number >= 0"),
        ((8, 1), {"eps": "x"}, "eps is 'x', expected a finite number"),
        ((8, 1), {"eps": True}, "eps is True, expected a finite number"),
        ((8, 1), {"dropout": None}, "dropout is None, expected a number"),
        ((True, 1), {}, "width is True, expected a whole number"),
        ((8, 1), {"impl": "nope"}, "impl is 'nope', expected one of auto, "),
        ((8, 3), {"positions": [4]}, "positions has 1 entries, expected one for each of 3"),
        ((8, 3), {"positions": 4}, "positions is int, expected one entry for each of 3"),
        ((8, 3), {"positions": torch.tensor(4)}, "positions is Tensor, expected one entry for each of 3"),
        ((8, 1), {"positions": [True]}, r"positions\[0\] is True, expected a whole number"),
        ((8, 2), {"positions": [5.0, 3]}, r"positions\[0\] is 5.0, expected a whole number of at least 1 for each"),
        ((8, 2), {"positions": [5, (3, -1)]}, r"positions\[1\] is -1"),
        (
            (8, 2),
            {"positions": [(2, 2, 2, 2), None]},
            r"positions\[0\] has 4 tables, expected at most 3, the most axes",
        ),
    ],
)
def test_constructor_arguments_that_do_not_fit(arguments, options, message):
    with pytest.raises(ValueError, match=f"ModalityEmbedding: {message}"):
        ModalityEmbedding(*arguments, **options)


def test_positions_may_be_numpys():
    module = ModalityEmbedding(8, 3, positions=[np.int64(5), None, np.array([2, 3])])
    assert "positions=[(5,), (4,)]" in repr(ModalityEmbedding(8, 2, positions=[np.array(5), torch.tensor(4)]))
    assert "positions=[(5,), (), (2, 3)]" in repr(module)


def test_compiles_with_its_parameters():
    module, rows = embedding(), streams()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows, LAYOUT), module(rows, LAYOUT))


def test_meta_device_and_dtype():
    assert embedding(device="meta").token_weight.is_meta
    assert embedding(dtype=torch.bfloat16).modality_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("given", [torch.randn(8, 16), [torch.randn(8, 16)]], ids=["bare", "other M"])
def test_other_modalities_than_the_layouts_are_named(given):
    """Not the position tables, which the caller never gave."""
    with pytest.raises(ValueError, match=r"modality_weight is \(2, 16\) for . streams, expected .* M = 1"):
        ModalityEmbedding(16, 2)(given, PackedLayout.from_counts([[5], [3]]))
