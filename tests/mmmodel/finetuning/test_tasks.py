"""What a step of each task asks of the device: nothing that waits for it."""

import dataclasses

import numpy as np
import pytest
import torch
from builders import QUICK_FINETUNING as QUICK
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmmodel.export import open_run
from mmmodel.finetuning import run as finetuning
from mmmodel.finetuning.tasks import make_task

READS = {getattr(Tensor, n) for n in ("item", "tolist", "nonzero", "__float__", "__int__", "__bool__")}


class Waits(TorchFunctionMode):
    """Of calls that would wait for a GPU those that a CPU shows too: reads, blocking copies, an index of the host's."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = any(isinstance(to, Tensor | torch.device | str) for to in [*args[1:], *kwargs.values()])
        blocks = func is Tensor.to and moves and not kwargs.get("non_blocking")
        index = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else ()
        parts = index if isinstance(index, tuple) else (index,)
        if func in READS or blocks or any(isinstance(part, np.ndarray | list) for part in parts):
            self.found.append(func.__name__)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "fields",
    [
        {"label": "colour"},  # balanced: the loss has weights
        {"label": "colour", "freeze": "encoder"},
        {"task": "multilabel", "label": "names"},
        {"task": "retrieval", "label": "concept"},
    ],
    ids=["classification", "head", "multilabel", "retrieval"],
)
def test_a_step_makes_no_copy_that_waits(run, labelled, shards, fields):
    data = shards if fields.get("task") == "retrieval" else labelled
    config = dataclasses.replace(QUICK, **fields, data=str(data))
    source = open_run(run)
    base = finetuning.fresh(source.config, source.tokenizer, config.seed)
    data, _ = finetuning.read_labelled(source.config, base.model, config)
    learner, _ = finetuning.build(base, source, data.labels, config)
    task = make_task(learner, data, config)
    with Waits() as waits:
        task.loss(np.arange(8), None).backward()
    assert waits.found == []
