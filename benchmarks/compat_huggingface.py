"""Hugging Face's face against transformers' own sdpa, on padded batches.   B samples, L padded, H heads, D width.

python -m benchmarks.compat_huggingface [--json PATH] [--layers N]

One pass is what a model does: its mask once, then attention layer after layer (transformers' mask function and
attention function of each name), forward alone or with backward; then a BERT of BERT-base's width with all that
surrounds it.  Both run in turns in one process, each checked against the other on real rows first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import environment
from mmkernels.compat import huggingface

PADDING = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
SAMPLES, LENGTH, HEADS, WIDTH = 8, 256, 12, 64
ROUNDS = 5
NAMES = ("sdpa", "mmkernels")


class SelfAttention(nn.Module):
    """What transformers' functions ask of a module: that it attends to its own input, and how heads share keys."""

    num_key_value_groups = 1

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, hidden_states, attention_mask=None):
        raise NotImplementedError


def lengths_with(padding: float) -> list[int]:
    """Lengths spread evenly about their mean, the longest LENGTH, so that `padding` of the batch is padding."""
    spread = min(padding, 0.5)
    steps = [i / (SAMPLES - 1) for i in range(SAMPLES)]
    lengths = [LENGTH * (1 - padding + spread * (1 - 2 * s)) for s in steps]
    return [LENGTH] + [min(LENGTH, max(1, round(n))) for n in lengths[1:]]


def padding_mask(lengths: list[int]) -> Tensor:
    return torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)


def attention_pass(name: str, mask: Tensor, qkv: list[Tensor], layers: int, causal: bool) -> Tensor:
    """The mask, and `layers` layers of attention of one size: their outputs, summed."""
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    seen = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name](
        batch_size=SAMPLES, q_length=LENGTH, kv_length=LENGTH, mask_function=kind, attention_mask=mask,
        allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal,
    )  # fmt: skip
    module = SelfAttention(causal)
    return sum(ALL_ATTENTION_FUNCTIONS[name](module, *qkv, seen)[0] for _ in range(layers))


def attention_rows(layers: int) -> list[dict]:
    rows = []
    torch.manual_seed(0)
    qkv = [torch.randn(SAMPLES, LENGTH, HEADS, WIDTH).requires_grad_() for _ in range(3)]
    views = [t.transpose(1, 2) for t in qkv]
    for causal in (False, True):
        for padding in PADDING:
            lengths = lengths_with(padding)
            mask = padding_mask(lengths)
            weight = torch.randn(SAMPLES, LENGTH, HEADS, WIDTH) * mask[..., None, None]

            def forward(name, mask=mask, causal=causal):
                with torch.no_grad():
                    return attention_pass(name, mask, views, layers, causal)

            def both(name, mask=mask, causal=causal, weight=weight):
                return torch.autograd.grad(attention_pass(name, mask, views, layers, causal), qkv, weight)

            _agree(forward("sdpa")[mask], forward("mmkernels")[mask])
            for a, b in zip(both("sdpa"), both("mmkernels"), strict=True):
                _agree(a, b)
            what = "decoder" if causal else "encoder"
            rows.append(_row(f"attention, {what}, forward", lengths, forward))
            rows.append(_row(f"attention, {what}, both", lengths, both))
    return rows


def model_rows(layers: int) -> list[dict]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, vocab_size=1000, attention_probs_dropout_prob=0.0)
    model = BertModel._from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 1000, (SAMPLES, LENGTH))
    rows = []
    for padding in PADDING:
        lengths = lengths_with(padding)
        mask = padding_mask(lengths)

        def forward(name, mask=mask):
            model.set_attn_implementation(name)
            with torch.no_grad():
                return model(input_ids=ids, attention_mask=mask).last_hidden_state

        _agree(forward("sdpa")[mask], forward("mmkernels")[mask])
        rows.append(_row(f"BERT of {layers} layers, forward", lengths, forward))
    return rows


def _row(what: str, lengths: list[int], run: Callable[[str], object]) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(ROUNDS):
        for name in NAMES:
            start = time.perf_counter()
            run(name)
            seconds[name].append(time.perf_counter() - start)
    ms = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    row = {
        "what": what,
        "padding": 1 - sum(lengths) / (SAMPLES * LENGTH),
        **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
        "ratio": round(ms["sdpa"] / ms["mmkernels"], 3),
    }
    print(
        f"{what:<32} padding {row['padding']:5.0%}   sdpa {ms['sdpa']:8.1f} ms   mmkernels {ms['mmkernels']:8.1f} ms   "
        f"{row['ratio']:5.2f}x",
        flush=True,
    )
    return row


def _agree(expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compat_huggingface", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures there; default: only print them")
    parser.add_argument("--layers", type=int, default=2, help="layers of one pass; default 2")
    options = parser.parse_args()
    huggingface.register()
    print(f"B{SAMPLES} L{LENGTH} H{HEADS} D{WIDTH} fp32, {options.layers} layers, {torch.get_num_threads()} threads")
    rows = attention_rows(options.layers) + model_rows(options.layers)
    if options.json:
        document = {"environment": environment.describe(torch.device("cpu"), 0), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
