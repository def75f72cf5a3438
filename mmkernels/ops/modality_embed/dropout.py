"""Which elements dropout keeps, in PyTorch.   T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.philox import philox_4x32, threshold


def keep_mask(rng: Tensor, T: int, E: int, dropout_p: float) -> Tensor:
    """bool [T, E]: word e % 4 of Philox at counter (e // 4, t, 0, offset) under the seed is at least the threshold.

    rng  int64 [2]: seed, offset.  The kernels and the C++ code compute the same words.
    """
    column = torch.arange(-(-E // 4), device=rng.device)
    token = torch.arange(T, device=rng.device)[:, None]
    words = philox_4x32(column, token, torch.zeros_like(column), rng[1], rng[0])
    return torch.stack(words, -1).reshape(T, 4 * len(column))[:, :E] >= threshold(dropout_p)


def dropped(x: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    """x [T, E] with what is not kept set to 0, the rest divided by 1 - dropout_p; x itself without an rng."""
    if rng is None:
        return x
    return torch.where(keep_mask(rng, *x.shape, dropout_p), x * (1.0 / (1.0 - dropout_p)), 0.0)
