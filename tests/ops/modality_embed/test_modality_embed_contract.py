"""modality_embed on CPU: the operator's contract, compilation, what it keeps, and what it refuses."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from embed_cases import BY_NAME, IMPLS, Case, make, needs_cpp, ragged, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.layout import PackedLayout
from mmkernels.ops.modality_embed import api, op
from mmkernels.ops.modality_embed.api import modality_embed


def fwd_arguments(case, impl, dtype=torch.float32):
    inputs = make(case, dtype)
    given, options = inputs.operator_arguments()
    return given, (*options, dtype, impl), inputs.grad_out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["plain", "everything", "everything, no norm", "rmsnorm and dropout", "no token"])
def test_opcheck(name, impl):
    common, rest, grad_out = fwd_arguments(BY_NAME[name], impl)
    torch.library.opcheck(torch.ops.mm.modality_embed_fwd, (*common, *rest))
    _, mean, rstd = torch.ops.mm.modality_embed_fwd(*common, *rest)
    # half of the gradients wanted, in turn: both empty and full outputs are checked against the fake
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, common)
    present = [
        *(s.is_floating_point() for s in common[0]),
        True,
        common.token_weight is not None,
        *[i % 2 == 0 for i in range(len(common.tables))],
        common.norm_weight is not None,
        False,
    ]
    backward = (grad_out, *detached, *rest[:3], mean, rstd, present, impl)
    torch.library.opcheck(torch.ops.mm.modality_embed_bwd, backward)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_operators_refuse_meta_tensors_beside_real_ones(impl, learns):
    """Their results would stay as the memory was.  Meta tensors alone have results of a shape."""
    common, rest, grad_out = fwd_arguments(BY_NAME["plain"], impl)
    weight = common.modality_weight.requires_grad_(learns)
    mixed = common._replace(source_rows=common.source_rows.to("meta"))
    with pytest.raises(ValueError, match="mm::modality_embed_fwd: source_rows is on meta, streams on cpu"):
        torch.ops.mm.modality_embed_fwd(*mixed, *rest)
    _, mean, rstd = torch.ops.mm.modality_embed_fwd(*common, *rest)
    needs = [leaf is weight for leaf in common.leaves]
    with pytest.raises(ValueError, match="mm::modality_embed_bwd: source_rows is on meta, grad_out on cpu"):
        torch.ops.mm.modality_embed_bwd(grad_out, *mixed, *rest[:3], mean, rstd, needs, impl)
    alone = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), tuple(common))
    assert torch.ops.mm.modality_embed_fwd(*alone, *rest)[0].shape == grad_out.shape


def test_other_layouts_do_not_compile_again():
    """Every batch has other lengths.  The second may compile, where two sizes of the first were equal by chance."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(modality_embed, fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for seed, samples in ((1, 3), (2, 5), (3, 8), (4, 6)):
        case = Case("batch", ragged(seed, samples, "pp", 20), 16, (0, 0), dropout_p=0.1)
        inputs = make(case, torch.float32)
        call(inputs.streams, inputs.layout, **inputs.arguments()).sum().backward()
        compiled.append(counter.frame_count)
    assert compiled[1] == compiled[-1] <= 3


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_compiles_without_a_graph_break(impl):
    inputs = make(BY_NAME["everything"], torch.float32)
    expected = run(inputs, impl)
    call = torch.compile(modality_embed, fullgraph=True, backend="aot_eager")
    out = call(inputs.streams, inputs.layout, impl=impl, **inputs.arguments())
    grads = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.grad_out)
    assert torch.equal(out, expected["out"])
    for name, grad in zip(inputs.leaves, grads, strict=True):
        assert torch.equal(grad, expected[f"d {name}"])


def test_result_dtype():
    """Autocast's, else the streams', else the parameters'."""
    layout = PackedLayout.from_counts([[2, 3]])
    ids, weight = torch.tensor([0, 1]), torch.randn(2, 8)
    kwargs = {"modality_weight": weight, "token_weight": torch.randn(4, 8)}
    rows = torch.randn(3, 8)
    assert modality_embed([ids, rows.bfloat16()], layout, **kwargs).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert modality_embed([ids, rows], layout, **kwargs).dtype == torch.bfloat16
    only_text = PackedLayout.from_counts([[2, 0]])
    assert modality_embed([ids, None], only_text, **kwargs).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert modality_embed([ids, None], only_text, **kwargs).dtype == torch.bfloat16


