"""What the drop-ins hand to torch, for mmkernels.explain()."""

from __future__ import annotations

from mmkernels import dispatch


def note(text: str) -> None:
    """As dispatch.note; inside torch.compile once, while the region is traced."""
    dispatch.note(text)


# What torch.compiler.assume_constant_result does, but without importing Dynamo: run while tracing, not in the graph.
note._dynamo_marked_constant = True
