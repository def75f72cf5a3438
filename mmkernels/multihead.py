"""nn.MultiheadAttention on mmkernels.attention, and their swap.   B samples, L, S tokens, E width."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import transforms
from mmkernels.arguments import KERNEL_FLOATS, one_of
from mmkernels.compat import kept
from mmkernels.compat.arguments import FALLBACKS
from mmkernels.compat.torch_sdpa import TorchCall, compute
from mmkernels.dispatch import IMPLS, note
from mmkernels.ops.attention.api import MAX_HEAD_DIM, MIN_HEAD_DIM


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with the same constructor, state_dict and forward, skipping what the masks hide.

    With need_weights=False attention goes through compat.torch_sdpa: padding, causal and other expressible masks are
    skipped; padding queries are computed, as torch does.  With need_weights=True (torch's default) every weight is
    wanted, and nested tensors have no layout of ours: both are torch's own forward, and mmkernels.explain() tells.

    fallback  "torch": masks that cannot be expressed go to torch, and mmkernels.explain() tells.  None: they raise
              NotImplementedError
    impl      of mmkernels.attention
    """

    fallback: str | None = None
    impl: str = "auto"

    def __init__(self, *args, fallback: str | None = None, impl: str = "auto", **kwargs) -> None:
        _check_choices("MultiheadAttention", fallback, impl)
        super().__init__(*args, **kwargs)
        self.fallback, self.impl = fallback, impl

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None), with the arguments and shapes of torch.nn.MultiheadAttention.forward."""
        if need_weights or query.is_nested:
            note(f"MultiheadAttention -> torch: {'need_weights is True' if need_weights else 'nested tensors'}")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal is a hint about attn_mask, expected attn_mask with it")
        query, key, value = _batch_first(query, key, value, batched, self.batch_first)
        self._check_shapes(query, key, value)
        q, k, v = self._project(query, key, value)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        k, v = self._with_extra_keys(k, v)
        sizes = q.shape[0], self.num_heads, q.shape[1], key.shape[1]
        extra = k.shape[1] - sizes[3]
        # Extra keys are seen by all, so the hint would be wrong about them.
        is_causal = is_causal and not extra
        call = TorchCall(
            "MultiheadAttention",
            *(t.transpose(1, 2) for t in (q, k, v)),
            attn_mask=_mask(key_padding_mask, None if is_causal else attn_mask, *sizes, extra),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=None,
            enable_gqa=False,
        )
        out = compute(call, fallback=self.fallback, impl=self.impl)
        out = out.transpose(1, 2).flatten(2)  # [B, L, E]
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), None

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Of batch-first inputs.  SDPA broadcasts samples, and torch's reads past the end of values that are fewer than
        the keys."""
        samples, keys = query.shape[0], key.shape[1]
        for name, given, expected in (
            ("query", query, (samples, query.shape[1], self.embed_dim)),
            ("key", key, (samples, keys, self.kdim)),
            ("value", value, (samples, keys, self.vdim)),
        ):
            if tuple(given.shape) != expected:
                raise ValueError(
                    f"MultiheadAttention: {name} is {tuple(given.shape)} as [batch, tokens, width], expected {expected}"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, L, H, D], k and v [B, S, H, D]: where inputs are one tensor, views of one projection."""
        bias, width = self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            parts = [F.linear(*wb) for wb in zip((query, key, value), weights, biases, strict=True)]
            return tuple(part.unflatten(2, (self.num_heads, self.head_dim)) for part in parts)
        # Consecutive equal inputs share a product: q, k, v of self-attention, k and v of cross-attention.
        inputs = [query] if query is key is value else [query, key] if key is value else [query, key, value]
        sizes = {1: [3], 2: [1, 2], 3: [1, 1, 1]}[len(inputs)]
        parts, row = [], 0
        for x, size in zip(inputs, sizes, strict=True):
            rows = slice(row * width, (row + size) * width)
            both = F.linear(x, self.in_proj_weight[rows], None if bias is None else bias[rows])
            parts += both.unflatten(2, (size, self.num_heads, self.head_dim)).unbind(2)
            row += size
        return tuple(parts)

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Learned and zero keys in front, where torch puts them at the end: the order of keys does not matter to
        attention, and in front they join the stretch of keys that each query sees."""
        extra = []
        if self.bias_k is not None:
            shape = (k.shape[0], 1, self.num_heads, self.head_dim)
            extra.append([b.view(1, 1, *shape[2:]).expand(shape) for b in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            extra.append([t.new_zeros(t.shape[0], 1, *t.shape[2:]) for t in (k, v)])
        for more in extra:
            k, v = (torch.cat([own, t], 1) for own, t in zip(more, (k, v), strict=True))
        return k, v

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, fallback={self.fallback!r}, impl={self.impl!r}"


@dataclass
class Replaced:
    """What replace_attention did, by module name; str() lists it.

    swapped  names whose attention is ours now;  left  name: why not;  notes  what a swap does not reach
    """

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped  {name}" for name in self.swapped]
        lines += [f"left     {name}: {why}" for name, why in self.left.items()]
        lines += [f"note     {name}: {what}" for name, what in self.notes.items()]
        return "\n".join(lines) or "no torch.nn.MultiheadAttention found"


def replace_attention(model: nn.Module, *, fallback: str | None = None, impl: str = "auto") -> Replaced:
    """Make every torch.nn.MultiheadAttention of `model` a MultiheadAttention of this package, in place.

    Modules keep their identity, parameters, hooks and state_dict: only their class changes.  fallback and impl as in
    MultiheadAttention.  Returns what was swapped, what was left and why.  Raises ValueError for a fallback or impl that
    there is not, and then changes nothing.
    """
    _check_choices("replace_attention", fallback, impl)
    report = Replaced()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            why = _unfit(module)
            if why is not None:
                report.left[name or "(model)"] = why
                continue
            module.__class__ = MultiheadAttention
            module.fallback, module.impl = fallback, impl
            report.swapped.append(name or "(model)")
        elif isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, nn.MultiheadAttention):
            report.notes[name or "(model)"] = (
                "in eval mode without gradients torch's fused layer runs where it can, and calls no attention module; "
                "torch.backends.mha.set_fastpath_enabled(False) makes it"
            )
    return report


def _check_choices(who: str, fallback: str | None, impl: str) -> None:
    one_of(who, "fallback", fallback, FALLBACKS)
    one_of(who, "impl", impl, IMPLS)


def _unfit(module: nn.MultiheadAttention) -> str | None:
    if isinstance(module, MultiheadAttention):
        return "is one of ours"
    if type(module) is not nn.MultiheadAttention:
        return f"is a {type(module).__name__}, whose forward may be its own"
    if not MIN_HEAD_DIM <= module.head_dim <= MAX_HEAD_DIM:
        return f"has heads of width {module.head_dim}, taken are {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    weight = getattr(module.out_proj, "weight", None)
    if not isinstance(weight, Tensor):  # wrapped or quantised
        return f"has an out_proj of its own, a {type(module.out_proj).__name__}"
    if weight.dtype not in KERNEL_FLOATS:
        return f"is {weight.dtype}, taken are float32, bfloat16 and float16"
    return None


def _batch_first(query: Tensor, key: Tensor, value: Tensor, batched: bool, batch_first: bool) -> tuple[Tensor, ...]:
    """[B, L, E] each; inputs that are one tensor stay one."""
    if batched and batch_first:
        return query, key, value
    moved = {id(t): t.transpose(0, 1) if batched else t.unsqueeze(0) for t in (query, key, value)}
    return tuple(moved[id(t)] for t in (query, key, value))


def _check_masks(padding: Tensor | None, attn: Tensor | None, batch, heads, queries, keys) -> None:
    """SDPA would broadcast what nn.MultiheadAttention does not take."""
    allowed = ((batch, keys),), ((queries, keys), (batch * heads, queries, keys))
    for name, mask, shapes in zip(("key_padding_mask", "attn_mask"), (padding, attn), allowed, strict=True):
        if mask is not None and tuple(mask.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"MultiheadAttention: {name} is {tuple(mask.shape)}, expected {expected}")


def _mask(
    padding: Tensor | None, attn: Tensor | None, batch: int, heads: int, queries: int, keys: int, extra: int
) -> Tensor | None:
    """SDPA's mask of the module's two, whose True means the opposite; None where there is none.

    Made once per pair of masks, so that all layers hand on the same tensor, whose plan is kept.
    """
    if padding is None and attn is None:
        return None
    _check_masks(padding, attn, batch, heads, queries, keys)
    if not torch._C._are_functorch_transforms_active() or (attn is not None and attn.requires_grad):
        return _joined(padding, attn, batch, heads, extra)
    with torch._C._DisableFuncTorch():  # what is kept must not be a wrapper
        return _joined(transforms.below(padding), transforms.below(attn), batch, heads, extra)


def _joined(padding: Tensor | None, attn: Tensor | None, batch: int, heads: int, extra: int) -> Tensor:
    parts = []
    if padding is not None:
        parts.append(padding[:, None, None])
    if attn is not None:
        parts.append(attn.view(1, 1, *attn.shape) if attn.ndim == 2 else attn.view(batch, heads, *attn.shape[1:]))
    if len(parts) == 1 and parts[0].dtype != torch.bool and not extra:
        return parts[0]  # a view, whose plan is kept with its base

    def build() -> Tensor:
        if all(part.dtype == torch.bool for part in parts):
            mask, neutral = ~parts[0] if len(parts) == 1 else ~(parts[0] | parts[1]), True
        else:
            added = [
                torch.zeros_like(p, dtype=torch.float32).masked_fill(p, -torch.inf) if p.dtype == torch.bool else p
                for p in parts
            ]
            mask, neutral = added[0] if len(added) == 1 else added[0] + added[1], 0.0
        return F.pad(mask, (extra, 0), value=neutral) if extra else mask

    # As once: an inference tensor has no version.  What carries a graph is not kept.
    if torch.compiler.is_compiling() or (attn is not None and (attn.is_inference() or attn.requires_grad)):
        return build()
    if padding is None:
        return kept.once(attn, ("multihead", batch, heads, extra), build)
    version = None if attn is None else attn._version
    # With attn beside the result no other tensor takes its id while that is kept.
    return kept.once(padding, ("multihead", id(attn), version, batch, heads, extra), lambda: (build(), attn))[0]
