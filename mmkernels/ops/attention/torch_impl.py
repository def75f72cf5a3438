"""Packed attention on CPU by torch's own kernels, run by run.   Tq, Tk tokens, H heads, G key heads, D width.

A run (torch_runs) is a group of queries that share their keys, and most need no mask: torch's flash kernel takes them
as views.  Pair bias, dropout and modality mass, which that kernel lacks, go block by block (torch_blockwise).  Nothing
is padded or shared between samples, so they cannot touch one another.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.attention import torch_blockwise
from mmkernels.ops.attention.inputs import held
from mmkernels.ops.attention.torch_runs import CAUSAL, find_runs
from mmkernels.ops.attention.torch_views import Schedule, runs_of, to_tensors

# The kernels under F.scaled_dot_product_attention; called by name because they alone return lse and take it back.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_MORE_COLUMNS = 8  # _through_lse needs one; a multiple of the vector width is faster


def schedule(plan, request) -> tuple:
    """torch_views.Schedule and no configuration."""
    found = plan.cache.get("runs")  # the same for every dtype and width
    if found is None:
        bounds = plan.layout.cu_seqlens.numpy(), plan.k_layout.cu_seqlens.numpy()
        found = to_tensors(find_runs(*bounds, plan.q_table.numpy(), plan.k_table.numpy(), plan.has_visible))
        plan.cache["runs"] = found
    return *found, []


def attention_fwd(q, k, v, pair_bias, rng, out, lse, mass, lowered) -> None:
    """Fills out [Tq, H, D], lse [H, Tq] and, where it is not None, mass [Tq, H, Mk]."""
    q, k, v, pair_bias = held(q=q, k=k, v=v, pair_bias=pair_bias)
    blind = Schedule.of(lowered).blind_queries()
    if blind is not None:
        out[blind], lse[:, blind] = 0, -math.inf
        if mass is not None:
            mass[blind] = 0
    if q.dtype == torch.float16:  # torch's kernel is slower in fp16 than in fp32
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = _apart(q), _apart(k), _apart(v)
    if pair_bias is not None or lowered.dropout_p or mass is not None:
        torch_blockwise.forward(q, k, v, pair_bias, rng, out, lse, mass, lowered)
        return
    for run in runs_of(lowered, q.shape[1], k.shape[1]):
        run_out, run_lse = _flash(run.queries(q), run.keys(k), run.keys(v), **_options(run, lowered))
        run.write_queries(out, run_out)
        run.write_lse(lse, run_lse)


def attention_bwd(do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, dbias, lowered) -> None:
    """Fills dq [Tq, H, D], dk and dv [Tk, G, D] and, where it is not None, dbias [H, Mq, Mk]."""
    # In fp32 whatever the inputs: torch's kernel is many times slower in half precision, and sums would be rounded.
    *rows, pair_bias, dlse = held(do=do, q=q, k=k, v=v, out=out, pair_bias=pair_bias, dlse=dlse)
    do, q, k, v, out = (_apart(t.float()) for t in rows)
    plan = Schedule.of(lowered)
    blind = plan.blind_queries()
    if blind is not None:
        dq[blind] = 0
    add = not plan.covered  # some keys are in several runs, or in none
    dk_sum, dv_sum = (k.new_zeros(k.shape), v.new_zeros(v.shape)) if add else (dk, dv)
    if pair_bias is not None or lowered.dropout_p:
        torch_blockwise.backward(do, dlse, q, k, v, pair_bias, rng, dq, dk_sum, dv_sum, dbias, lowered, add=add)
    else:
        for run in runs_of(lowered, q.shape[1], k.shape[1]):
            rows = [run.queries(do), run.queries(q), run.keys(k), run.keys(v), run.queries(out)]
            if dlse is not None:
                rows = _through_lse(*rows, run.lse(dlse))
            gradients = _flash_backward(*rows, run.lse(lse), dropout_p=0.0, **_options(run, lowered))
            run_dq, run_dk, run_dv = (gradient[..., : q.shape[2]] for gradient in gradients)
            run.write_queries(dq, run_dq)
            run.write_keys(dk_sum, run_dk, add=add)
            run.write_keys(dv_sum, run_dv, add=add)
    if add:
        dk.copy_(dk_sum)
        dv.copy_(dv_sum)


def _apart(t: Tensor) -> Tensor:
    """Rows that do not overlap: of sliding windows torch's products make garbage.  Of one row for all they do not."""
    windows = 0 < t.stride(0) < t.shape[2] or 0 < t.stride(1) < t.shape[2]
    return t.contiguous() if windows else t


def _options(run, lowered) -> dict:
    mask = run.mask(lowered, slice(0, run.q_len))
    return {"is_causal": run.kind == CAUSAL, "attn_mask": mask, "scale": lowered.scale}


def _through_lse(do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dlse: Tensor) -> list[Tensor]:
    """Wider rows that turn the kernel's rowsum(do out) into rowsum(do out) - dlse, and change nothing else.

    That is all that d lse_i / d s_ij = p_ij adds to ds = p (do v^T - rowsum(do out)).  One more column does it: 1 in
    do, -dlse in out, 0 in q, k and v.
    """
    width = q.shape[-1]
    do, q, k, v, out = (F.pad(t, (0, _MORE_COLUMNS)) for t in (do, q, k, v, out))
    do[..., width] = 1
    out[..., width] = -dlse
    return [do, q, k, v, out]
