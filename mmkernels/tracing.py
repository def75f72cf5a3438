"""Who looks on at a call (fake tensors, tracers, subclasses), what is refused of them, and what no graph may hold."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch

from mmkernels import transforms

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Quiet while nothing traces with pre_dispatch=True, as make_fx and torch.export do.
before_autograd = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch)


def host_code(why: str) -> Callable[[Callable], Callable]:
    """Decorates a function that torch.compile must not trace: the graph breaks there, or the error says why it may not.

    torch.compiler.disable does that, but imports the compiler, which takes a second also where nobody compiles.
    What such a function makes is kept, so no mode that traces (torch.export, FakeTensorMode) sees it made.
    """

    def decorate(function: Callable) -> Callable:
        # Making it anew takes as long as lowering a short mask.  Not functools.cache, of which Dynamo warns.
        kept: list[Callable] = []

        def disabled() -> Callable:
            if not kept:
                kept.append(sys.modules["torch._dynamo"].disable(function))
            return kept[0]

        @functools.wraps(function)
        def outside(*args, **kwargs):
            run = disabled() if "torch._dynamo" in sys.modules else function
            # Not `traced`: Dynamo of torch 2.11, which reads this where a graph broke, does not know what that asks.
            if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
                with torch.utils._python_dispatch._disable_current_modes():
                    return run(*args, **kwargs)
            return run(*args, **kwargs)

        outside._torchdynamo_disable = True
        outside._torchdynamo_disable_msg = why
        return outside

    return decorate


def below_autograd(compute: Callable, operator: Callable, inputs: tuple, *examples: torch.Tensor):
    """operator(*inputs) without its autograd.  Where nobody looks on, straight to what it computes: the dispatcher
    would turn 20 arguments into its own kind and back."""
    if unwatched(*examples):
        return compute(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def unwatched(*tensors) -> bool:
    """Whether no tensor subclass, fake tensor, tracing or FLOP counter wants to see the operators on these tensors."""
    for tensor in tensors:
        if type(tensor) not in PLAIN_TENSORS:
            return False
    return not traced() and not transforms.active()


def traced() -> bool:
    """Whether each operator is seen: by fake tensors, FLOP counters, torch.jit.trace, make_fx (before autograd too)."""
    jit = torch._C._get_tracing_state()
    return jit is not None or bool(torch._C._len_torch_dispatch_stack()) or before_autograd()


def readable(tensor: torch.Tensor) -> bool:
    """Whether its numbers may be looked at: a fake tensor has none, and a trace would keep this call's as constants.

    A FLOP counter sees real ones.
    """
    mode, kinds = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    recorded = torch._C._get_tracing_state() is not None or mode(kinds.PROXY) is not None or before_autograd()
    return not (recorded or mode(kinds.FAKE) is not None or hasattr(tensor, "fake_mode"))


def refuse_numberless(who: str, name: str, tensor: torch.Tensor) -> None:
    """ValueError for a parameter that is not initialised yet, and for a fake tensor whose mode takes no real ones
    beside it, as layouts and plans hold."""
    if type(tensor) in PLAIN_TENSORS or torch.compiler.is_compiling():
        return
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"{who}: {name} is {type(tensor).__name__}, expected one that is initialised")
    if not getattr(getattr(tensor, "fake_mode", None), "allow_non_fake_inputs", True):
        raise ValueError(
            f"{who}: {name} is a fake tensor and the layout holds real ones, expected "
            "FakeTensorMode(allow_non_fake_inputs=True)"
        )


def refuse_meta_beside_real(operator, args: Sequence, on_host: Sequence[str] = ()) -> None:
    """ValueError, in an operator's function of shapes, for meta tensors beside real ones.

    Torch sends such a call there, and the result would stay as the memory was.  on_host: arguments that lie on the
    host wherever the rest is
    """
    schema = operator._schema
    named = zip((argument.name for argument in schema.arguments), args, strict=False)
    tensors = [(n, t) for n, arg in named for t in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(t)]
    name, first = tensors[0]
    for other, t in tensors:
        if t.is_meta != first.is_meta and (t.is_meta or other not in on_host):
            raise ValueError(f"{schema.name}: {other} is on {t.device}, {name} on {first.device}")


def refuse_unstrided(who: str, name: str, tensor: torch.Tensor) -> None:
    """ValueError for a sparse or nested tensor.  Before its shape is asked for, which a nested one may not have."""
    try:
        if not tensor.is_nested and tensor.layout is torch.strided:
            return
        kind = "nested" if tensor.is_nested else tensor.layout
    except TypeError as error:  # where __torch_function__ of a subclass returns NotImplemented
        kind = f"{type(tensor).__name__}, which does not answer torch's functions"
        raise ValueError(f"{who}: {name} is {kind}, expected a strided tensor") from error
    raise ValueError(f"{who}: {name} is {kind}, expected a strided tensor")


def refuse_freed(who: str, name: str, tensor: torch.Tensor) -> None:
    """ValueError for memory on the CPU that is less than a tensor spans, which torch itself reads all the same.

    Who resizes a storage (to 0, to free it) leaves the shapes of its tensors as they were.
    """
    if type(tensor) not in PLAIN_TENSORS or not tensor.is_cpu or tensor.numel() == 0 or tensor._is_zerotensor():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    last = tensor.storage_offset()
    last += sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed, held = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{who}: {name} lies in a storage of {held} bytes, expected {needed}: the storage was resized")
