"""Drop-in for timm: attention modules of Vision Transformers and NaFlex models, in place.   B samples, L padded tokens.

from mmkernels.compat import timm as mm_timm
report = mm_timm.patch(model)      # print(report); report.restore(), or use it as a context manager
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmkernels.arguments import one_of
from mmkernels.compat import kept
from mmkernels.compat.arguments import FALLBACKS
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention
from mmkernels.dispatch import IMPLS

_CALL = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Patch:
    """What `patch` swapped and what it left, by module name; leaves the model as it was on `restore` or on exit."""

    swapped: tuple[tuple[str, str], ...]  # name, class
    left: tuple[tuple[str, str], ...]  # name, reason
    _modules: tuple[nn.Module, ...] = field(repr=False)

    def restore(self) -> None:
        """Give every swapped module its own class back.  Again changes nothing."""
        for module in self._modules:
            if isinstance(module, _Swapped):
                module.__class__ = module._mm_base

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} attention modules"]
        lines += [f"  {name or '(the model)'}: {kind}" for name, kind in self.swapped]
        if self.left:
            lines += [f"left {len(self.left)}"] + [f"  {name or '(the model)'}: {why}" for name, why in self.left]
        return "\n".join(lines)


def patch(model: nn.Module, *, fallback: str | None = None, impl: str = "auto") -> Patch:
    """Let timm's attention modules in `model` compute F.scaled_dot_product_attention by compat.torch_sdpa's.

    NaFlex padding masks become intervals and their padding is skipped; its rows come out as 0 where timm's hold what
    nobody uses.  A module keeps its parameters, buffers, hooks and names: only its class is exchanged for a subclass
    whose forward runs timm's own with that one function replaced, for this call and thread alone.  deepcopy and pickle
    work on the patched model.

    fallback, impl   of torch_sdpa.scaled_dot_product_attention; fallback="torch" for models that add a bias to the
                     scores (BEiT, Swin), which otherwise raise NotImplementedError

    Raises ValueError if there is nothing in `model` to swap, and for a fallback or impl that there is not.
    """
    one_of("timm.patch", "fallback", fallback, FALLBACKS)
    one_of("timm.patch", "impl", impl, IMPLS)
    swapped, left, modules = [], [], []
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, _Swapped):
            left.append((name, "swapped already"))
        elif not kind.__module__.startswith("timm.") or not hasattr(module, "fused_attn"):
            continue
        elif not _calls_torch(kind):
            left.append((name, f"{kind.__name__} does not call F.{_CALL}"))
        elif not module.fused_attn:
            left.append((name, "fused_attn is off, so it multiplies matrices itself; timm.layers.set_fused_attn()"))
        else:
            modules.append(module)
            swapped.append((name, kind.__name__))
    if not modules:
        raise ValueError(f"timm.patch: nothing to swap in {type(model).__name__}: {_reasons(left)}")
    for module in modules:
        module.__class__ = _swapped_class(type(module), fallback, impl)
    return Patch(tuple(swapped), tuple(left), tuple(modules))


def _reasons(left: list[tuple[str, str]]) -> str:
    """Each reason once, with the first module that it holds for."""
    names = {why: [name for name, of in left if of == why] for _, why in left}
    each = (f"{n[0]}{f' and {len(n) - 1} more' if len(n) > 1 else ''}: {why}" for why, n in names.items())
    return "; ".join(each) or "it has no fused attention modules of timm"


class _Swapped:
    """Marks a swapped module's class."""


@cache
def _swapped_class(base: type[nn.Module], fallback: str | None, impl: str) -> type[nn.Module]:
    class Swapped(_Swapped, base):
        _mm_base = base

        def forward(self, *args, **kwargs):
            with _Through(fallback, impl):
                return base.forward(self, *args, **kwargs)

        def __reduce_ex__(self, protocol):  # the class has no name to be found by
            return _empty, (base, fallback, impl), self.__dict__

    Swapped.__name__, Swapped.__qualname__, Swapped.__module__ = base.__name__, base.__qualname__, base.__module__
    return Swapped


def _empty(base: type[nn.Module], fallback: str | None, impl: str) -> nn.Module:
    kind = _swapped_class(base, fallback, impl)
    return kind.__new__(kind)


class _Through(TorchFunctionMode):
    """While it is entered, this thread's F.scaled_dot_product_attention is ours."""

    def __init__(self, fallback: str | None, impl: str) -> None:
        super().__init__()
        self.options = {"fallback": fallback, "impl": impl}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}), **self.options)
        return function(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args, **kwargs) -> Tensor:
    return scaled_dot_product_attention(query, key, value, _as_boolean(attn_mask), *args, **kwargs)


def _as_boolean(mask: Tensor | None) -> Tensor | None:
    """NaFlex's additive mask as a boolean one, once per mask.

    It holds the dtype's lowest value where a key or the query itself is padding.  Taken to the letter, a row of lowest
    values attends to all keys evenly; here it sees nothing, as only padding has such rows.  Other masks stay.
    """
    if mask is None or mask.dtype == torch.bool or mask.requires_grad:
        return mask

    def build() -> Tensor | bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        return ~hidden if bool((hidden | (mask == 0)).all()) else False

    found = kept.once(mask, "timm", build)
    return mask if found is False else found


@cache
def _calls_torch(kind: type[nn.Module]) -> bool:
    """Whether code of the class names F.scaled_dot_product_attention."""
    own = (f for base in kind.__mro__ if base.__module__.startswith("timm.") for f in vars(base).values())
    return any(inspect.isfunction(f) and _CALL in f.__code__.co_names for f in own)