def test_without_a_norm_the_streams_are_not_kept():
    inputs = make(BY_NAME["plain"], torch.float32)
    out = modality_embed(inputs.streams, inputs.layout, **inputs.arguments())
    kept = {t.untyped_storage().data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    assert inputs.streams[0].untyped_storage().data_ptr() not in kept


def test_layout_from_bounds_takes_one_stream():
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, 2, 5], dtype=torch.int32), total_tokens=5, max_seqlen=3)
    weight, rows = torch.randn(1, 8), torch.randn(5, 8)
    out = modality_embed([rows], layout, modality_weight=weight, norm=None)
    torch.testing.assert_close(out, rows + weight)


LAYOUT = PackedLayout.from_segments([[(0, 3), (1, (2, 2))]], num_modalities=2, special_tokens=(1, None))
GOOD = {
    "streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 8)],
    "layout": LAYOUT,
    "modality_weight": torch.zeros(2, 8),
    "token_weight": torch.zeros(5, 8),
    "position_weights": [torch.zeros(4, 8), (torch.zeros(2, 8), torch.zeros(2, 8))],
}
BAD = [
    ({"streams": [torch.tensor([0, 1, 2])], "position_weights": None}, ValueError, "for 1 streams, expected"),
    ({"streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 7)]}, ValueError, r"stream 1 is \(4, 7\)"),
    ({"streams": [torch.tensor([0, 1, 2]), torch.zeros(3, 8)]}, ValueError, "stream 1 has 3 rows, the layout takes 4"),
    ({"streams": [torch.tensor([0, 1, 2]), None]}, ValueError, "stream 1 has 0 rows, the layout takes 4"),
    ({"streams": [torch.tensor([0, 1, 2], dtype=torch.int16), torch.zeros(4, 8)]}, ValueError, "int32 or int64 ids"),
    ({"streams": [torch.tensor([0, 1, 5]), torch.zeros(4, 8)]}, IndexError, "ids from 0 to 5, token_weight has 5 rows"),
    ({"streams": [torch.tensor([0, -1, 2]), torch.zeros(4, 8)]}, IndexError, "ids from -1"),
    ({"token_weight": None}, ValueError, "stream 0 holds token ids, but token_weight is None"),
    (
        {"streams": [torch.zeros(3, 8), torch.zeros(4, 8)], "token_weight": None},
        ValueError,
        "special token 1, but token_weight is None",
    ),
    ({"token_weight": torch.zeros(5, 9)}, ValueError, r"token_weight is \(5, 9\)"),
    (
        {"token_weight": torch.zeros(5, 8).double()},
        ValueError,
        "token_weight is torch.float64, expected torch.float32 like",
    ),
    ({"streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 8).double()]}, ValueError, "float64 is for both or neither"),
    ({"position_weights": [None]}, ValueError, "position_weights has 1 entries"),
    (
        {"position_weights": [torch.zeros(3, 8), None]},
        ValueError,
        r"position_weights\[0\] has 3 rows, the layout needs 4",
    ),
    (
        {"position_weights": [None, (torch.zeros(2, 8), torch.zeros(1, 8))]},
        ValueError,
        r"position_weights\[1\]\[1\] has 1 rows",
    ),
    ({"position_weights": [None, [torch.zeros(2, 8)] * 4]}, ValueError, "at most 3"),
    ({"norm": "batchnorm"}, ValueError, "norm is 'batchnorm'"),
    ({"norm": None, "norm_bias": torch.zeros(8)}, ValueError, "norm is None, but norm_weight or norm_bias is given"),
    ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight is \(7,\), expected \[8\]"),
    ({"norm_weight": torch.zeros(8, device="meta")}, ValueError, "norm_weight is on meta, expected cpu"),
    (
        {"position_weights": [torch.zeros(4, 8, device="meta"), None]},
        ValueError,
        r"position_weights\[0\] is on meta, expected cpu",
    ),
    ({"modality_weight": torch.zeros(2, 8).int()}, ValueError, "modality_weight is torch.int32, expected float32"),
    ({"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number >= 0"),
    ({"norm": "rmsnorm", "norm_bias": torch.zeros(8)}, ValueError, "norm is 'rmsnorm', which has no bias"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, expected a number, 0 <= dropout_p < 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1, expected"),
    ({"impl": "fast"}, ValueError, "impl is 'fast'"),
    ({"eps": None}, ValueError, "eps is None, expected a finite number"),
    ({"dropout_p": "0.1"}, ValueError, "dropout_p is '0.1', expected a number"),
    ({"layout": None}, ValueError, "layout is NoneType, expected PackedLayout"),
    ({"modality_weight": np.zeros((2, 8), np.float32)}, ValueError, "modality_weight is ndarray, expected a tensor"),
    ({"token_weight": np.zeros((4, 8), np.float32)}, ValueError, "token_weight is ndarray, expected a tensor or None"),
    ({"streams": [np.zeros(3), None]}, ValueError, "stream 0 is ndarray, expected a tensor or None"),
    ({"streams": [[0, 1, 2], None]}, ValueError, "stream 0 is list, expected a tensor or None"),
    ({"streams": None}, ValueError, "streams is NoneType, expected one tensor or None per modality"),
    ({"modality_weight": torch.tensor(1.0)}, ValueError, r"modality_weight is \(\), expected \[M, E\]"),
    ({"modality_weight": torch.zeros(2, 0)}, ValueError, r"modality_weight is \(2, 0\), expected .* E at least 1"),
    ({"position_weights": 5}, ValueError, "position_weights is int, expected one table"),
    ({"position_weights": torch.zeros(3, 8)}, ValueError, "position_weights has 3 entries, expected one per stream"),
    ({"position_weights": [5, None]}, ValueError, r"position_weights\[0\] is int, expected a table"),
    ({"position_weights": [[None], None]}, ValueError, r"position_weights\[0\] holds NoneType, expected tensors"),
    ({"eps": True}, ValueError, "eps is True, expected a finite number"),
    ({"eps": np.float32("inf")}, ValueError, r"eps is np.float32\(inf\), expected a finite number"),
    ({"eps": 10**400}, ValueError, "eps is 10+, expected a finite number"),
    (
        {"streams": [torch.tensor([0, 1, 2]), torch.zeros(4, 8).to_sparse()]},
        ValueError,
        "stream 1 is torch.sparse_coo, expected a strided tensor",
    ),
    (
        {"streams": [torch.nested.nested_tensor([torch.zeros(3)]), torch.zeros(4, 8)]},
        ValueError,
        "stream 0 is nested, expected a strided tensor",
    ),
    ({"modality_weight": torch.zeros(2, 8).to_sparse()}, ValueError, "modality_weight is torch.sparse_coo, expected a"),
    (
        {"modality_weight": torch.nested.nested_tensor([torch.zeros(8)] * 2)},
        ValueError,
        "modality_weight is nested, expected a strided tensor",
    ),
    (
        {"position_weights": [torch.zeros(4, 8).to_sparse(), None]},
        ValueError,
        r"position_weights\[0\] is torch.sparse_coo, expected a strided tensor",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_errors_say_what_was_expected(change, error, message):
    modality_embed(**GOOD)
    with pytest.raises(error, match=message):
        modality_embed(**{**GOOD, **change})


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float16, torch.int16, torch.int64])
@pytest.mark.parametrize("shape", [(0, 8), (0, 7), (0,), (3, 0)])
def test_what_is_empty_has_no_dtype_that_matters(shape, dtype, impl):
    layout = PackedLayout.from_counts([[3, 0], [1, 0]])
    arguments = {"modality_weight": torch.randn(2, 8, requires_grad=True), "impl": impl}
    rows, empty = torch.randn(4, 8, requires_grad=True), torch.empty(shape, dtype=dtype)
    out = modality_embed([rows, empty], layout, **arguments)
    assert torch.equal(out, modality_embed([rows, None], layout, **arguments))
    if shape == (0, 8) and dtype == torch.float64:
        leaf = empty.requires_grad_()
        modality_embed([rows, leaf], layout, **arguments).sum().backward()
        assert leaf.grad.shape == (0, 8)


def test_generators_of_streams_and_tables_are_taken():
    lazily = {name: (x for x in GOOD[name]) for name in ("streams", "position_weights")}
    assert torch.equal(modality_embed(**{**GOOD, **lazily}), modality_embed(**GOOD))

    class Mine(torch.Tensor):  # what the short way refuses, after it has seen the tables
        pass

    tables = [iter([t] if torch.is_tensor(t) else t) for t in GOOD["position_weights"]]
    weight = GOOD["modality_weight"].as_subclass(Mine)
    found = modality_embed(**{**GOOD, "position_weights": tables, "modality_weight": weight})
    assert torch.equal(found.as_subclass(torch.Tensor), modality_embed(**GOOD))


def test_float64_stays_under_autocast():
    weight, rows = torch.randn(1, 8).double(), torch.randn(3, 8).double()
    layout = PackedLayout.from_counts([[3]])
    expected = modality_embed([rows], layout, modality_weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modality_embed([rows], layout, modality_weight=weight), expected)


def test_a_device_without_kernels_is_named():
    layout, rows = PackedLayout.from_counts([[3]]).to("meta"), torch.zeros(3, 8, device="meta")
    with pytest.raises(RuntimeError, match="modality_embed: nothing can run on meta float32"):
        modality_embed([rows], layout, modality_weight=rows[:1])


@pytest.mark.parametrize("impl", IMPLS)
def test_width_0_is_refused_by_every_implementation(impl):
    with pytest.raises(ValueError, match=r"modality_weight is \(1, 0\), expected \[M, E\] with E at least 1"):
        modality_embed(
            [torch.zeros(3, 0)], PackedLayout.from_counts([[3]]), modality_weight=torch.zeros(1, 0), impl=impl
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_ids_are_not_read_where_a_trace_or_a_fake_tensor_stands_for_them(impl):
    def embed(ids, rows):
        return modality_embed(**{**GOOD, "streams": [ids, rows], "impl": impl})

    ids, rows = torch.tensor([4, 0, 3]), torch.randn(4, 8)
    program = make_fx(embed)(torch.tensor([0, 1, 2]), torch.zeros(4, 8))
    assert torch.equal(program(ids, rows), embed(ids, rows))
    with FlopCounterMode(display=False):  # on top of a trace
        program = make_fx(embed)(torch.tensor([0, 1, 2]), torch.zeros(4, 8))
    assert torch.equal(program(ids, rows), embed(ids, rows))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert embed(mode.from_tensor(ids), mode.from_tensor(rows)).shape == (LAYOUT.total_tokens, 8)
    for name, shape in (("modality_weight", (2, 8)), ("token_weight", (5, 8))):
        with FakeTensorMode(), pytest.raises(ValueError, match=f"{name} is a fake tensor"):
            modality_embed(**{**GOOD, name: torch.zeros(shape), "impl": impl})


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layout_that_is_new_meets_a_fake_tensor(impl):
    """numpy ended the process: what the layout's positions are read by would itself be fake."""
    layout = PackedLayout.from_segments([[(0, 3), (1, (2, 2))]], num_modalities=2, special_tokens=(1, None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        streams = [torch.zeros(3, 8), torch.zeros(4, 8)]
        out = modality_embed(**{**GOOD, "streams": streams, "layout": layout, "impl": impl})
    assert out.shape == (8, 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_ids_are_read_under_a_flop_counter(impl):
    """The reference would take -1 as the last row of the table."""
    with (
        FlopCounterMode(display=False),
        pytest.raises(IndexError, match="modality_embed: stream 0 has ids from -1 to 2, token_weight has"),
    ):
        modality_embed(**{**GOOD, "streams": [torch.tensor([0, -1, 2]), torch.zeros(4, 8)], "impl": impl})


@pytest.mark.parametrize("impl", IMPLS)
def test_second_order_gradients_are_refused(impl):
    leaf = torch.randn(4, 8, requires_grad=True)
    out = modality_embed(**{**GOOD, "streams": [torch.tensor([0, 1, 2]), leaf], "impl": impl})
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="modality_embed: only first-order"):
        gradient.sum().backward()


@needs_cpp
@pytest.mark.parametrize("which", ["row", "token", "position", "modality"])
def test_cpp_never_reads_outside_its_arrays(which):
    """Under torch.compile the checks of api.py are skipped; the C++ path still refuses, forward and backward."""
    common, rest, grad_out = fwd_arguments(BY_NAME["everything"], "cpp")
    *tensors, modality_ids, source_rows, positions, rng = torch.utils._pytree.tree_map_only(
        torch.Tensor, torch.clone, common
    )
    _, mean, rstd = torch.ops.mm.modality_embed_fwd(*common, *rest)
    if which == "row":
        source_rows[-1] = 1000
    elif which == "token":
        source_rows[0] = -1000
    elif which == "position":
        positions[:, 1] = -5
    else:
        modality_ids[1] = 200
    indices = (modality_ids, source_rows, positions, rng)
    with pytest.raises(RuntimeError, match="points outside"):
        torch.ops.mm.modality_embed_fwd(*tensors, *indices, *rest)
    needs = [False, True, True, *[True] * (len(tensors[3]) + 4)]
    with pytest.raises(RuntimeError, match="points outside"):
        torch.ops.mm.modality_embed_bwd(grad_out, *tensors, *indices, *rest[:3], mean, rstd, needs, "cpp")


def test_another_device_is_never_offered_to_the_cpp_path(monkeypatch):
    """A refusal costs more than a kernel's launch, and dropout would draw from the CPU's numbers."""
    monkeypatch.setattr(op, "modality_embed_fwd", lambda *args: pytest.fail("offered"))
    layout = PackedLayout.from_counts([[3, 2]])
    streams = [torch.empty(rows, 8, device="meta") for rows in (3, 2)]
    weight = torch.empty(2, 8, device="meta")
    assert api._quick(streams, layout, weight, None, None, None, None, None, 1e-5, 0.5) is None
