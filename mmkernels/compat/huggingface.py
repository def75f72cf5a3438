"""Drop-in for Hugging Face transformers: attn_implementation="mmkernels".   B samples, H heads, L padded, D width.

from mmkernels.compat import huggingface
huggingface.register()
model = AutoModel.from_pretrained(name, attn_implementation="mmkernels")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.compat.arguments import check_numbers, flag
from mmkernels.compat.huggingface_masks import PaddedMask, UnknownMask, intervals
from mmkernels.compat.packed import attend_packed
from mmkernels.compat.padded import attend, goes_by_head
from mmkernels.compat.torch_sdpa import TorchCall, compute
from mmkernels.masks import AttentionMask

NAME = "mmkernels"

# What a model may hand its attention function that changes the result, and that is not computed here.
_REFUSED = {
    "softcap": "scores are not capped",
    "s_aux": "there are no attention sinks",
    "sinks": "there are no attention sinks",
    "position_bias": "a bias for each pair of positions is not added",
    "indices": "keys are not picked one by one",
    "block_indices": "keys are not picked by blocks",
    "cache": "there is no paged cache",
    "block_table": "there is no paged cache",
    "k_cache": "there is no paged cache",
    "v_cache": "there is no paged cache",
    "head_mask": "heads are not masked",
    "output_attentions": "probabilities are never stored",
}

# Arguments of a module's forward that bring no second sequence: a module with no others attends to its own input.
_NO_STATES = {
    *("self", "attention_mask", "causal_attention_mask", "position_ids", "position_embeddings", "cache_position"),
    *("past_key_values", "past_key_value", "use_cache", "output_attentions", "layer_head_mask", "is_causal"),
    *("cu_seqlens", "max_seqlen", "rotary_pos_emb", "freqs_cis", "layer_idx"),
}


def register(name: str = NAME) -> None:
    """Make attn_implementation=`name` work, in every transformers model that uses its attention interface.

    Padding masks, causal masks, windows, chunks, image blocks and packed sequences become intervals; no dense mask is
    built.  The padding mask is read once per forward pass on a CPU, never on a GPU.  Rows of padding may come out as 0
    where eager attention gives what nobody uses.  Registering twice changes nothing.

    Raises ImportError without transformers, or with one before 5.0.  The models then raise NotImplementedError naming
    the argument for what is not computed here: softcap, attention sinks, position biases, sparse indices,
    output_attentions.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(f"huggingface.register: {error}; pip install 'transformers>=5.0'") from error
    if int(transformers.__version__.split(".")[0]) < 5:  # its models call mask functions with other arguments
        raise ImportError(
            f"huggingface.register: transformers {transformers.__version__} is installed, expected 5.0 or later"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


@torch.compiler.disable  # host code; attention itself is one operator
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function.  query [B, H, Lq, D], key, value [B, G, Lk, D]; returns
    [B, Lq, H, D] and None for the probabilities.

    attention_mask  of `attention_mask` below; None, then is_causal or the module says whether it is causal; or a dense
                    [B, 1 or H, Lq, Lk], which is read back as intervals once
    cu_seq_lens_q, cu_seq_lens_k   int [N + 1], bounds of sequences packed in B L tokens; max_length_* are not needed

    Raises NotImplementedError naming the argument that is not computed here.
    """
    for argument, why in _REFUSED.items():
        value_given = kwargs.get(argument)
        if value_given is not None and value_given is not False:
            raise NotImplementedError(f"{NAME}: {argument} is given, but {why}; use attn_implementation='eager'")
    check_numbers(NAME, ("scaling", scaling), ("dropout", dropout))
    if value.shape[3] != query.shape[3]:
        raise NotImplementedError(f"{NAME}: value has width {value.shape[3]}, taken is query's {query.shape[3]}")
    causal = getattr(module, "is_causal", True) if is_causal is None else flag(NAME, "is_causal", is_causal)
    if cu_seq_lens_q is not None:
        if cu_seq_lens_k is None:
            raise ValueError(f"{NAME}: cu_seq_lens_q is given without cu_seq_lens_k")
        if attention_mask is not None:
            if not (isinstance(attention_mask, PaddedMask) and attention_mask.packable):
                raise NotImplementedError(f"{NAME}: cu_seq_lens_q with a padding, block or dense attention_mask")
            causal = attention_mask.causal
        return _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, causal, sliding_window, scaling, dropout), None
    if isinstance(attention_mask, Tensor):
        grouped = key.shape[1] != query.shape[1]
        call = TorchCall(NAME, query, key, value, attention_mask, dropout, False, scaling, grouped)
        out = compute(call, instead="use attn_implementation='eager'")
        return out.transpose(1, 2).contiguous(), None
    mask = _without_mask(query, key, causal, sliding_window) if attention_mask is None else attention_mask
    _check_fits(mask, query, key)
    if mask.keeps_no_packs_apart and _begin_again(kwargs.get("position_ids")):
        raise ValueError(
            f"{NAME}: position_ids begin again, but with a cache transformers takes the row for one sequence; give "
            "use_cache=False, or cu_seq_lens_q and cu_seq_lens_k"
        )
    plan = mask.plan(
        query.shape[2],
        query.device,
        skip=mask.causal or _attends_to_itself(type(module)),
        by_head=query.shape[1] if goes_by_head(query, key, value) else 0,
    )
    out = attend(query, key, value, plan, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | PaddedMask | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> PaddedMask | Tensor:
    """What transformers calls a mask function: q_length queries from q_offset on, kv_length keys from kv_offset on.

    attention_mask  bool [B, keys so far], True where a key is real

    A mask function that is not transformers' own, or that gives no intervals, is evaluated densely, as for "sdpa", and
    so is a mask that the model asks to have as a tensor; attention then reads it back, once, and may refuse it.
    """
    from transformers import masking_utils

    if isinstance(attention_mask, PaddedMask):
        return attention_mask
    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function

    def dense() -> Tensor:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs,
        )  # fmt: skip

    # These masks may be left out, unless the model says that it goes on to compute with them.
    wanted_as_tensor = (
        mask_function is masking_utils.causal_mask_function and not allow_is_causal_skip and q_length > 1
    ) or (mask_function is masking_utils.bidirectional_mask_function and not allow_is_bidirectional_skip)
    if wanted_as_tensor:
        return dense()
    if isinstance(q_offset, Tensor):
        if q_offset.device.type != "cpu":
            raise NotImplementedError(
                f"{NAME}: past_key_values keeps its length on the GPU (a static cache), where reading it would wait; "
                "use a DynamicCache, or attn_implementation='sdpa'"
            )
        q_offset = int(q_offset)
    places = torch.arange(q_offset, q_offset + q_length, device="cpu")
    try:
        lo, hi, parts = intervals(mask_function, places.unsqueeze(0))
    except UnknownMask:
        return dense()
    lo, hi = ((t - kv_offset).clamp(0, kv_length) for t in (lo, hi))
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    return PaddedMask(lo, hi, kv_length, padding, batch=batch_size, offset=q_offset - kv_offset, parts=parts)


def uses_interface(model: nn.Module) -> dict[str, bool]:
    """For each transformers model inside `model`, by name: whether its code asks the attention interface.

    attn_implementation does nothing for those that do not, whatever it is set to: they compute attention themselves.
    """
    from transformers import PreTrainedModel

    return {
        name or type(module).__name__: type(module)._can_set_attn_implementation()
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }


def _packed(query, key, value, cu_q: Tensor, cu_k: Tensor, causal: bool, sliding_window, scaling, dropout) -> Tensor:
    batch, heads, length, width = query.shape
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)  # flash-attention's
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    mask = AttentionMask(causal=bool(causal), window=window)
    # The longest lengths are tensors on a GPU, or left out: bounds do without.
    out = attend_packed(NAME, q, k, v, cu_q, cu_k, None, None, mask=mask, scale=scaling, dropout_p=dropout)
    return out.view(batch, length, heads, width)


def _without_mask(query: Tensor, key: Tensor, causal: bool, sliding_window: int | None) -> PaddedMask:
    """The mask of a call that brings none: all keys, or as is_causal says."""
    queries, keys = query.shape[2], key.shape[2]
    causal = causal and queries > 1
    if causal and queries != keys:
        raise NotImplementedError(
            f"{NAME}: is_causal without attention_mask, for {queries} queries and {keys} keys: where they stand to one "
            "another is not known"
        )
    if sliding_window is not None and sliding_window < keys:
        raise NotImplementedError(f"{NAME}: sliding_window is {sliding_window} without attention_mask")
    place = torch.arange(queries, device="cpu").unsqueeze(0)
    hi = place + 1 if causal else torch.full_like(place, keys)
    return PaddedMask(torch.zeros_like(place), hi, keys, None, batch=query.shape[0], offset=0, parts=set())


def _begin_again(position_ids: Any) -> bool:
    """Whether a row of [B, Lq] holds several sequences; on a GPU they are not read."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.device.type != "cpu":
        return False
    return bool((position_ids.diff(dim=1) < 0).any())


def _check_fits(mask: PaddedMask, query: Tensor, key: Tensor) -> None:
    if mask.batch != query.shape[0] or mask.queries not in (1, query.shape[2]) or mask.keys != key.shape[2]:
        raise ValueError(
            f"{NAME}: attention_mask is for {mask.shape}, [B, 1, Lq, Lk], but query is {tuple(query.shape)} and key "
            f"{tuple(key.shape)}"
        )


@lru_cache(maxsize=256)
def _attends_to_itself(kind: type[nn.Module]) -> bool:
    """Whether modules of this class can attend to their own input alone: their forward takes one sequence."""
    parameters = inspect.signature(kind.forward).parameters.values()
    states = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _NO_STATES]
    return len(states) == 1
