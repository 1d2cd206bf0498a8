"""Attention as CPUs compute it fast: the same function, with its gradients.

torch's fused attention is slow on its way back in bfloat16 (14 ms where float32 takes 4, for 16 x 8 x 80 x 64), so that
it is given float32. And where scores are capped, as in Gemma 2, no fused attention can be had: written as it is there,
it reads and writes every score a dozen times.

transformers looks attention up by name, for all networks of a process; so what is put there looks whether this one was
taught.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface

from fallback.patched import ATTEND


def teach(network: Any) -> None:
    """A network of transformers' own layers, in place."""
    narrow = getattr(network, "dtype", None) in (torch.bfloat16, torch.float16)
    for module in network.modules():
        code: Any = sys.modules[type(module).__module__]
        if getattr(module, "attn_logit_softcapping", None) and hasattr(code, "eager_attention_forward"):
            code.eager_attention_forward = _asking(code.eager_attention_forward)
            setattr(module, ATTEND, capped)
        elif narrow and _is_fused_attention(module):
            AttentionInterface.register("sdpa", _asking(AttentionInterface._global_mapping["sdpa"]))
            setattr(module, ATTEND, in_float32)


def _is_fused_attention(module: Any) -> bool:
    """In a language model; what a vision tower sees is not text."""
    if not (hasattr(module, "query_key_value") or (hasattr(module, "q_proj") and hasattr(module, "o_proj"))):
        return False
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"


def _asking(usual: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(usual, "asks_module"):
        return usual

    def attend(module: Any, *args: Any, **how: Any) -> Any:
        own = getattr(module, ATTEND, None)
        return usual(module, *args, **how) if own is None else own(usual, module, *args, **how)

    attend.asks_module = True  # type: ignore[attr-defined]
    return attend


def in_float32(
    usual: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **how: Any,
) -> Any:
    if not module.training:
        # It is the way back that is slow.
        return usual(module, query, key, value, attention_mask, **how)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with _exactly(query):
        made, weights = usual(module, query.float(), key.float(), value.float(), attention_mask, **how)
    return made.to(query.dtype), weights


def capped(
    usual: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **how: Any,
) -> Any:
    if dropout or scaling is None or softcap is None:
        how |= {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        return usual(module, query, key, value, attention_mask, **how)
    return _Capped.apply(query, key, value, attention_mask, scaling, softcap), None


def _exactly(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Autocast would round what is given to it. Shapes alone, which `plan` computes with, are no CPU's."""
    return torch.autocast("cpu", enabled=False) if tensor.is_cpu else nullcontext()


class _Capped(torch.autograd.Function):
    """softmax(cap * tanh(scaling / cap * q k) + mask) v, with its gradients. Heads that share keys and values stand
    below each other, so that nothing is repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        cap: float,
    ) -> torch.Tensor:
        rows, heads, length, width = query.shape
        _, groups, keys, _ = key.shape
        q = query.float().reshape(rows * groups, -1, width)
        k, v = (x.float().reshape(rows * groups, keys, width) for x in (key, value))
        with _exactly(query):
            bent = _product(q, k.transpose(1, 2), scaling / cap).tanh_()
            scores = bent.view(rows, groups, heads // groups, length, keys)
            seen = scores * cap if mask is None else torch.add(mask.unsqueeze(2), scores, alpha=cap)
            shares = seen.softmax(-1).view_as(bent)
            made = torch.bmm(shares, v).view(rows, heads, length, width)
        ctx.save_for_backward(q, k, v, bent, shares)
        ctx.shapes, ctx.scaling = (query.shape, key.shape), scaling
        return made.transpose(1, 2).to(query.dtype).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bent, shares = ctx.saved_tensors
        like_query, like_key = ctx.shapes
        above = grad.transpose(1, 2).float().reshape(q.shape)
        to_value = torch.bmm(shares.transpose(1, 2), above)
        to_seen = torch._softmax_backward_data(torch.bmm(above, v.transpose(1, 2)), shares, -1, torch.float32)
        to_scores = torch.ops.aten.tanh_backward(to_seen, bent)
        to_query = _product(to_scores, k, ctx.scaling)
        to_key = _product(to_scores.transpose(1, 2), q, ctx.scaling)
        made = to_query.view(like_query), to_key.view(like_key), to_value.view(like_key)
        return *(x.to(grad.dtype) for x in made), None, None, None


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)
