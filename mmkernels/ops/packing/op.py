"""Contract of packing: which kernel runs, autograd.  Imports torch only.  Schemas and fakes: schemas.py.

`impl` is a concrete name by the time it gets here.  All operators are linear and come in pairs that are each other's
gradient: pack and unpack, pad and unpad, gather_rows and scatter_rows_sum, segment_mean and segment_mean_backward.
An implementation is a module with functions NAME(*inputs, *outputs) that write, or with KERNELS = {NAME: (NAME,
NAME_out)} where it allocates by itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import arguments, dispatch, tracing, transforms
from mmkernels.ops.packing import schemas

schemas.define("mm", suffix=", str impl", symbolic=True)
NATIVE = ("cpp", "cuda")  # write through pointers


def _kernels(name: str, impl: str) -> tuple[Callable, Callable]:
    """(NAME, NAME_out) of an implementation: its own pair, or one around its function that writes given outputs."""
    module = dispatch.load("packing", impl)
    if hasattr(module, "KERNELS"):
        return module.KERNELS[name]
    operator, write = schemas.OPERATORS[name], getattr(module, name)

    def fresh(*args):
        out = operator.new(schemas.new_empty, *args)
        write(*args[: operator.num_inputs], *(out if name == "pad" else (out,)))
        return out

    return fresh, write


def _register(name: str) -> Callable[..., Any]:
    """Implements mm::NAME and mm::NAME_out; returns the function that op.NAME is: (*inputs, [size,] impl, out=None)."""
    count = schemas.OPERATORS[name].num_inputs
    listed, paired, lists = name == "pack", name == "pad", name == "unpack"
    kernels: dict[str, tuple[Callable, Callable]] = {}

    def run(form: int, *args):
        *args, impl = args
        if impl not in kernels:
            kernels[impl] = _kernels(name, impl)
        if impl != "cpp":
            _check(name, count, form, args)
        if form and impl not in NATIVE:
            _refuse_inference(name, _written(args[count:]))
        try:
            result = kernels[impl][form](*args)
        except RuntimeError as error:
            if impl == "cpp":  # it has checked, and cannot raise what a caller of Python expects
                _check(name, count, form, args)
            dtype = (args[0][0] if listed else args[0]).dtype
            refused = isinstance(error, NotImplementedError) or "ScalarType" in str(error)
            if refused and dtype not in arguments.FLOATS:  # which all have: then another argument is to blame
                raise NotImplementedError(f"{name}: impl={impl!r} has no kernel for {dtype}: {error}") from error
            raise
        if form and impl in NATIVE:  # torch's own functions say so by themselves
            torch.autograd.graph.increment_version(_written(args[count:]))
        return result

    compute, compute_out = functools.partial(run, 0), functools.partial(run, 1)
    for device in ("cpu", "cuda"):
        torch.library.impl(f"mm::{name}", device, compute)
        torch.library.impl(f"mm::{name}_out", device, compute_out)
    differentiable = type(name, (_Differentiable,), {})  # by whose name profiles and anomaly mode know it
    registered, registered_out = (getattr(torch.ops.mm, form).default for form in (name, f"{name}_out"))

    def call(*args, out=None):
        tensors = args[0] if listed else args[:1]
        # Of many gradients at once the registered operator is called one by one.
        direct = not torch.compiler.is_compiling() and tracing.unwatched(*tensors)
        direct = direct and not any(map(transforms.is_batched, tensors))
        if out is not None:
            outputs = out if paired else (out,)
            (compute_out if direct and not _recorded(tensors) else registered_out)(*args[:count], *outputs, args[-1])
            return out
        if not direct:
            return (_transformed[name] if transforms.active() else registered)(*args)
        if not _recorded(tensors):
            return compute(*args)
        result = differentiable.apply(_transformed[name], compute, args, *tensors)
        return list(result) if lists else result

    return call


class _Differentiable(torch.autograd.Function):
    """compute(*args) and its gradient by a rule, where nobody looks on.  tensors: those of args that have gradients.

    What torch.library registers does the same, but walks the arguments as trees: 60 to 150 us a call.
    """

    @staticmethod
    def forward(ctx, rule, compute, args, *tensors):
        result = compute(*args)
        ctx.rule = rule
        rule.setup_context(ctx, args, result)
        ctx.gives_list = isinstance(result, list)
        return tuple(result) if ctx.gives_list else result

    @staticmethod
    def backward(ctx, *grads):
        found = ctx.rule.backward(ctx, *((grads,) if ctx.gives_list else grads))[0]
        return None, None, None, *(found if isinstance(found, list) else (found,))


def _recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd has to know of an operator on these."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # not any(): a generator costs a microsecond
            if tensor.requires_grad:
                return True
    return False


def _check(name: str, count: int, form: int, args: Sequence[Any]) -> None:
    """Raises ValueError for rows out of range (on the CPU), for given outputs that lie where an input is read, and for
    what has lost its memory."""
    values, where = args[:2]
    written = _written(args[count:]) if form else []
    sources = {f"stream {m}": stream for m, stream in enumerate(values)} if name == "pack" else {"the input": values}
    told = "rows" if "rows" in name else "the layout's table"
    for what, tensor in (*sources.items(), (told, where), *(("out", target) for target in written)):
        tracing.refuse_freed(name, what, tensor)
    if name == "gather_rows":
        _check_range(where, values.shape[0])
    elif name == "scatter_rows_sum":
        _check_range(where, args[2].shape[0] if form else args[2])
    elif name not in ("pack", "unpack") and where.is_cpu:  # reading a GPU's would synchronise
        size = args[2].shape[name == "pad"] if form else args[-1]  # of pad L, of the others T
        total = values.shape[0] if name in ("pad", "segment_mean") else size
        _check_bounds(name, where, total, {"pad": size, "unpad": values.shape[1]}.get(name, total))
    if not form:
        return
    if name == "gather_rows":
        sources["rows"] = where
    for what, source in sources.items():
        if any(_overlap(source, target) for target in written):
            raise ValueError(f"{name}: out shares memory with {what}, expected memory of its own")
    if any(_overlap(a, b) for a, b in itertools.combinations(written, 2)):
        raise ValueError(f"{name}: the outputs share memory, expected memory of their own")


def _refuse_inference(name: str, written: Sequence[Tensor]) -> None:
    """What torch itself refuses to write, in words that say which tensor."""
    if not torch.is_inference_mode_enabled() and any(target.is_inference() for target in written):
        raise ValueError(f"{name}: out is made under inference mode, expected one made outside, or a call under it too")


def _written(outputs: Sequence[Any]) -> list[Tensor]:
    return [tensor for out in outputs for tensor in ([out] if isinstance(out, Tensor) else out)]


def _check_range(rows: Tensor, total: int) -> None:
    if rows.numel() == 0 or rows.device.type != "cpu":  # reading them on a GPU would synchronise
        return
    low, high = (int(end) for end in torch.aminmax(rows))
    if low < 0 or high >= total:
        raise ValueError(f"gather_rows: rows run from {low} to {high}, expected 0 to {total - 1}")


def _check_bounds(name: str, bounds: Tensor, total: int, longest: int) -> None:
    """A layout's bounds may have been written over, and torch's kernels would follow them anywhere."""
    ends = bounds.long().numpy(force=True)
    wrong = not len(ends) or ends[0] != 0 or ends[-1] != total
    # count_nonzero, not any: this is run in every call
    if wrong or np.count_nonzero(ends[1:] < ends[:-1]) or np.count_nonzero(ends[1:] - ends[:-1] > longest):
        raise ValueError(
            f"{name}: the layout's bounds are {bounds.dtype} {list(bounds.shape)}, expected values from 0 to {total}, "
            f"none below the one before or more than {longest} above it"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first, last), (begin, end) = _bytes_of(a), _bytes_of(b)
    return first < end and begin < last


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


pack, unpack, pad, unpad, gather_rows, scatter_rows_sum, segment_mean, segment_mean_backward = map(
    _register, schemas.OPERATORS
)


def _pack_context(ctx, inputs, output):
    streams, *where, _, ctx.impl = inputs
    ctx.stream_lengths = [stream.shape[0] for stream in streams]
    ctx.save_for_backward(*where)


def _pack_backward(ctx, grad):
    transforms.refuse_batched("pack", grad)
    return unpack(grad, *ctx.saved_tensors, ctx.stream_lengths, ctx.impl), None, None, None, None, None


def _unpack_context(ctx, inputs, output):
    packed, *where, _, ctx.impl = inputs
    ctx.total = packed.shape[0]
    ctx.save_for_backward(*where)


def _unpack_backward(ctx, grads):
    transforms.refuse_batched("unpack", *grads)
    return pack(grads, *ctx.saved_tensors, ctx.total, ctx.impl), None, None, None, None, None


def _pad_context(ctx, inputs, output):
    packed, bounds, _, ctx.impl = inputs
    ctx.total = packed.shape[0]
    ctx.save_for_backward(bounds)
    ctx.set_materialize_grads(False)  # no zeros for the mask


def _pad_backward(ctx, grad, _):
    return None if grad is None else unpad(grad, *ctx.saved_tensors, ctx.total, ctx.impl), None, None, None


def _unpad_context(ctx, inputs, output):
    padded, bounds, _, ctx.impl = inputs
    ctx.length = padded.shape[1]
    ctx.save_for_backward(bounds)


def _unpad_backward(ctx, grad):
    return pad(grad, *ctx.saved_tensors, ctx.length, ctx.impl)[0], None, None, None


def _reduce_context(ctx, inputs, output):
    values, where, ctx.impl = inputs
    ctx.total = values.shape[0]
    ctx.save_for_backward(where)


def _spread_context(ctx, inputs, output):
    _, where, _, ctx.impl = inputs
    ctx.save_for_backward(where)


def _register_pair(reduce: str, spread: str) -> None:
    """reduce(values, where) and spread(grad, where, total) are each other's gradient."""

    def reduce_backward(ctx, grad):
        return globals()[spread](grad, *ctx.saved_tensors, ctx.total, ctx.impl), None, None

    def spread_backward(ctx, grad):
        return globals()[reduce](grad, *ctx.saved_tensors, ctx.impl), None, None, None

    _register_autograd(reduce, _reduce_context, reduce_backward)
    _register_autograd(spread, _spread_context, spread_backward)


def _register_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"mm::{name}", backward, setup_context=setup_context)
    _transformed[name] = transforms.Rule(name, getattr(torch.ops.mm, name).default, setup_context, backward)


_transformed: dict[str, transforms.Rule] = {}
_register_autograd("pack", _pack_context, _pack_backward)
_register_autograd("unpack", _unpack_context, _unpack_backward)
_register_autograd("pad", _pad_context, _pad_backward)
_register_autograd("unpad", _unpad_context, _unpad_backward)
_register_pair("gather_rows", "scatter_rows_sum")
_register_pair("segment_mean", "segment_mean_backward")
