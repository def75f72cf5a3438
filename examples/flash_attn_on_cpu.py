"""A program written for flash_attn, on a machine without a GPU: only its import has changed.

python examples/flash_attn_on_cpu.py
"""

import torch
import torch.nn.functional as F

from mmkernels.compat.flash_attn import flash_attn_varlen_qkvpacked_func, pad_input, unpad_input

HEADS, WIDTH = 4, 32


def attend(hidden: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Causal self-attention of the real rows of hidden [B, S, E]."""
    batch, length, _ = hidden.shape
    rows, indices, cu_seqlens, longest, _ = unpad_input(hidden, mask)
    qkv = F.linear(rows, weight).view(-1, 3, HEADS, WIDTH)
    out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, causal=True)
    return pad_input(out.flatten(1), indices, batch, length)


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([60, 11, 35])
    mask = (torch.arange(60) < lengths[:, None]).int()
    hidden, weight = torch.randn(3, 60, HEADS * WIDTH), torch.randn(3 * HEADS * WIDTH, HEADS * WIDTH) / 12
    out = attend(hidden, mask, weight)

    qkv = F.linear(hidden, weight).view(3, 60, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected * mask.unsqueeze(2), rtol=1e-4, atol=1e-5)
    print(f"same rows as torch's attention, {int(lengths.sum())} of {mask.numel()} computed")


if __name__ == "__main__":
    main()
