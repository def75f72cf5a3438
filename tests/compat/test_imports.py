"""Importing mmkernels, and any drop-in, imports torch and nothing optional, nor what it is a drop-in for."""

import subprocess
import sys

CODE = """
import sys
import torch.utils.flop_counter  # imports Triton where there is one
before = set(sys.modules)
import mmkernels, mmkernels.modules
from mmkernels.compat import flash_attn, torch_sdpa, torch_varlen
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*(name for name in ("torch._dynamo", "torch._inductor") if name in set(sys.modules) - before))
from mmkernels.compat import huggingface, timm
print(*{"transformers", "timm", "torchvision"} & set(sys.modules))
"""


def test_nothing_optional_is_imported():
    output = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    roots, slow, originals = output.split("\n")[:3]
    assert set(roots.split()) <= {"mmkernels", "torch", "numpy"}
    assert slow == originals == ""
