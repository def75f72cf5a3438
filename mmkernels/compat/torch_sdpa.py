"""Drop-in for torch.nn.functional.scaled_dot_product_attention.   B samples, H, G heads, Lq, Lk padded, D width."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.arguments import KERNEL_FLOATS, one_of
from mmkernels.compat import mask_reading, padded_op, plans
from mmkernels.compat.arguments import FALLBACKS, check_numbers, flag
from mmkernels.compat.arguments import window as checked_window
from mmkernels.compat.padded import attend, goes_by_head
from mmkernels.compat.plans import Refused, Seen, Shape
from mmkernels.dispatch import note
from mmkernels.masks import ALIGN
from mmkernels.ops.attention.api import MAX_HEAD_DIM, MIN_HEAD_DIM

NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    lengths=None,
    key_lengths=None,
    window: tuple[int, int] = (-1, -1),
    align: str = "top_left",
    fallback: str | None = None,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q k^T scale + mask) v, as torch's function of this name, but what the mask hides is skipped.

    query [..., H, Lq, D], key and value [..., G, Lk, D], also [N, L, D] and [L, D]; the arguments up to enable_gqa are
    torch's.  A boolean mask says True where a key takes part; a float mask may hold 0 and -inf (or the dtype's lowest
    value).  is_causal is aligned top-left.  Queries that see nothing give 0, as in torch.

    lengths      [B], whole numbers or a tensor: tokens of each sample, the rest is padding on its right.  Of keys too,
                 unless key_lengths is given.  Padding queries give 0 and get no gradient
    key_lengths  [B]: real keys of each sample.  Alone: every query is computed, as with a padding mask
    window       flash-attn's (left, right), about the query's place among the keys
    align        "top_left": query i stands at key i, for is_causal and window; "bottom_right": the last (real) query at
                 the last (real) key
    fallback     "torch": what cannot be expressed here goes to torch's function, and mmkernels.explain() tells.
                 None: it raises NotImplementedError that names the argument
    deterministic, impl   of mmkernels.attention

    With impl "auto", torch's own kernel runs where there is nothing to skip: no mask, no lengths (or such that hide
    nothing) or is_causal alone, unless deterministic is True; on the meta device always.  Reading attn_mask takes its
    data: on the CPU, or once per mask and version from a GPU, which waits for it; not inside torch.compile on a GPU or
    while a graph is captured: give lengths there.

    Raises ValueError for shapes and dtypes that do not fit, NotImplementedError as said.
    """
    one_of(NAME, "fallback", fallback, FALLBACKS)
    one_of(NAME, "align", align, ALIGN)
    check_numbers(NAME, ("scale", scale), ("dropout_p", dropout_p))
    window = checked_window(NAME, "window", window)
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise ValueError(
            f"{NAME}: attn_mask is {type(attn_mask).__name__}, expected a tensor or None; mmkernels.attention and "
            "varlen_attn take an AttentionMask"
        )
    call = TorchCall(NAME, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return compute(
        call, lengths=lengths, key_lengths=key_lengths, window=window, bottom_right=align == "bottom_right",
        fallback=fallback, deterministic=deterministic, impl=impl,
    )  # fmt: skip


def compute(
    call: TorchCall,
    *,
    lengths=None,
    key_lengths=None,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    fallback: str | None = None,
    instead: str = "fallback='torch' hands such calls to torch",
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """scaled_dot_product_attention after its first checks; errors name call.who, another drop-in perhaps.

    instead: what its user can do where this refuses.
    """
    call = call._replace(is_causal=flag(call.who, "is_causal", call.is_causal))
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = call[1:]
    if deterministic is not None:
        deterministic = flag(call.who, "deterministic", deterministic)
    plain = attn_mask is None and lengths is None and key_lengths is None and window == (-1, -1)
    torch_may = impl == "auto" and not deterministic  # for its kernels torch's switch alone counts
    nested = query.is_nested or key.is_nested or value.is_nested
    if plain and torch_may and not (is_causal and bottom_right):
        if not nested and key.shape[-2:-1] != value.shape[-2:-1]:  # torch's kernel reads past the end of the shorter
            raise ValueError(_misfit(*call[:4]))
        return call.run("nothing to skip")
    if nested:
        raise NotImplementedError(f"{call.who}: query, key or value is a nested tensor, taken with no other argument")
    if query.device.type == "meta":  # the shape alone is wanted, and no mask can be read
        return call._replace(attn_mask=None, is_causal=False).run("meta tensors")
    q, k, v, mask, lead = _checked(call)
    if not q.shape[1]:  # nothing to attend with; on such tensors torch 2.11 dies of a division by zero
        return _lead(q @ k.mT @ v, lead)
    seen = Seen(is_causal, window, bottom_right, lengths, key_lengths, mask)
    compiling = torch.compiler.is_compiling()
    refused = _refused(q, v, mask, dropout_p, scale, compiling, fallback)
    options = {"scale": scale, "dropout_p": dropout_p, "deterministic": deterministic, "impl": impl}
    if refused is None and compiling:
        return _lead(padded_op.attend(q, k, v, seen, who=call.who, **options), lead)
    if refused is None:
        shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        planned = plans.plan(seen, shape, q.device, by_head=goes_by_head(q, k, v))
        if not isinstance(planned, Refused):
            if planned.plain is not None and torch_may:
                return call._replace(attn_mask=None, is_causal=planned.plain == "causal").run("nothing to skip")
            return _lead(attend(q, k, v, planned, **options), lead)
        refused = planned.reason
    if fallback is None:
        raise NotImplementedError(f"{call.who}: {refused}; {instead}")
    return _lead(_dense_call(call, q, k, v, seen).run(refused), lead)


class TorchCall(NamedTuple):
    """The arguments of torch's function.   who: what the user called"""

    who: str
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    def run(self, why: str) -> Tensor:
        note(f"{self.who} -> torch: {why}")
        q, k, v, mask, dropout_p, is_causal, scale, enable_gqa = self[1:]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _checked(call: TorchCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """q [B, H, Lq, D], k, v [B, G, Lk, D] and the mask in four dimensions, in the dtype that autocast asks for; and the
    dimensions of the output before its last two."""
    who, q, k, v, mask = call[:5]
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.dtype in KERNEL_FLOATS else t for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{who}: query, key and value are {q.dtype}, {k.dtype} and {v.dtype}, expected one dtype")
    ndim = max(q.ndim, k.ndim, v.ndim)
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(_misfit(who, q, k, v))
    if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"{who}: attn_mask is {mask.dtype}, expected bool or floating point")
    grouped = call.enable_gqa and ndim > 2 and not q.shape[-3:-2] == k.shape[-3:-2] == v.shape[-3:-2]
    samples = ndim == 3 and not grouped  # [N, L, D]: N samples of one head, but [H, L, D] where heads share keys
    alike = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1]
    if alike and q.shape[1] >= k.shape[1]:
        lead = q.shape[:1]
    else:
        q, k, v = _spread(who, q, k, v, samples, grouped)
        lead = q.shape[:-3]
        q, k, v = (t.reshape(math.prod(lead), *t.shape[-3:]) for t in (q, k, v))
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads if call.enable_gqa else kv_heads != 1):
        expected = f"a divisor of query's {heads}" if call.enable_gqa else f"query's {heads}, or enable_gqa=True"
        raise ValueError(f"{who}: key has {kv_heads} heads, expected {expected}")
    if mask is not None:
        mask = _four_dims(who, mask, lead, samples, (q.shape[0], heads, q.shape[2], k.shape[2]))
    outer = lead if samples else (*lead, heads)
    return q, k, v, mask, outer[len(outer) - (ndim - 2) :]


