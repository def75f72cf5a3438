"""torch FlexAttention, compiled, on the packed batch: any mask, by a mask_mod.   T tokens.

Twice: with the block mask at hand (as between the layers of one step), and with its building in the time (as on the
first layer of every step, whose layout is new).  Ours of the second kind is mm.NAME_with_mask.  The mask_mod reads the
same bounds and bits as our kernels: these are there before the clock starts, which favours this peer.
On a CPU it has forward alone, and only for inputs without gradients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from benchmarks.harness import MAKES_MASK, Implementation


@dataclass(frozen=True)
class Flex:
    NAME: str
    builds_mask: bool

    def missing(self, problem) -> str | None:
        return None

    def build(self, problem) -> Implementation:
        return implementation(self.NAME, problem, self.builds_mask, *_compiled(problem.case, problem.dtype))


FLEX = Flex("flex", False)
FLEX_WITH_MASK = Flex("flex_with_mask", True)


def implementation(name: str, problem, builds_mask: bool, flex_attention, create_block_mask) -> Implementation:
    """With flex_attention and create_block_mask as they are, also on a CPU (tests)."""
    q, k, v = (x.detach().transpose(0, 1).unsqueeze(0).contiguous() for x in (problem.q, problem.k, problem.v))
    trains = q.device.type == "cuda"
    leaves = tuple(x.requires_grad_(trains) for x in (q, k, v))  # [1, heads, T, D], the layout that it wants
    plan, T, grouped = problem.plan, q.shape[2], q.shape[1] != k.shape[1]
    lo, hi, q_bits, k_bits = plan.kv_lo, plan.kv_hi, plan.q_bits, plan.k_bits

    def seen(batch, head, query, key):
        return (key >= lo[query]) & (key < hi[query])

    def seen_by_modality(batch, head, query, key):
        return (key >= lo[query]) & (key < hi[query]) & ((q_bits[query] & k_bits[key]) != 0)

    def block_mask():
        mask_mod = seen_by_modality if plan.has_visible else seen
        return create_block_mask(mask_mod, None, None, T, T, device=q.device)

    ready = None if builds_mask else block_mask()

    def forward():
        mask = block_mask() if builds_mask else ready
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)

    return Implementation(
        name,
        forward,
        leaves,
        problem.grad_output.transpose(0, 1).unsqueeze(0).contiguous(),
        lambda result: result.squeeze(0).transpose(0, 1),
        MAKES_MASK if builds_mask else {},
        directions=with_mask_directions(q.device) if builds_mask else ("fwd", "bwd", "fwd+bwd") if trains else ("fwd",),
    )


def with_mask_directions(device: torch.device) -> tuple[str, ...]:
    """Backward alone never builds a mask: that row would be FLEX's again."""
    return ("fwd", "fwd+bwd") if device.type == "cuda" else ("fwd",)


@functools.lru_cache(maxsize=1)  # both forms of a problem share one compilation
def _compiled(case: str, dtype: str):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Compilations of earlier problems count against a limit, beyond which it silently runs uncompiled.
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
