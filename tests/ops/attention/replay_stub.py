"""Repeated launches against Triton's own, without a GPU: kernels are compiled for sm_90, launching them is recorded.

A process of its own, which test_triton_replay.py starts: nothing else should meet a driver that launches nothing.
"""

import gc
from dataclasses import dataclass, replace

import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpu import absent
from mmkernels import AttentionMask, PackedLayout, attention, attention_qkvpacked
from mmkernels.ops.attention import configs, triton_kernels, triton_launch_backward, triton_replay
from mmkernels.ops.attention.configs import Config

LAUNCHED = []  # (kernel's name, what its launcher was given)


def record(name, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
    LAUNCHED.append((name, x, y, z, stream, function, packed, *map(seen, args)))
    if enter is not None:
        enter(launch_metadata)


def seen(arg):
    """As the launcher's C code sees it: a tensor is its address, a descriptor what its map is encoded from."""
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr()
    if isinstance(arg, TensorDescriptor):
        return arg.base.data_ptr(), arg.base.dtype, arg.shape, arg.strides, arg.block_shape, arg.padding
    return arg


def install() -> list[str]:
    """Returns the names of repeated launches, each of which is compared with Triton's own launch of the same."""
    absent.install(record)
    repeated = []
    make_or_repeat = triton_replay.launch

    def compared(name, tensors, make, kept):
        again = kept is not None and name in kept and not triton_replay._watched()
        make_or_repeat(name, tensors, make, kept)
        if again:
            make_or_repeat(name, tensors, make, None)
            ours, theirs = LAUNCHED[-2:]
            assert ours == theirs, (name, ours, theirs)
            repeated.append(name)

    triton_kernels.launch = triton_launch_backward.launch = compared
    return repeated


@dataclass
class Call:
    """One attention call on new tensors each time.   view: of one projection [T, H + 2 G, D]; offset: elements

    packed: attention_qkvpacked, which has one gradient.
    """

    layout: PackedLayout
    mask: AttentionMask | None = None
    dtype: torch.dtype = torch.bfloat16
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    view: bool = False
    offset: int = 0
    deterministic: bool | None = None
    broadcast: bool = False  # the gradient: one row for all tokens
    packed: bool = False

    def tensors(self) -> tuple[torch.Tensor, ...]:
        T, heads = self.layout.total_tokens, (self.heads, self.kv_heads, self.kv_heads)
        if self.view:
            return torch.zeros(T, sum(heads), self.width, dtype=self.dtype).split(heads, 1)
        flat = (torch.zeros(T * n * self.width + self.offset, dtype=self.dtype) for n in heads)
        return tuple(x[self.offset :].view(T, n, self.width) for x, n in zip(flat, heads, strict=True))

    def __call__(self, learns: bool = True) -> None:
        leaves = [x.detach().requires_grad_(learns) for x in self.tensors()]
        options = {"layout": self.layout, "mask": self.mask, "deterministic": self.deterministic}
        if self.packed:
            leaves = [torch.stack([x.detach() for x in leaves], 1).requires_grad_(learns)]
            out = attention_qkvpacked(*leaves, **options, impl="triton")
        else:
            out = attention(*leaves, **options, impl="triton")
        if learns:
            rows = 1 if self.broadcast else len(out)
            gradient = torch.zeros(rows, self.heads, self.width, dtype=self.dtype).expand_as(out)
            torch.autograd.grad(out, leaves, gradient)


def layout() -> PackedLayout:
    return PackedLayout.from_counts([[30, 20], [1, 0], [0, 0], [0, 130]])


FUSED, PAIR = ["fwd", "delta", "fused"], ["fwd", "dq", "dkdv"]
# Of no speed, but soon compiled.
SMALL, TMA = Config(32, 32, 4, 1), Config(32, 32, 4, 1, tma=True)
POINTERS = {"fwd": SMALL, "dq": SMALL, "dkdv": SMALL, "fused": SMALL}
DESCRIPTORS = dict.fromkeys(POINTERS, TMA)
VISIBLE = AttentionMask(visible=[[1, 0], [1, 1]])
CASES = {
    "fused": (Call(layout()), POINTERS, FUSED),
    "pair": (Call(layout(), deterministic=True), POINTERS, PAIR),
    "fused, descriptors of views": (Call(layout(), VISIBLE, view=True), DESCRIPTORS, FUSED),
    "pair, descriptors of views": (Call(layout(), VISIBLE, view=True, deterministic=True), DESCRIPTORS, PAIR),
    "unaligned, so no descriptors": (Call(layout(), offset=1), POINTERS | {"fwd": TMA}, FUSED),
    "padded width": (Call(layout(), width=40, kv_heads=4), DESCRIPTORS, FUSED),
    "fused, one projection": (Call(layout(), kv_heads=4, packed=True), DESCRIPTORS, FUSED),
    "pair, one projection": (Call(layout(), kv_heads=4, packed=True, deterministic=True), DESCRIPTORS, PAIR),
    "fp32": (Call(layout(), dtype=torch.float32, width=32, deterministic=True), POINTERS, PAIR),
}


def check_cases(repeated: list[str]) -> None:
    for name, (call, override, kernels) in CASES.items():
        with configs.override(**override):
            for learns, expected in ((False, kernels[:1]), (True, kernels)):
                for met in range(4):
                    del LAUNCHED[:], repeated[:]
                    call(learns)
                    # The first call takes the long way, the second keeps its launches, and the others repeat them.
                    assert repeated == (expected if met > 1 else []), (name, learns, met, repeated)
                    assert len(LAUNCHED) == len(expected) + len(repeated)


def check_what_changes(repeated: list[str]) -> None:
    """Each of these is another call: what it repeats is its own, or nothing."""
    call = Call(layout())

    def repeats(changed: Call, times: int = 1) -> list[str]:
        for _ in range(times):
            del repeated[:]
            changed()
        return repeated.copy()

    assert repeats(call, 3) == FUSED
    for change in (
        {"view": True}, {"offset": 1}, {"dtype": torch.float16}, {"heads": 6}, {"kv_heads": 1}, {"width": 32},
        {"mask": VISIBLE}, {"deterministic": True},
    ):  # fmt: skip
        assert repeats(replace(call, **change)) == [], change
        assert repeats(call) == FUSED, change
    assert repeats(replace(call, broadcast=True)) == FUSED[:1]  # backward met other strides
    apart = replace(call, kv_heads=4, view=True)
    assert repeats(apart, 3) == FUSED
    assert repeats(replace(apart, packed=True)) == FUSED[:1]  # its gradients have other strides
    assert repeats(replace(apart, packed=True)) == FUSED
    assert repeats(apart) == FUSED
    torch.use_deterministic_algorithms(True)
    assert repeats(call) == []
    assert repeats(call, 2) == PAIR
    torch.use_deterministic_algorithms(False)
    assert repeats(call) == FUSED

    exact = CASES["fp32"][0]
    assert repeats(exact) == PAIR
    torch.backends.cuda.matmul.allow_tf32 = True
    assert repeats(exact) == []
    torch.backends.cuda.matmul.allow_tf32 = False
    assert repeats(exact) == PAIR

    entered = []
    knobs.runtime.launch_enter_hook.add(entered.append)
    assert repeats(call) == []
    assert len(entered) == 3
    knobs.runtime.launch_enter_hook.remove(entered.append)
    assert repeats(call) == FUSED

    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)
    ):
        assert repeats(call) == FUSED[:1]  # what was saved comes back in other strides


def check_nothing_is_kept() -> None:
    """The layouts of all cases are there, and what is kept on them holds no activation or gradient."""
    del LAUNCHED[:]
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.is_floating_point()]
    assert all(x.untyped_storage().nbytes() <= 8 for x in found), [x.shape for x in found]


if __name__ == "__main__":
    repeated = install()
    check_cases(repeated)
    with configs.override(**POINTERS):
        check_what_changes(repeated)
    check_nothing_is_kept()
