"""Operators under torch.func (grad, vjp, jacrev, vmap) and in forward mode.

What torch.library registers is no good there: torch.func refuses it, vmap forgets who requires a gradient, and forward
mode gives zero tangents.  An autograd.Function in torch.func's form gives gradients, and an error in forward mode.  It
costs more than the operators' own ways, so nobody else goes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether any tensor may be a wrapper of another one, or carry a tangent."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# Whether a gradient stands for many at once, as torch.autograd.grad(is_grads_batched=True) makes them.  torch's own
# operators have rules for that; for others, where they return tensors and no lists, torch goes through them one by one.
is_batched = torch._C._functorch.is_legacy_batchedtensor


def refuse_batched(name: str, *grads: torch.Tensor | None) -> None:
    """For operators with lists of tensors: torch's message would name a function that nobody called."""
    for grad in grads:  # not any(): a generator costs a microsecond
        if grad is not None and is_batched(grad):
            raise NotImplementedError(
                f"{name}: gradients come one at a time, not batched (is_grads_batched, jacobian(vectorize=True)); use "
                "torch.func.vmap over torch.func.vjp"
            )


def has_tangent(*tensors: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def below(value: Any) -> Any:
    """The tensor that torch.func's wrappers hold, whose data can be read; anything else as it came.

    Raises NotImplementedError where vmap made many of it.
    """
    functorch = torch._C._functorch
    while isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise NotImplementedError("vmap goes over a mask, lengths or bounds, which are read: expected one for all")
        value = functorch.get_unwrapped(value)
    return value


def beneath(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor below all of torch.func's wrappers: of many that vmap goes over, all in one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class Rule:
    """An operator and its gradient, in the form that torch.library.register_autograd takes them.

    An argument may be a list of tensors, and the result one if it is all that there is: backward then takes it as one.
    In backward ctx.needs says of each argument, and of each in a list, whether a gradient is wanted.
    """

    def __init__(self, name: str, operator: Callable, setup_context: Callable, backward: Callable) -> None:
        self.name, self.operator, self.setup_context, self.backward = name, operator, setup_context, backward

    def __call__(self, *args: Any) -> Any:
        """operator(*args), differentiated by this rule."""
        call = _Call(self, args)
        found = _Transformed.apply(call, *_flat(args))
        return list(found) if call.gives_list else found


class _Call:
    """How the arguments of one call lie, and its result.  An object, for torch.func takes tuples and lists apart."""

    def __init__(self, rule: Rule, args: Sequence[Any]) -> None:
        self.rule, self.gives_list = rule, False
        self.lengths = [len(a) if isinstance(a, list | tuple) else None for a in args]


class _Transformed(torch.autograd.Function):
    """Of a list autograd would not see the tensors: they come, and go, one by one."""

    @staticmethod
    def forward(call, *flat):
        found = call.rule.operator(*_nested(flat, call.lengths))
        call.gives_list = isinstance(found, list)
        return tuple(found) if call.gives_list else found

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *flat = inputs
        ctx.call.rule.setup_context(ctx, _nested(flat, ctx.call.lengths), output)

    @staticmethod
    def backward(ctx, *grads):
        call = ctx.call
        ctx.needs = _nested(ctx.needs_input_grad[1:], call.lengths)
        grads = call.rule.backward(ctx, *((grads,) if call.gives_list else grads))
        each = zip(grads, call.lengths, strict=True)
        return None, *_flat([[None] * n if grad is None and n is not None else grad for grad, n in each])

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(f"{ctx.call.rule.name}: there is no forward mode (jvp); gradients go in reverse mode")

    @staticmethod
    def vmap(info, in_dims, call, *flat):
        # One by one: torch's own fallback does as much, but knows no lists of tensors.
        if info.batch_size == 0:
            raise NotImplementedError(f"{call.rule.name}: vmap over a dimension of size 0, expected at least 1")
        each = [
            _Transformed.apply(
                call, *(t if d is None else t.select(d, i) for t, d in zip(flat, in_dims[1:], strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(each[0], torch.Tensor):
            return torch.stack(each), 0
        return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * len(each[0])


def _flat(args: Sequence[Any]) -> list[Any]:
    return [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]


def _nested(flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    rest = iter(flat)
    return tuple(next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths)
