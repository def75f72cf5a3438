"""A Hugging Face model on a padded batch, its attention by mmkernels: one line more, the same results, less work.

    python examples/huggingface_padding.py

Needs transformers (pip install ".[hf]" in a checkout).  The model has random weights, so nothing is downloaded; with
your own it is AutoModel.from_pretrained(name, attn_implementation="mmkernels").  Its layers are so few and narrow that
planning may take longer than what is saved: docs/drop_in.md has what larger ones gain.
"""

import time

import torch

from mmkernels.compat import huggingface

try:
    from transformers import BertConfig, BertModel
except ImportError as error:
    raise SystemExit(f"huggingface_padding.py: {error}; pip install 'transformers>=5.0'") from None

LENGTHS = (128, 90, 41, 17)


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    model = BertModel._from_config(config, attn_implementation="sdpa").eval()
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    inputs = {"input_ids": torch.randint(0, 1000, mask.shape), "attention_mask": mask}
    expected, before = timed(model, inputs)

    huggingface.register()
    model.set_attn_implementation("mmkernels")
    assert all(huggingface.uses_interface(model).values()), "this model's code computes attention itself"
    found, after = timed(model, inputs)

    error = (found - expected)[mask.bool()].abs().max()
    assert error < 1e-4, error
    padding = 1 - sum(LENGTHS) / mask.numel()
    print(f"same results on real rows (largest difference {error:.0e}), {padding:.0%} padding")
    print(f"a forward pass: sdpa {before * 1e3:.1f} ms, mmkernels {after * 1e3:.1f} ms")


def timed(model, inputs) -> tuple[torch.Tensor, float]:
    """The last hidden states, and the shortest of a few passes."""
    times = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            hidden = model(**inputs).last_hidden_state
            times.append(time.perf_counter() - start)
    return hidden, min(times)


if __name__ == "__main__":
    main()