def _misfit(who: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    return (
        f"{who}: query is {tuple(q.shape)}, key {tuple(k.shape)} and value {tuple(v.shape)}, expected [..., Lq, D], "
        "[..., Lk, D] and [..., Lk, Dv]"
    )


def _spread(who: str, q: Tensor, k: Tensor, v: Tensor, samples: bool, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[..., heads, L, D] each, in four dimensions or more, their batch dimensions alike."""
    given = tuple(map(tuple, (q.shape, k.shape, v.shape)))
    ndim = max(4 - samples, q.ndim, k.ndim, v.ndim)
    q, k, v = (t[(None,) * (ndim - t.ndim)] for t in (q, k, v))
    if samples:
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    heads, kv_heads = q.shape[-3], [t.shape[-3] for t in (k, v)]
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
        if grouped and all(kv_heads):  # torch repeats keys and values each by a factor of its own
            both = math.lcm(*kv_heads)
            k, v = (
                t.repeat_interleave(both // n, -3) if n < both else t for t, n in zip((k, v), kv_heads, strict=True)
            )
        else:
            both = torch.broadcast_shapes(*((n,) for n in kv_heads))[0]
            heads = torch.broadcast_shapes((heads,), (both,))[0]
    except RuntimeError:
        raise ValueError(f"{who}: query {given[0]}, key {given[1]} and value {given[2]} do not broadcast") from None
    return tuple(t.expand(*lead, n, -1, -1) for t, n in zip((q, k, v), (heads, both, both), strict=True))


def _four_dims(who: str, mask: Tensor, lead: torch.Size, samples: bool, full: tuple[int, ...]) -> Tensor:
    """The mask as [B or 1, H or 1, Lq or 1, Lk or 1].  samples: its third last dimension is that of samples."""
    given, most = mask, len(lead) + (2 if samples else 3)
    mask = mask[(None,) * (most - mask.ndim)]
    if samples:
        mask = mask.unsqueeze(-3)
    fits = mask.ndim == len(lead) + 3
    fits = fits and all(m in (1, n) for m, n in zip(mask.shape, (*lead, *full[1:]), strict=True))
    if not fits:
        raise ValueError(
            f"{who}: attn_mask is {tuple(given.shape)}, which does not broadcast to {full}, [B, H, Lq, Lk]"
        )
    if len(lead) == 1:
        return mask
    if all(n == 1 for n in mask.shape[: len(lead)]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(full[0], *mask.shape[-3:])


def _refused(q: Tensor, v: Tensor, mask, dropout_p: float, scale, compiling: bool, fallback) -> str | None:
    """What no plan is needed to refuse."""
    if q.dtype not in KERNEL_FLOATS:
        return f"query is {q.dtype}, taken are float32, bfloat16 and float16"
    if not MIN_HEAD_DIM <= q.shape[3] <= MAX_HEAD_DIM:
        return f"query has width {q.shape[3]}, taken are {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if v.shape[3] != q.shape[3]:
        return f"value has width {v.shape[3]}, taken is query's {q.shape[3]}"
    if scale is not None and not scale > 0:
        return f"scale is {scale}, taken are positive ones"
    if not 0.0 <= dropout_p < 1.0:
        return f"dropout_p is {dropout_p}, taken are 0 <= p < 1"
    if mask is not None and compiling and (q.device.type != "cpu" or fallback is not None):
        return "attn_mask cannot be read inside torch.compile; give lengths"
    return None


def _dense_call(call: TorchCall, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> TorchCall:
    """What our own keywords say, as a mask that torch takes; without such keywords the call as it came."""
    mask, is_causal = seen.mask, seen.is_causal
    if seen.lengths is None and seen.key_lengths is None and seen.window == (-1, -1) and not seen.bottom_right:
        return call
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    lengths = (
        None if n is None else torch.as_tensor(n, dtype=torch.int64, device=q.device)
        for n in plans.checked_lengths(seen, shape)
    )
    lo, hi = mask_reading.of_lengths(q.shape[2], k.shape[2], *lengths, *seen[:3])
    keys = torch.arange(k.shape[2], device=q.device)
    inside = ((keys >= lo.to(q.device).unsqueeze(2)) & (keys < hi.to(q.device).unsqueeze(2))).unsqueeze(1)
    if mask is None or mask.dtype == torch.bool:
        mask = inside if mask is None else inside & mask
    else:
        mask = torch.where(inside, mask, -torch.inf)
    is_causal = False
    return call._replace(query=q, key=k, value=v, attn_mask=mask, is_causal=is_causal)


def _lead(out: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[B, H, Lq, Dv] with these dimensions before the last two."""
    return out if out.shape[:-2] == lead else out.reshape(*lead, *out.shape[-2:])
