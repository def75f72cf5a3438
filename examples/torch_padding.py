"""A torch.nn.TransformerEncoder on a padded batch, trained one step with each attention: the same losses and weights.

python examples/torch_padding.py
"""

import copy
import time

import torch
from torch import nn

import mmkernels
from mmkernels.modules import replace_attention

LENGTHS = (256, 180, 82, 34)


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
    original = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    swapped = copy.deepcopy(original)
    print(replace_attention(swapped), end="\n\n")

    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS).unsqueeze(1)
    x = torch.randn(*padding.shape, 256)
    losses, seconds = zip(*(train(model, x, padding) for model in (original, swapped)), strict=True)

    for before, after in zip(original.parameters(), swapped.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    print(f"same loss and weights after a step, {padding.float().mean():.0%} padding")
    print(f"a step: torch {seconds[0] * 1e3:.0f} ms, mmkernels {seconds[1] * 1e3:.0f} ms\n")
    print(mmkernels.explain())


def train(model: nn.Module, x: torch.Tensor, padding: torch.Tensor) -> tuple[float, float]:
    """One step on the real rows; loss and seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = time.perf_counter()
    loss = model(x, src_key_padding_mask=padding)[~padding].square().mean()
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - start


if __name__ == "__main__":
    main()
