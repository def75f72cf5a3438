"""The drop-in for Hugging Face against transformers' own sdpa, padded batches.   B samples, L padded, H heads, D width.

One pass is what a model does: its mask once, then attention layer after layer, by transformers' mask function and
attention function of each name.  Then a BERT of BERT-base's width, with all that surrounds them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import attention
from benchmarks.harness import PREFIX, Implementation, Missing, Work, close
from benchmarks.peers import dense_masks, packed
from mmkernels.compat import huggingface
from mmkernels.layout import PackedLayout

LAYERS = 2  # of one pass: the fewest that share a mask
IMPLEMENTATIONS = ((PREFIX + "huggingface", huggingface.NAME), ("huggingface_sdpa", "sdpa"))


class SelfAttention(nn.Module):
    """What transformers' functions ask of a module: that it attends to its own input, and how heads share keys."""

    num_key_value_groups = 1

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, hidden_states, attention_mask=None):
        raise NotImplementedError


@dataclass
class HuggingFaceProblem(attention.AttentionProblem):
    """The mask, and LAYERS layers of attention of one size on q, k, v [B, H, L, D], in the memory of projections."""

    op: str = "compat"

    def implementations(self) -> Iterator[Implementation | Missing]:
        if (reason := _missing()) is not None:
            yield from (Missing(name, reason) for name, _ in IMPLEMENTATIONS)
            return
        pad, unpad, slots = dense_masks.padding(self.plan)
        causal = packed.plain_mask(self) == "causal"
        real = dense_masks.key_padding(self.plan)[:, 0, 0]
        leaves = tuple(pad(x).transpose(1, 2).contiguous().requires_grad_() for x in (self.q, self.k, self.v))
        grad_output = pad(self.grad_output).transpose(1, 2).contiguous()
        extra = {"padding": 1 - self.layout.total_tokens / slots}

        def in_oracle_form(result: Tensor) -> Tensor:  # the layers are equal, so their sum is LAYERS times one of them
            return unpad(result.transpose(1, 2)) / LAYERS

        for name, interface in IMPLEMENTATIONS:
            forward = functools.partial(attention_pass, interface, real, leaves, causal)
            yield Implementation(name, forward, leaves, grad_output, in_oracle_form, extra)

    def work(self, direction: str) -> Work:
        one = super().work(direction)
        return Work(LAYERS * one.amount, one.unit, one.exponent, one.limit)


@dataclass
class BertProblem:
    """A BERT of BERT-base's width and LAYERS layers, forward and backward, on ids [B, L]; the oracle is eager."""

    case: str
    layout: PackedLayout
    seed: int
    op: str = "compat"
    dtype: str = "fp32"
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")

    def implementations(self) -> Iterator[Implementation | Missing]:
        if (reason := _missing()) is not None:
            yield from (Missing(name, reason, self.directions) for name, _ in IMPLEMENTATIONS)
            return
        lengths = self.layout.host.cu_seqlens.diff()
        samples, length = len(lengths), self.layout.max_seqlen
        ids = torch.randint(0, 1000, (samples, length), generator=torch.Generator().manual_seed(self.seed))
        real = torch.arange(length) < lengths.unsqueeze(1)
        model = self._model
        # A key's bias shifts a row of scores as a whole: its gradient is 0, what is computed is rounding.
        left_out = ("pooler", "key.bias")
        weights = tuple(p for name, p in model.named_parameters() if not any(part in name for part in left_out))
        grad_output = torch.randn(samples, length, 768, generator=torch.Generator().manual_seed(self.seed))
        grad_output *= real.unsqueeze(-1)

        def hidden(interface: str) -> Tensor:
            model.set_attn_implementation(interface)
            return model(input_ids=ids, attention_mask=real).last_hidden_state

        def rows_that_count(result: Tensor) -> Tensor:
            return result[real] if result.shape[:2] == real.shape else result

        output = hidden("eager")
        self._expected = [output.detach()[real], *torch.autograd.grad(output, weights, grad_output)]
        extra = {"padding": 1 - self.layout.total_tokens / real.numel()}
        for name, interface in IMPLEMENTATIONS:
            call = functools.partial(hidden, interface)
            yield Implementation(name, call, weights, grad_output, rows_that_count, extra, self.directions)

    def check(self, direction: str, results: list[Tensor]) -> str | None:
        expected = self._expected[:1] if direction == "fwd" else self._expected[1:]
        return close(results, expected, 1e-4)  # the oracle is fp32 itself

    def work(self, direction: str) -> Work:
        return Work(self.layout.total_tokens, "tokens/s", 0, None)

    @functools.cached_property
    def _model(self) -> nn.Module:
        from transformers import BertConfig, BertModel

        torch.manual_seed(self.seed)
        config = BertConfig(
            num_hidden_layers=LAYERS, vocab_size=1000, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
        )
        return BertModel._from_config(config, attn_implementation="eager")


def attention_pass(interface: str, real: Tensor, qkv: tuple[Tensor, ...], causal: bool) -> Tensor:
    """Sum of LAYERS times the same attention [B, L, H, D], its mask made once as a model does.  real bool [B, L]."""
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    samples, length = real.shape
    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[interface](
        batch_size=samples, q_length=length, kv_length=length, attention_mask=real,
        mask_function=masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function,
        allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal,
    )  # fmt: skip
    module = SelfAttention(causal)
    heads_first = [x.transpose(1, 2) for x in qkv]
    return sum(ALL_ATTENTION_FUNCTIONS[interface](module, *heads_first, mask)[0] for _ in range(LAYERS))


def _missing() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    huggingface.register()
    return None
