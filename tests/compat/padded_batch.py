"""One padded batch, in the memory that projections give, for the tests of the padded drop-ins."""

import torch

B, H, L, D = 3, 4, 37, 16
LENGTHS = torch.tensor([37, 5, 20])  # whole, short, and not a multiple of anything
REAL = torch.arange(L) < LENGTHS[:, None]  # [B, L]
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()
KEYS = REAL[:, None, None]


def heads(memory, batch=B, count=H, length=L, dtype=torch.float32):
    """q, k, v [B, H, L, D] in the memory of one projection, of three, or contiguous."""
    if memory == "projection":
        return [t.transpose(1, 2) for t in torch.randn(batch, length, 3, count, D).to(dtype).unbind(2)]
    tensors = [torch.randn(batch, length, count, D).to(dtype).transpose(1, 2) for _ in range(3)]
    return [t.contiguous() for t in tensors] if memory == "contiguous" else tensors
